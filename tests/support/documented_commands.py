"""The commands that the documentation shows, and what it says that they need."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_NEEDS = re.compile(r"\*Needs: .+\.\*")
"""The line above a block whose commands need what a test has not."""
_PAGE_NEEDS = re.compile(r"^\*Commands of this page need: .+\.\*$", re.MULTILINE)
_COMMAND = re.compile(r"(python|moduseg|make|pip|torchrun|export|hf|cd) ")
_CODE = re.compile(r"`([^`]+)`")
_INLINE = re.compile(r"`((?:python scripts/\w+\.py|make) [^`]+)`")


@dataclass(frozen=True)
class DocumentedCommand:
    """A command of a page.

    Attributes:
        page: the page.
        line: number of its first line.
        words: its parts as a shell reads them, without the comment.
        needs_more: whether the page says that it needs data, weights or time.
        is_inline: whether it stands in a sentence, not in a block.
    """

    page: Path
    line: int
    words: tuple[str, ...]
    needs_more: bool
    is_inline: bool = False

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}: {' '.join(self.words)}"

    @property
    def script(self) -> str | None:
        """The name of the script that it runs, `None` for other programs."""
        if self.words[0] == "moduseg":
            return self.words[1]
        is_script = self.words[0] == "python" and self.words[1].startswith("scripts/")
        return Path(self.words[1]).stem if is_script else None


def list_commands(page: Path) -> Iterator[DocumentedCommand]:
    """Yield the commands of a page's blocks, fenced or indented, then those in its sentences."""
    text = page.read_text(encoding="utf-8")
    page_needs = _PAGE_NEEDS.search(text) is not None
    for first_line, line_above, block in _list_blocks(text):
        needs_more = page_needs or _NEEDS.fullmatch(line_above) is not None
        # A backslash joins a line with the next one.
        joined = re.sub(r"\\\n\s*", lambda _: " \0", "\n".join(block))
        number = first_line
        for command in joined.split("\n"):
            if _COMMAND.match(command):
                yield DocumentedCommand(page, number, _split(command.replace("\0", "")), needs_more)
            number += 1 + command.count("\0")
    outside = re.sub(r"^```.*?^```$", lambda fenced: "\n" * fenced.group().count("\n"), text, flags=re.M | re.S)
    for match in _INLINE.finditer(outside):
        number = outside[: match.start()].count("\n") + 1
        yield DocumentedCommand(page, number, _split(match.group(1)), needs_more=True, is_inline=True)


def list_settings(page: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of every `key=value` in a page's sentences that is no part of a command.

    Those that a reader fills in (`<file>`, `...`) are left out.
    """
    lines, is_fenced = page.read_text(encoding="utf-8").splitlines(), False
    for number, line in enumerate(lines, start=1):
        is_fenced ^= line.startswith("```")
        if is_fenced or line.startswith("    "):
            continue
        for code in _CODE.findall(line):
            words = code.split()
            if all(re.search("=.", word) for word in words) and not re.search(r"[<>*:{]|\.\.\.", code):
                yield from ((number, word) for word in words)


def _split(command: str) -> tuple[str, ...]:
    """Return the words of a command; `<what a reader fills in>` and `[what may be left out]` are not divided."""
    kept = re.sub(r"<[^>]*>|\[[^]]*\]", lambda place: place.group().replace(" ", "\0"), command)
    return tuple(word.replace("\0", " ") for word in shlex.split(kept, comments=True))


def _list_blocks(text: str) -> Iterator[tuple[int, str, list[str]]]:
    """Yield the number of a block's first line, the last line of text above it, and its lines without indentation."""
    above, block, first_line, is_fenced = "", [], 0, False
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        is_fence = line.startswith("```")
        is_indented = line.startswith("    ") and not is_fenced and not is_fence
        if block and not is_indented and (is_fence or not is_fenced):
            yield first_line, above, block
            above, block = "", []
        is_fenced ^= is_fence
        if is_indented or (is_fenced and not is_fence):
            first_line = first_line if block else number
            block.append(line.strip())
        elif line.strip() and not is_fence:
            above = line.strip()
