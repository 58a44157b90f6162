"""An object whose pickle runs code when it is read."""

from __future__ import annotations


class Bomb:
    """Unpickled without care, it writes the file `exploded` into the current folder."""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (open, ("exploded", "w"))
