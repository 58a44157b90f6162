"""moduseg: weakly supervised semantic segmentation without training, by retrieval from a bank of features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Segmenter", "Vocabulary", "__version__"]

if TYPE_CHECKING:
    from moduseg.api import Segmenter
    from moduseg.vocabulary import Vocabulary


def __getattr__(name: str) -> Any:
    # Deferred, so that `import moduseg` does not pay for torch.
    if name == "Segmenter":
        from moduseg.api import Segmenter

        return Segmenter
    if name == "Vocabulary":
        from moduseg.vocabulary import Vocabulary

        return Vocabulary
    raise AttributeError(f"module 'moduseg' has no attribute {name!r}")
