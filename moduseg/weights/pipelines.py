"""Text-to-image models in a directory or a repository of the hub, a folder for each part, as diffusers has them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moduseg.errors import MissingError
from moduseg.files import file_digest
from moduseg.weights.download import missing_weights
from moduseg.weights.hub import (
    HUB_ID,
    INDEX,
    WEIGHTS,
    add_size,
    check_digest,
    find_in_hub_cache,
    find_size_on_hub,
    get_cached_folder,
    get_client_cache,
    get_page_url,
    list_weight_files,
    open_repository,
)
from moduseg.weights.sources import find_weights

DIFFUSERS_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
"""Names of the weight file of a part that diffusers loads, the preferred one first."""


@dataclass(frozen=True)
class PipelinePart:
    """What the folder of one part holds.

    Attributes:
        small_files: names of its files beside the weights, of which the first one or another of `alternatives` has to
            be there.
        alternatives: names that do in place of the first small file.
        weights: names that its weight file may have, the preferred one first; none for a part without weights.
    """

    small_files: tuple[str, ...]
    alternatives: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()

    def is_complete(self, folder: Path) -> bool:
        """Return whether a folder holds the part."""
        has_settings = any((folder / name).is_file() for name in (self.small_files[0], *self.alternatives))
        return has_settings and (not self.weights or bool(list_weight_files(folder, self.weights)))

    def list_files(self, folder: Path) -> list[Path]:
        """Return the files of the part that are there and decide what it computes, in order of name."""
        files = [folder / name for name in self.small_files if (folder / name).is_file()]
        return sorted([*files, *(list_weight_files(folder, self.weights) if self.weights else ())])


PARTS: dict[str, PipelinePart] = {
    "scheduler": PipelinePart(("scheduler_config.json",)),
    "text_encoder": PipelinePart(("config.json",), weights=WEIGHTS),
    "tokenizer": PipelinePart(
        ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        ("tokenizer.json",),
    ),
    "unet": PipelinePart(("config.json",), weights=DIFFUSERS_WEIGHTS),
    "vae": PipelinePart(("config.json",), weights=DIFFUSERS_WEIGHTS),
}
"""The parts of a pipeline of Stable Diffusion that this package reads, by the folder's name."""


def find_pipeline_folder(weights: str, key: str, revision: str | None = None) -> Path:
    """Return the directory that a configuration's `weights` names, with every part of a text-to-image model in it.

    Args:
        weights: a directory as `StableDiffusionPipeline.save_pretrained` writes it (`~` and `$VARIABLE` are expanded),
            `miniature/<name>` for one that the package carries, or a hub id such as
            `stable-diffusion-v1-5/stable-diffusion-v1-5` (an existing directory of that name wins).
        key: the configuration key, for messages.
        revision: branch, tag or commit of a hub id.

    Raises:
        MissingError: no such directory, or one without a part, or the hub cannot be reached.
        ArtefactError: the hub announced another digest, or a list of weight files is damaged.
        StorageError: fetched files cannot be written.
    """
    text = os.path.expandvars(weights)
    if unset := re.search(r"\$\{?(\w+)", text):
        raise MissingError(
            f"{key}: got {weights!r}, but the environment variable {unset[1]} is not set; set it to the directory of "
            f"a text-to-image model, or give it: {key}=<directory>"
        )
    if HUB_ID.fullmatch(text) and not text.startswith("miniature/") and not Path(text).exists():
        return fetch_pipeline_folder(text, revision, key)
    folder = find_weights(text, key)
    if missing := list_missing_parts(folder):
        raise MissingError(
            f"{key}: {folder} holds no {', '.join(missing)} (configuration, and weights where there are any); set "
            f"{key}=<directory of a text-to-image model as diffusers' save_pretrained writes it>"
        )
    return folder


def list_missing_parts(folder: Path) -> list[str]:
    """Return the names of the parts that a directory lacks."""
    return [name for name, part in PARTS.items() if not part.is_complete(folder / name)]


def fetch_pipeline_folder(hub_id: str, revision: str | None, key: str) -> Path:
    """Return the directory of a repository in the layout of diffusers, fetched into the cache folder if need be.

    Args:
        hub_id: `<owner>/<name>`.
        revision: branch, tag or commit; `None` is `main`. Files on this machine are not compared with the hub again.
        key: the configuration key, for messages.

    Raises:
        MissingError, ArtefactError, StorageError: as `moduseg.weights.hub.fetch_hub_folder` does.
    """
    target = get_cached_folder(hub_id, revision)
    if not list_missing_parts(target):
        return target
    config = find_in_hub_cache(hub_id, "unet/config.json", revision)
    if config is not None and not list_missing_parts(config.parents[1]):
        return config.parents[1]
    option = f" --revision {revision}" if revision else ""
    missing = partial(
        missing_weights,
        key=key,
        got=f"hub id {hub_id!r}{f' at revision {revision}' if revision else ''}",
        what="its text-to-image model",
        source=f"the folders {', '.join(PARTS)} (diffusion_pytorch_model.safetensors of unet and vae, "
        f"model.safetensors of text_encoder) from {get_page_url(hub_id, revision)}",
        folder=f"{target} (`hf download {hub_id}{option} --local-dir {target}` does it where there is a network)",
        otherwise="<directory with these folders>",
    )
    find_size = partial(find_size_on_hub, hub_id, revision, choose_files)
    with open_repository(hub_id, revision, target, partial(add_size, missing, find_size)) as names:
        weights = _fetch_parts(hub_id, revision, target, names)
    if list_missing_parts(target):
        # The client returns without an error if the hub stops answering.
        raise missing("could not be fetched in full")
    for name in weights:
        check_digest(target, name, key)
    return target


def choose_files(names: Collection[str]) -> list[str]:
    """Return the files of all parts among those of a repository; weights come last, and are absent if it has none."""
    small_files = [f"{folder}/{name}" for folder, part in PARTS.items() for name in part.small_files]
    return [*(name for name in small_files if name in names), *_choose_weights(names)]


def _choose_weights(names: Collection[str]) -> list[str]:
    """Return the weight files of all parts among the files of a repository."""
    weights: list[str] = []
    for folder, part in PARTS.items():
        for name in (f"{folder}/{weight_file}" for weight_file in part.weights):
            if name in names:
                weights.append(name)
                break
            if name + INDEX in names:
                stem, suffix = name.rsplit(".", 1)
                shards = (n for n in names if re.fullmatch(rf"{re.escape(stem)}-\d+-of-\d+\.{suffix}", n))
                weights += [name + INDEX, *sorted(shards)]
                break
    return weights


def _fetch_parts(hub_id: str, revision: str | None, target: Path, names: Collection[str]) -> list[str]:
    """Fetch the parts into `target` and return the weight files; `names` are the repository's files."""
    from huggingface_hub import snapshot_download

    weights = _choose_weights(names)
    for folder, part in PARTS.items():
        if part.weights and not any(name.startswith(f"{folder}/") for name in weights):
            raise FileNotFoundError(f"the repository has no {' or '.join(f'{folder}/{name}' for name in part.weights)}")
    small_files = [name for name in choose_files(names) if name not in weights]
    # Weights come last, so that a directory that has them is complete.
    for patterns in (small_files, weights):
        snapshot_download(
            hub_id, revision=revision, local_dir=target, cache_dir=get_client_cache(), allow_patterns=patterns
        )
    return weights


def pipeline_digest(folder: Path, names: tuple[str, ...] = tuple(PARTS)) -> str:
    """Return the sha256 over names and digests of the files of a model's parts that decide what it computes."""
    total = hashlib.sha256()
    for name in names:
        for file in PARTS[name].list_files(folder / name):
            total.update(f"{name}/{file.name}:{file_digest(file)}\n".encode())
    return total.hexdigest()
