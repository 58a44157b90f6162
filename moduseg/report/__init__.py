"""Pictures for people: overlays of labels, proposals and errors, and panels that put them side by side."""

from __future__ import annotations
