"""Forward batches: how many images are processed at once, and what an error of theirs means.

An error may be an image's own, a lack of memory, or the end of the device. The first costs that image, the second makes
forward batches smaller, the third ends the run: recorded as failures, it would leave a result of the few images before.
"""

from __future__ import annotations

import errno
import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import cv2
import torch

from moduseg.errors import ArtefactError, ConfigError, DataError, DeviceError, MissingError, StorageError

log = logging.getLogger("moduseg")

FATAL = (StorageError, ConfigError, MissingError, ArtefactError, DeviceError)
"""Errors that the next image would meet as well: they end the run instead of being recorded."""
MAX_FAILURES_IN_ROW = 3
"""So many images in a row that fail otherwise than by an error about themselves end the run."""
_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED", "bad_alloc")
_DEVICE_LOST = ("CUDA error", "CUDA driver error", "HIP error", "CUDNN_STATUS_", "CUBLAS_STATUS_", "MPS backend")
"""How torch and its libraries begin to speak when a device no longer answers."""


@dataclass(frozen=True)
class _Problem:
    """An error of a forward batch, without the traceback, which would keep its tensors alive."""

    text: str
    is_out_of_memory: bool
    is_of_data: bool


class ForwardBatches:
    """Cuts lists of images into forward batches, smaller ones after an error.

    Args:
        title: of the stage, for messages.
        max_images: images that are processed at once; all of a list if `None`.

    Attributes:
        failed: error of each image of the last list that has no result, by id.
    """

    def __init__(self, title: str, max_images: int | None = None) -> None:
        self._title, self._max_images = title, max_images
        self._num_failed_in_row = 0
        self._problem: _Problem | None = None
        self.failed: dict[str, str] = {}

    def cut(self, ids: Sequence[str]) -> Iterator[list[str]]:
        """Yield the ids to process next, inside `catch`; those that failed together come again in smaller batches.

        Raises:
            DeviceError: image after image fails.
        """
        self.failed = {}
        max_images = self._max_images
        waiting, num_alone = list(ids), 0
        while waiting:
            size = 1 if num_alone else min(self._max_images or len(waiting), len(waiting))
            self._problem = None
            yield waiting[:size]
            if size > 1 and self._problem is not None:
                if self._problem.is_out_of_memory:
                    self._halve(size)
                else:
                    # An image of these is to blame: process them one by one to find it.
                    num_alone = size
                continue
            if size == 1 and self._problem is not None and self._problem.is_out_of_memory:
                # Not the number of images is to blame, but this one, which finds no memory even alone.
                self._max_images = max_images
            self._note(waiting[0])
            waiting, num_alone = waiting[size:], max(0, num_alone - size)

    @contextmanager
    def catch(self) -> Iterator[None]:
        """Note an error of the forward batch, unless it ends the run.

        Raises:
            DeviceError: the device is lost.
            StorageError, ConfigError, MissingError, ArtefactError: the run cannot go on.
        """
        try:
            yield
        except FATAL:
            raise
        except Exception as error:
            if is_device_lost(error):
                raise lost_device(self._title, error) from error
            self._problem = _Problem(describe(error), is_out_of_memory(error), isinstance(error, DataError))

    def _halve(self, size: int) -> None:
        self._max_images = size // 2
        log.warning("%s: no memory for %d images at once; going on with %d", self._title, size, self._max_images)
        _free_memory()

    def _note(self, image_id: str) -> None:
        """Record whether an image that was processed alone, or the batch that it begins, has failed."""
        problem = self._problem
        if problem is None:
            self._num_failed_in_row = 0
            return
        self.failed[image_id] = problem.text
        if problem.is_of_data:
            return
        if problem.is_out_of_memory:
            _free_memory()
        self._num_failed_in_row += 1
        if self._num_failed_in_row == MAX_FAILURES_IN_ROW:
            raise DeviceError(
                f"{self._title}: {MAX_FAILURES_IN_ROW} images in a row failed, the last one {image_id}: "
                f"{problem.text}; mend what they have in common (device, memory, model) and run the same command "
                "again, finished images are kept"
            )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory of the device or of the machine is used up."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, cv2.error):
        return error.code == cv2.Error.StsNoMem
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def is_device_lost(error: BaseException) -> bool:
    """Return whether an error says that the device no longer answers: no image after this one can succeed."""
    if is_out_of_memory(error):
        return False
    if isinstance(error, getattr(torch, "AcceleratorError", ())):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _DEVICE_LOST)


def lost_device(title: str, error: BaseException) -> DeviceError:
    """Return the error that ends a run whose device is lost."""
    return DeviceError(
        f"{title}: the device is lost ({describe(error)}); look after it (nvidia-smi, dmesg) and run the same command "
        "again, finished images are kept"
    )


def describe(error: BaseException) -> str:
    """Return one line: the message of the package's own errors, with the type before it for others."""
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, DataError) else f"{type(error).__name__}: {text}"


def _free_memory() -> None:
    """Give memory back that nothing holds any more, so that smaller batches find room."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
