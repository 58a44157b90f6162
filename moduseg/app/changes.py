"""What a step changed in a picture: regions by class, pixels, and where."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from moduseg.result import Change, ImagePrediction


@dataclass(frozen=True)
class WhatChanged:
    """What is different after a step.

    Attributes:
        region: the region that was named; `None` if none was, or it is not in this picture.
        others: `(class before, class after, number)` of the other regions whose label changed, most first.
        share: of the picture's pixels, those of another class, in [0, 1].
        mask: these pixels, `[H, W]` bool.
    """

    region: Change | None = None
    others: tuple[tuple[str, str, int], ...] = ()
    share: float = 0.0
    mask: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), dtype=bool))

    @property
    def num_others(self) -> int:
        """How many other regions changed."""
        return sum(count for _, _, count in self.others)

    def describe(self) -> str:
        """Return it in words."""
        parts = []
        if self.region is not None:
            before, after = self.region.before, self.region.after
            parts.append(f"This region: {before} → {after}." if before != after else f"This region stays {after}.")
        named = ", ".join(f"{before} → {after}: {count}" for before, after, count in self.others)
        count = self.num_others
        if count:
            parts.append(f"{count} other region{'s' if count > 1 else ''} changed ({named}).")
        else:
            parts.append("No other region changed.")
        parts.append(f"{100 * self.share:.1f} % of the picture has another class.")
        return " ".join(parts)


def compare_predictions(before: ImagePrediction, after: ImagePrediction, proposal: int | None = None) -> WhatChanged:
    """Return what differs between two predictions of one picture.

    Args:
        before, after: their class lists may differ. Where one has more proposals, these are appended to the other's.
        proposal: the region that was named; `None` for none.
    """
    old = [before.classes[int(label)] for label in before.labels]
    new = [after.classes[int(label)] for label in after.labels]
    counts = Counter(
        (was, now) for i, (was, now) in enumerate(zip(old, new, strict=False)) if was != now and i != proposal
    )
    region = None
    if proposal is not None and proposal < min(len(old), len(new)):
        region = Change(proposal, old[proposal], new[proposal])
    # Ids of one class differ where the class lists do.
    names = {name: number for number, name in enumerate(dict.fromkeys([*before.classes, *after.classes]))}
    old_map, new_map = (
        np.array([names[name] for name in prediction.classes])[prediction.label_map] for prediction in (before, after)
    )
    mask = old_map != new_map
    others = tuple((was, now, count) for (was, now), count in sorted(counts.items(), key=lambda e: (-e[1], e[0])))
    return WhatChanged(region, others, float(mask.mean()), mask)
