"""moduseg: weakly supervised semantic segmentation without training, by retrieval from a bank of features."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["ImagePrediction", "Segmenter", "Vocabulary", "__version__", "show_proposals"]

if TYPE_CHECKING:
    from moduseg.api import Segmenter
    from moduseg.result import ImagePrediction
    from moduseg.show import show_proposals
    from moduseg.vocabulary import Vocabulary

_HOMES = {
    "ImagePrediction": "moduseg.result",
    "Segmenter": "moduseg.api",
    "Vocabulary": "moduseg.vocabulary",
    "show_proposals": "moduseg.show",
}


def __getattr__(name: str) -> Any:
    # Deferred, so that `import moduseg` does not pay for torch.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'moduseg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
