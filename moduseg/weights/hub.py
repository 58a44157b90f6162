"""Files and directories of the Hugging Face hub, by repository id and revision.

The id of a data set begins with `datasets/`, as its address does.

A file is looked for in the cache folder, at `$MODUSEG_HOME/huggingface.co/<owner>/<name>/<revision>/` (where people
without a network put it), then in the hub's own cache, which other programs may have filled. If neither has it, it is
fetched into the cache folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from moduseg.errors import ArtefactError, MissingError, MissingWeightsError
from moduseg.files import file_digest
from moduseg.weights.download import (
    PROBE_TIMEOUT,
    TIMEOUT,
    get_cache_home,
    is_offline,
    locked,
    missing_weights,
    storage_error,
    why_not_fetched,
)

DATASETS = "datasets/"
"""How the ids of data sets begin, as in the hub's addresses."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SMALL_FILES = ("*config.json", "tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json")
"""Patterns of the files beside the weights that are read with them."""
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names of the weight file, the preferred one first: older repositories have a PyTorch file only."""
INDEX = ".index.json"
"""Suffix of the file that lists the parts of weights stored in several files."""
_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}
"""Error numbers that come from the file system, never from the network."""


def fetch_hub_folder(
    hub_id: str, revision: str | None, key: str, *, what: str = "model", companions: Sequence[str] = ()
) -> Path:
    """Return the directory of a transformers repository: configuration, preprocessor, tokenizer, weights.

    Args:
        hub_id: `<owner>/<name>`.
        revision: branch, tag or commit; `None` is `main`. Files on this machine are not compared with the hub again.
        key: the configuration key, for messages.
        what: kind of model, for messages.
        companions: files (of a tokenizer, say) of which the directory needs at least one.

    Raises:
        MissingError: the files are not here, and the program is offline or the hub does not give them.
        ArtefactError: the hub announced another digest; the file is removed.
        StorageError: the files cannot be written.
    """
    target = get_cached_folder(hub_id, revision)
    if is_complete(target):
        return target
    config = find_in_hub_cache(hub_id, "config.json", revision)
    if config is not None and is_complete(config.parent):
        folder = config.parent
        if not companions or any((folder / name).is_file() for name in companions):
            return folder
    option = f" --revision {revision}" if revision else ""
    missing = partial(
        missing_weights,
        key=key,
        got=f"hub id {hub_id!r}{f' at revision {revision}' if revision else ''}",
        what=f"its {what}",
        source="config.json, preprocessor_config.json, the tokenizer's files (vocab.json, merges.txt) where there are "
        f"any and model.safetensors (or pytorch_model.bin) from {get_page_url(hub_id, revision)}",
        folder=f"{target} (`hf download {hub_id}{option} --local-dir {target}` does it where there is a network)",
        otherwise="<directory with these files>",
    )
    find_size = partial(find_size_on_hub, hub_id, revision, _choose_model_files)
    with open_repository(hub_id, revision, target, partial(add_size, missing, find_size)) as names:
        _fetch_model_files(hub_id, revision, target, names)
    if not is_complete(target):
        # The client returns without an error if the hub stops answering.
        raise missing("could not be fetched in full")
    for file in list_weight_files(target):
        check_digest(target, file.name, key)
    return target


def _fetch_model_files(hub_id: str, revision: str | None, target: Path, names: set[str]) -> None:
    """Fetch the files of a model into `target`; `names` are the repository's files."""
    from huggingface_hub import snapshot_download

    patterns = _choose_model_files(names)
    if len(patterns) == len(SMALL_FILES):
        raise FileNotFoundError(f"the repository has no {' or '.join(WEIGHTS)}")
    # Weights come last, so that a directory that has them is complete.
    for part in (patterns[: len(SMALL_FILES)], patterns[len(SMALL_FILES) :]):
        snapshot_download(
            hub_id, revision=revision, local_dir=target, cache_dir=get_client_cache(), allow_patterns=part
        )


def _choose_model_files(names: Collection[str]) -> list[str]:
    """Return the patterns of a model's files, given those of its repository: `SMALL_FILES`, then its weights if any."""
    for name in WEIGHTS:
        if name in names:
            return [*SMALL_FILES, name]
        if name + INDEX in names:
            stem, suffix = name.rsplit(".", 1)
            return [*SMALL_FILES, name + INDEX, f"{stem}-*.{suffix}"]
    return [*SMALL_FILES]


def _choose_first(preferred: Sequence[str], names: Collection[str]) -> list[str]:
    """Return the first of the preferred names that a repository has, in a list; an empty one if it has none."""
    return [name for name in preferred if name in names][:1]


def add_size(
    missing: Callable[[str], MissingWeightsError], find_size: Callable[[], int | None], reason: str
) -> MissingWeightsError:
    """Return the error for a reason, with a function that asks for the bytes that would be fetched."""
    error = missing(reason)
    error.find_size = find_size
    return error


def find_size_on_hub(
    hub_id: str, revision: str | None, choose: Callable[[Collection[str]], Sequence[str]]
) -> int | None:
    """Return the bytes of files of a repository, as the hub states them.

    Args:
        hub_id: `<owner>/<name>`, or `datasets/<owner>/<name>` for a data set.
        revision: branch, tag or commit; `None` is `main`.
        choose: names of the repository's files -> names, or patterns, of those that count.

    Returns:
        Their sum; `None` offline, or if the hub does not state the size of all of them.
    """
    from huggingface_hub import HfApi

    if is_offline():
        return None
    try:
        info = HfApi().repo_info(
            hub_id.removeprefix(DATASETS),
            repo_type=_get_repo_type(hub_id),
            revision=revision,
            timeout=PROBE_TIMEOUT,
            files_metadata=True,
        )
    except _list_failures():
        return None
    sizes = {file.rfilename: file.size for file in getattr(info, "siblings", None) or ()}
    patterns = choose(sizes)
    chosen = [size for name, size in sizes.items() if any(fnmatch(name, pattern) for pattern in patterns)]
    return sum(size for size in chosen if size) if chosen and None not in chosen else None


def fetch_hub_file(
    hub_id: str, names: Sequence[str], revision: str | None, key: str, *, value: str = "", otherwise: str = ""
) -> Path:
    """Return one file of a repository: the first of `names` that it has.

    Args:
        hub_id: `<owner>/<name>`, or `datasets/<owner>/<name>` for a data set.
        names: file names, the preferred one first.
        revision: branch, tag or commit; `None` is `main`.
        key: the configuration key, for messages.
        value: the value of `key`, for messages; the hub id if empty.
        otherwise: the value of `key` that names a local file, for messages.

    Raises:
        MissingError, ArtefactError, StorageError: as `fetch_hub_folder` does.
    """
    target = get_cached_folder(hub_id, revision)
    for name in names:
        if (target / name).is_file():
            return target / name
    for name in names:
        if (cached := find_in_hub_cache(hub_id, name, revision)) is not None:
            return cached
    missing = partial(
        missing_weights,
        key=key,
        got=repr(value or hub_id),
        what=f"{names[0]} of {hub_id}{f' at revision {revision}' if revision else ''}",
        source=f"{' or '.join(names)} from {get_page_url(hub_id, revision)}",
        folder=target,
        otherwise=otherwise or "<path of the file>",
    )
    choose = partial(_choose_first, names)
    with open_repository(
        hub_id, revision, target, partial(add_size, missing, partial(find_size_on_hub, hub_id, revision, choose))
    ) as repository_names:
        from huggingface_hub import hf_hub_download

        chosen = next(iter(choose(repository_names)), None)
        if chosen is None:
            raise FileNotFoundError(f"the repository has no {' or '.join(names)}")
        file = Path(
            hf_hub_download(
                hub_id.removeprefix(DATASETS),
                chosen,
                repo_type=_get_repo_type(hub_id),
                revision=revision,
                local_dir=target,
                cache_dir=get_client_cache(),
            )
        )
    if not file.is_file():
        raise missing("could not be fetched in full")
    check_digest(target, file.relative_to(target).as_posix(), key)
    return file


def get_cached_folder(hub_id: str, revision: str | None) -> Path:
    """Return the directory in the cache folder that the files of a repository have, whether they are there or not."""
    return get_cache_home().joinpath("huggingface.co", *hub_id.split("/"), (revision or "main").replace("/", "--"))


def get_page_url(hub_id: str, revision: str | None = None) -> str:
    """Return the address of a repository's page, for people."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{hub_id}" + (f"/tree/{revision}" if revision else "")


def list_weight_files(folder: Path, names: Sequence[str] = WEIGHTS) -> list[Path]:
    """Return the files from which transformers takes a model's weights: safetensors first, one file before several.

    Args:
        folder: a directory.
        names: what the weight file may be called, the preferred name first.

    Returns:
        The weight file, or the index followed by all parts in order of name; empty if a part is absent.

    Raises:
        ArtefactError: the index is damaged.
    """
    for name in names:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / (name + INDEX)
        if index.is_file():
            try:
                parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ArtefactError(f"{index}: lists no weight files ({error}); fetch the file again") from error
            if all((folder / part).is_file() for part in parts):
                return [index, *(folder / part for part in parts)]
    return []


def model_digest(*folders: Path) -> str:
    """Return the sha256 over names and digests of models' files: configuration, tokenizer, weights that are loaded."""
    total = hashlib.sha256()
    for folder in folders:
        files = {path for pattern in SMALL_FILES for path in folder.glob(pattern)} | set(list_weight_files(folder))
        for path in sorted(files):
            total.update(f"{path.name}:{file_digest(path)}\n".encode())
    return total.hexdigest()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that is not blank; the error's type if there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def is_complete(folder: Path) -> bool:
    """Return whether a directory holds a model: `config.json` and every weight file."""
    return (folder / "config.json").is_file() and bool(list_weight_files(folder))


def find_in_hub_cache(hub_id: str, name: str, revision: str | None) -> Path | None:
    """Return a file of a repository from the hub's own cache; `None` if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(
        hub_id.removeprefix(DATASETS), name, revision=revision, repo_type=_get_repo_type(hub_id)
    )
    return Path(path) if isinstance(path, str) else None


def _get_repo_type(hub_id: str) -> str:
    return "dataset" if hub_id.startswith(DATASETS) else "model"


def get_client_cache() -> Path:
    """Return the folder for the bookkeeping of the hub's client."""
    return get_cache_home() / "huggingface.co" / ".cache"


@contextmanager
def open_repository(
    hub_id: str, revision: str | None, target: Path, missing: Callable[[str], MissingError]
) -> Iterator[set[str]]:
    """Yield the file names of a repository while files are fetched from it into `target`, one process at a time.

    Args:
        hub_id: the repository, as `fetch_hub_file` takes it.
        revision: branch, tag or commit; `None` is `main`.
        target: the directory that is written; it is locked.
        missing: makes the error for a reason why the files cannot be fetched.

    Raises:
        MissingError: the program is offline, or the hub does not give the files.
        StorageError: the files cannot be written.
    """
    from huggingface_hub import HfApi, errors

    if reason := why_not_fetched():
        raise missing(reason)
    with locked(target):
        try:
            # Unlike a download, this fails at once if there is no network.
            info = HfApi().repo_info(
                hub_id.removeprefix(DATASETS), repo_type=_get_repo_type(hub_id), revision=revision, timeout=TIMEOUT
            )
            yield {file.rfilename for file in getattr(info, "siblings", None) or ()}
        except errors.GatedRepoError as error:
            raise missing(
                f"asks for its licence to be accepted: do so at {get_page_url(hub_id)}, then run `hf auth login` and "
                "try again"
            ) from error
        except _list_failures() as error:
            if isinstance(error, OSError) and error.errno in _STORAGE:
                raise storage_error(target, error) from error
            if "No space left" in str(error):  # the transfer library has no error numbers
                raise storage_error(target, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) from error
            raise missing(f"could not be fetched ({first_line(error)})") from error


def _list_failures() -> tuple[type[BaseException], ...]:
    """Return what the hub's client raises where the hub does not give what it is asked for."""
    from huggingface_hub import errors

    # The base class of the client's network errors belongs to requests or to httpx, depending on its version.
    transport = [
        c for c in errors.HfHubHTTPError.__mro__ if c.__module__.split(".")[0] in ("requests", "httpx", "httpx2")
    ]
    return (
        errors.HfHubHTTPError,
        errors.HFValidationError,
        getattr(errors, "XetDownloadError", OSError),
        OSError,
        RuntimeError,  # of the transfer library of newer hub clients
        *transport,
    )


def check_digest(folder: Path, name: str, key: str) -> None:
    """Compare a file that has just arrived with the sha256 that the hub announced for it.

    Raises:
        ArtefactError: the digest differs; the file is removed.
    """
    file, record = folder / name, folder / ".cache" / "huggingface" / "download" / f"{name}.metadata"
    lines = record.read_text(encoding="utf-8").splitlines() if record.is_file() else []
    announced = lines[1].strip().strip('"') if len(lines) > 1 else ""
    if re.fullmatch(r"[0-9a-f]{64}", announced) and (got := file_digest(file)) != announced:
        file.unlink()
        record.unlink()
        raise ArtefactError(
            f"{key}: {file} came with sha256 {got}, expected {announced}, and was removed; run again, and if it comes "
            f"again, fetch the file by other means and set {key}=<where it is>"
        )
