"""A bank's files may come from anybody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moduseg.bank.store import Bank
from moduseg.errors import ArtefactError

BANK = Bank(
    torch.arange(12, dtype=torch.float32).view(4, 3),
    torch.tensor([0, 1, 2, 1]),
    torch.tensor([0, 0, 1, 1]),
    torch.tensor([9, 8, 7, 6]),
    ("a", "b/c"),
    ("background", "disc", "square"),
    {"backbone_digest": "d", "config": {}},
)


def test_a_bank_reads_back(tmp_path: Path) -> None:
    BANK.save(tmp_path)
    bank = Bank.load(tmp_path)
    assert torch.equal(bank.pooled, BANK.pooled)
    assert (bank.image_ids, bank.classes) == (BANK.image_ids, BANK.classes)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        pytest.param("pooled", BANK.pooled.sqrt().neg().sqrt(), "4 vectors hold NaN or infinity.*row 0", id="NaN"),
        pytest.param("pooled", BANK.pooled / BANK.pooled, "1 vectors hold NaN or infinity.*row 0", id="one NaN"),
        pytest.param("pooled", 1 / BANK.pooled, "1 vectors hold NaN or infinity.*row 0", id="infinity"),
        pytest.param("pooled", BANK.pooled.double(), "pooled is torch.float64, expected torch.float32", id="float64"),
        pytest.param("labels", BANK.labels.float(), "labels is torch.float32, expected torch.int64", id="float labels"),
    ],
)
def test_tensors_that_no_bank_holds(tmp_path: Path, name: str, tensor: torch.Tensor, message: str) -> None:
    BANK.save(tmp_path)
    save_file({**load_file(tmp_path / "bank.safetensors"), name: tensor}, tmp_path / "bank.safetensors")
    with pytest.raises(ArtefactError, match=message) as caught:
        Bank.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [1, None, ["a"]])
@pytest.mark.parametrize("key", ["classes", "image_ids"])
def test_names_that_are_no_text(tmp_path: Path, key: str, value: Any) -> None:
    BANK.save(tmp_path)
    info = json.loads((tmp_path / "bank.json").read_text())
    info[key][-1] = value
    (tmp_path / "bank.json").write_text(json.dumps(info))
    with pytest.raises(ArtefactError, match="have to be text"):
        Bank.load(tmp_path)
