"""Patch tokens on disk, so that a backbone sees an image once, however many steps of a run read its tokens.

Tokens are kept in half precision, and a step gets them rounded whether they were stored or not: a full, an empty and a
partial cache give the same bytes. On the CPU an image passes through the backbone alone, because the last bits of a
convolution depend on the images that share a pass.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from moduseg.allocator import trim_memory
from moduseg.backbones.base import Backbone
from moduseg.devices import Device
from moduseg.errors import ConfigError
from moduseg.files import FORMAT, digest_of, remove_leftovers, to_json_values, write_atomic
from moduseg.structures import TokenMap

SUFFIX = ".tokens"
"""Suffix of a stored map: a safetensors file of `tokens` `[h, w, C]` float16 and `grid` `[5]` int64 (stride, height and
width of the image, height and width of the input), and behind it the sha256 of these bytes."""
_DIGEST_BYTES = 32
_SCAN_EVERY = 64
"""Maps that ask for room between two looks at the folder, to which other processes write as well."""


class TokenStore:
    """A folder of token maps that is bounded in size; several processes may share it.

    A file that was not used since this process began makes room for a new one, the longest unused first. Without such
    a file a new map is not stored: removing what the next pass over the images reads would help nobody.

    Args:
        folder: of all token maps.
        max_bytes: of all files together; exceeded by what other processes wrote since the last look at the folder.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._start = time.time()
        self._num_bytes = self._num_unscanned = 0
        self._is_scanned = False
        self._unused: deque[tuple[float, int, Path]] = deque()
        self._lock = threading.Lock()

    def read(self, name: str) -> TokenMap | None:
        """Return a stored map, in float32 on the CPU; `None` if there is none, or a damaged one.

        Args:
            name: path of the file inside the folder, without suffix.
        """
        path = self._folder / (name + SUFFIX)
        try:
            content = path.read_bytes()
            os.utime(path)  # marks it as used
        except OSError:  # not stored, or removed by another process just now
            return None
        body, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
        if hashlib.sha256(body).digest() != digest:
            return None
        try:
            tensors = load(body)
            stride, *sizes = tensors["grid"].tolist()
            return TokenMap(tensors["tokens"].float(), stride, (sizes[0], sizes[1]), (sizes[2], sizes[3]))
        except (SafetensorError, KeyError, ValueError, IndexError):  # written by another version
            return None

    def write(self, name: str, token_map: TokenMap) -> None:
        """Store a map whose tokens are float16, unless there is no room for it.

        Raises:
            StorageError: it cannot be written.
        """
        grid = torch.tensor([token_map.stride, *token_map.image_size, *token_map.input_size])
        body = save({"tokens": token_map.tokens.cpu().contiguous(), "grid": grid})
        content = body + hashlib.sha256(body).digest()
        with self._lock:
            if self._make_room(len(content)):
                write_atomic(self._folder / (name + SUFFIX), content)
                self._num_bytes += len(content)

    def _make_room(self, num_bytes: int) -> bool:
        """Return whether so many bytes fit, after removing files that were not used since this process began."""
        if not self._is_scanned or self._num_unscanned >= _SCAN_EVERY:
            self._look()
        # A full folder is not looked at for every map that finds no room: there may be a hundred thousand files.
        self._num_unscanned += 1
        while self._num_bytes + num_bytes > self._max_bytes and self._unused:
            time_of_use, size, path = self._unused.popleft()
            try:
                if path.stat().st_mtime != time_of_use:  # another process has read it meanwhile
                    continue
            except OSError:  # another process has removed it
                self._num_bytes -= size
                continue
            path.unlink(missing_ok=True)
            self._num_bytes -= size
        return self._num_bytes + num_bytes <= self._max_bytes

    def _look(self) -> None:
        """Note how many bytes the folder holds, and which files were not used since this process began."""
        if not self._is_scanned:
            # Nobody else knows of what a killed process was writing, and the bound does not count it.
            remove_leftovers(self._folder)
        files = self._scan()
        self._num_bytes = sum(size for _, size, _ in files)
        self._unused = deque(file for file in files if file[0] < self._start)
        self._num_unscanned, self._is_scanned = 0, True

    def _scan(self) -> list[tuple[float, int, Path]]:
        """Return time of the last use, size and path of each file, the longest unused first."""
        files = []
        for path in self._folder.rglob(f"*{SUFFIX}"):
            try:
                stat = path.stat()
            except OSError:  # removed by another process
                continue
            files.append((stat.st_mtime, stat.st_size, path))
        return sorted(files)


class CachedBackbone(Backbone):
    """A backbone whose tokens are rounded to half precision and stored.

    Args:
        backbone: gives the tokens of images that are not stored.
        store: where they are kept.
        settings: the configuration of `backbone`, which with its digest and the device decides the tokens.
        device: of the backbone.
    """

    def __init__(self, backbone: Backbone, store: TokenStore, settings: Mapping[str, Any], device: Device) -> None:
        self._backbone, self._store, self._settings, self._device = backbone, store, settings, device

    @property
    def digest(self) -> str:
        """Digest of the weights, as that of the backbone itself."""
        return self._backbone.digest

    @property
    def dim(self) -> int:
        """Channels `C` of a token."""
        return self._backbone.dim

    def tokens(self, images: Sequence[np.ndarray]) -> list[TokenMap]:
        """Return the patch tokens of images, as `Backbone.tokens`, rounded to half precision.

        Raises:
            DataError: an array that is not `[H, W, 3]` uint8 with at least one pixel.
            ConfigError: tokens beyond the range of half precision.
        """
        names = [f"{self._folder_name}/{_digest_image(image)}" for image in images]
        read = {index: self._store.read(name) for index, name in enumerate(names)}
        stored = {index: token_map for index, token_map in read.items() if token_map is not None}
        maps = dict(zip(stored, move_tokens(list(stored.values()), self._device.torch_device), strict=True))
        missing = [index for index in range(len(images)) if index not in maps]
        for group in [[index] for index in missing] if self._passes_alone else [missing] * bool(missing):
            passed = self._backbone.tokens([images[i] for i in group])
            rounded = [_replace_tokens(token_map, token_map.tokens.half()) for token_map in passed]
            for index, token_map in zip(group, move_tokens(rounded, torch.device("cpu")), strict=True):
                if not bool(token_map.tokens.isfinite().all()):
                    raise ConfigError(
                        f"runtime.token_cache: got tokens beyond {torch.finfo(torch.float16).max:.0f}, which half "
                        "precision does not hold; set runtime.token_cache=0 for this backbone"
                    )
                self._store.write(names[index], token_map)
            for index, token_map in zip(group, rounded, strict=True):
                maps[index] = _replace_tokens(token_map, token_map.tokens.float())
            if self._passes_alone:
                trim_memory()  # images of other sizes do not fit into the holes that this one leaves
        return [maps[index] for index in range(len(images))]

    @property
    def _passes_alone(self) -> bool:
        return self._device.torch_device.type == "cpu"

    @property
    def _folder_name(self) -> str:
        config = to_json_values(self._settings)
        parts = {"format": FORMAT, "config": config, "digest": self.digest, **self._device.key_parts()}
        return f"{self._settings['name']}-{digest_of(parts)[:16]}"


def move_tokens(maps: Sequence[TokenMap], device: torch.device) -> list[TokenMap]:
    """Return token maps on another device, moved by one copy: the host waits once for a batch, not for each image."""
    if all(token_map.tokens.device == device for token_map in maps):
        return list(maps)
    together = torch.cat([token_map.tokens.flatten() for token_map in maps]).to(device)
    parts = together.split([token_map.tokens.numel() for token_map in maps])
    return [
        _replace_tokens(token_map, part.view(token_map.tokens.shape))
        for token_map, part in zip(maps, parts, strict=True)
    ]


def _replace_tokens(token_map: TokenMap, tokens: torch.Tensor) -> TokenMap:
    return TokenMap(tokens, token_map.stride, token_map.image_size, token_map.input_size)


def _digest_image(image: np.ndarray) -> str:
    """Return a digest of an image's pixels and shape, hexadecimal; of anything that is no image, too."""
    digest = hashlib.sha256(f"{image.shape} {image.dtype}".encode())
    digest.update(np.ascontiguousarray(image).view(np.uint8).reshape(-1).data)
    return digest.hexdigest()
