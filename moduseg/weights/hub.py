"""Files and directories of the Hugging Face hub, by repository id and revision.

The id of a data set begins with `datasets/`, as its address does.

Looked for in the cache folder, at `$MODUSEG_HOME/huggingface.co/<owner>/<name>/<revision>/` (where whoever has no
network puts them), then in the hub's own cache, which other programs may have filled; fetched into the first.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from moduseg.errors import ArtefactError, MissingError
from moduseg.files import file_digest
from moduseg.weights.download import TIMEOUT, home, is_offline, locked, not_here, storage_error

DATASETS = "datasets/"
"""How the ids of data sets begin, as in the hub's addresses."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SMALL_FILES = ("*config.json", "tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json")
"""What lies beside the weights and is read with them."""
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names of the weight file, the preferred one first: older repositories have a PyTorch file only."""
INDEX = ".index.json"
"""Behind the name, where the weights are in several files."""
_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}
"""What the file system, never the network, answers."""


def model_folder(
    weights: str,
    key: str,
    revision: str | None = None,
    what: str = "model",
    companions: Sequence[str] = (),
) -> Path:
    """The directory that a configuration's `weights` names, with `config.json` and every weight file there.

    Args:
        weights: a directory as `save_pretrained` writes it (`~` and `$VARIABLE` are expanded), `miniature/<name>` for
            one that the package carries, or a hub id such as `openai/clip-vit-base-patch16` (an existing directory of
            that name wins).
        key: the configuration key, for messages.
        revision: branch, tag or commit of a hub id.
        what: of which kind the model is, for messages.
        companions: see `hub_folder`.

    Raises:
        MissingError: no such directory, or the hub cannot be reached.
        ArtefactError, StorageError: see `hub_folder`.
    """
    from moduseg.weights.sources import find_weights

    text = os.path.expandvars(weights)
    if unset := re.search(r"\$\{?(\w+)", text):
        raise MissingError(
            f"{key}: got {weights!r}, but the environment variable {unset[1]} is not set; set it to the "
            f"directory of a {what}, or give it: {key}=<directory>"
        )
    if HUB_ID.fullmatch(text) and not text.startswith("miniature/") and not Path(text).exists():
        return hub_folder(text, revision, key, what, companions)
    folder = find_weights(text, key)
    if not _is_whole(folder):
        raise MissingError(
            f"{key}: {folder} holds no config.json with model.safetensors or pytorch_model.bin (all parts of it); "
            f"set {key}=<directory of a {what} as save_pretrained writes it>"
        )
    return folder


def hub_folder(
    hub_id: str, revision: str | None, key: str, what: str = "model", companions: Sequence[str] = ()
) -> Path:
    """The directory of a transformers repository: configuration, preprocessor, tokenizer, weights.

    Args:
        hub_id: `<owner>/<name>`.
        revision: branch, tag or commit; `None` is `main`. What is here is not compared with the hub again.
        key: the configuration key, for messages.
        what: of which kind the model is, for messages.
        companions: files of which at least one has to be there as well (a tokenizer's).

    Raises:
        MissingError: not here, and offline or not to be had.
        ArtefactError: another digest than the hub announced; the file is removed.
        StorageError: the files cannot be written.
    """
    own = hub_place(hub_id, revision)
    if _is_whole(own):
        return own
    cached = _cached(hub_id, "config.json", revision)
    if (
        cached is not None
        and _is_whole(cached.parent)
        and (not companions or any((cached.parent / name).is_file() for name in companions))
    ):
        return cached.parent

    def get(files: set[str]) -> Path:
        from huggingface_hub import snapshot_download

        for name in WEIGHTS:
            if name in files:
                wanted = [name]
                break
            if name + INDEX in files:
                stem, suffix = name.rsplit(".", 1)
                wanted = [name + INDEX, f"{stem}-*.{suffix}"]
                break
        else:
            raise FileNotFoundError(f"the repository has no {' or '.join(WEIGHTS)}")
        # Weights come last, so that a directory that has them is complete.
        for patterns in (list(SMALL_FILES), wanted):
            snapshot_download(
                hub_id, revision=revision, local_dir=own, cache_dir=_bookkeeping(), allow_patterns=patterns
            )
        return own

    option = f" --revision {revision}" if revision else ""
    fetching = (
        "config.json, preprocessor_config.json, the tokenizer's files (vocab.json, merges.txt) where there are any and "
        f"model.safetensors (or pytorch_model.bin) from {page(hub_id, revision)}"
    )
    place = f"{own} (`hf download {hub_id}{option} --local-dir {own}` does it where there is a network)"
    name = f"hub id {hub_id!r}{f' at revision {revision}' if revision else ''}"

    def missing(reason: str) -> MissingError:
        return not_here(key, name, f"its {what}", reason, fetching, place, "<directory with these files>")

    _fetch(hub_id, revision, own, get, missing, _is_whole)
    for file in weight_files(own):
        _check(own, file.name, key)
    return own


def hub_file(
    hub_id: str, names: Sequence[str], revision: str | None, key: str, value: str = "", otherwise: str = ""
) -> Path:
    """One file of a repository: the first of `names` that it has.

    Args:
        hub_id, revision, key: see `hub_folder`; the id of a data set begins with `datasets/`.
        names: file names, the preferred one first.
        value: what the configuration holds, for messages; the hub id where left out.
        otherwise: the value of `key` that names a local file, for messages.

    Raises:
        MissingError, ArtefactError, StorageError: see `hub_folder`.
    """
    own = hub_place(hub_id, revision)
    for name in names:
        if (own / name).is_file():
            return own / name
    for name in names:
        if (cached := _cached(hub_id, name, revision)) is not None:
            return cached

    def get(files: set[str]) -> Path:
        from huggingface_hub import hf_hub_download

        for name in names:
            if name in files:
                fetched = hf_hub_download(
                    hub_id.removeprefix(DATASETS),
                    name,
                    repo_type=_kind(hub_id),
                    revision=revision,
                    local_dir=own,
                    cache_dir=_bookkeeping(),
                )
                return Path(fetched)
        raise FileNotFoundError(f"the repository has no {' or '.join(names)}")

    def missing(reason: str) -> MissingError:
        fetching = f"{' or '.join(names)} from {page(hub_id, revision)}"
        what = f"{names[0]} of {hub_id}{f' at revision {revision}' if revision else ''}"
        return not_here(key, repr(value or hub_id), what, reason, fetching, own, otherwise or "<path of the file>")

    file = _fetch(hub_id, revision, own, get, missing, Path.is_file)
    _check(own, file.relative_to(own).as_posix(), key)
    return file


def hub_place(hub_id: str, revision: str | None) -> Path:
    """Where in the cache folder the files of a repository lie."""
    return home().joinpath("huggingface.co", *hub_id.split("/"), (revision or "main").replace("/", "--"))


def page(hub_id: str, revision: str | None = None) -> str:
    """The address of a repository, for people."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{hub_id}" + (f"/tree/{revision}" if revision else "")


def weight_files(folder: Path) -> list[Path]:
    """The files from which transformers takes a model's weights: safetensors first, one file before several.

    Empty where a part of several is not there.
    """
    for name in WEIGHTS:
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
    """sha256 over names and digests of models' files: configuration, tokenizer, and the weights that are loaded."""
    total = hashlib.sha256()
    for folder in folders:
        found = {path for pattern in SMALL_FILES for path in folder.glob(pattern)} | set(weight_files(folder))
        for path in sorted(found):
            total.update(f"{path.name}:{file_digest(path)}\n".encode())
    return total.hexdigest()


def first_line(error: BaseException) -> str:
    """What a library says, on one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _is_whole(folder: Path) -> bool:
    return (folder / "config.json").is_file() and bool(weight_files(folder))


def _cached(hub_id: str, name: str, revision: str | None) -> Path | None:
    """A file in the hub's own cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id.removeprefix(DATASETS), name, revision=revision, repo_type=_kind(hub_id))
    return Path(found) if isinstance(found, str) else None


def _kind(hub_id: str) -> str:
    return "dataset" if hub_id.startswith(DATASETS) else "model"


def _bookkeeping() -> Path:
    return home() / "huggingface.co" / ".cache"


def _fetch(
    hub_id: str,
    revision: str | None,
    own: Path,
    get: Callable[[set[str]], Path],
    missing: Callable[[str], MissingError],
    is_there: Callable[[Path], bool],
) -> Path:
    """What `get` fetches, given the repository's file names, or why it cannot be had."""
    from huggingface_hub import HfApi, errors

    if is_offline():
        raise missing("HF_HUB_OFFLINE forbids to fetch it")
    # The client's own base class of everything that goes wrong on the way (requests' or httpx's, by its version).
    transport = [
        c for c in errors.HfHubHTTPError.__mro__ if c.__module__.split(".")[0] in ("requests", "httpx", "httpx2")
    ]
    failures: tuple[type[BaseException], ...] = (
        errors.HfHubHTTPError,
        errors.HFValidationError,
        getattr(errors, "XetDownloadError", OSError),
        OSError,
        RuntimeError,  # of the transfer library of newer hub clients
        *transport,
    )
    with locked(own):
        try:
            # Unlike a download, this fails at once where there is no network.
            info = HfApi().repo_info(
                hub_id.removeprefix(DATASETS), repo_type=_kind(hub_id), revision=revision, timeout=TIMEOUT
            )
            found = get({file.rfilename for file in getattr(info, "siblings", None) or ()})
        except errors.GatedRepoError as error:
            raise missing(
                f"asks for its licence to be accepted: do so at {page(hub_id)}, then run `hf auth login` and try again"
            ) from error
        except failures as error:
            if isinstance(error, OSError) and error.errno in _STORAGE:
                raise storage_error(own, error) from error
            if "No space left" in str(error):  # the transfer library has no error numbers
                raise storage_error(own, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) from error
            raise missing(f"could not be fetched ({first_line(error)})") from error
    if not is_there(found):
        # The client returns what it finds where the hub does not answer.
        raise missing("could not be fetched in full")
    return found


def _check(folder: Path, name: str, key: str) -> None:
    """Compare a file that has just come with the sha256 that the hub announced for it.

    Raises:
        ArtefactError: another one; the file is removed.
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
