"""Fixtures of the tests of pseudo-mask generators."""

from __future__ import annotations

from pathlib import Path

import pytest

from moduseg.miniature.models.clip import build_tokenizer


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, int]:
    """The folder of the miniature's tokenizer, the number of its tokens and the id of the last one."""
    folder = tmp_path_factory.mktemp("words")
    tokenizer = build_tokenizer(folder)
    return folder, len(tokenizer), int(tokenizer.eos_token_id)
