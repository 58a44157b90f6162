from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from moduseg.errors import ConfigError, DataError, MissingError
from moduseg.proposers import build, sa1b
from moduseg.proposers.ground_truth import GroundTruthProposer
from moduseg.structures import Proposals, Sample
from tests.proposers.contract import CPU, ProposerContract, sample


def write(folder: Path, samples: Sequence[Sample]) -> None:
    for picture in samples:
        path = folder / f"{picture.id}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sa1b.dump(sa1b.to_annotations(GroundTruthProposer().propose(picture), picture.id)))


class TestFiles(ProposerContract):
    def config(self, folder: Path, samples: Sequence[Sample]) -> dict[str, object]:
        write(folder, samples)
        return {"name": "files", "folder": str(folder)}


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"no such folder; set proposer\.folder"):
        build({"name": "files", "folder": str(tmp_path / "none")}, CPU)


def test_pattern_needs_the_id(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pattern"):
        build({"name": "files", "folder": str(tmp_path), "pattern": "all.json"}, CPU)


def test_pattern_is_used(tmp_path: Path) -> None:
    write(tmp_path, [sample(20, 30, "masks/b")])
    proposer = build({"name": "files", "folder": str(tmp_path), "pattern": "masks/{id}.json"}, CPU)
    assert len(proposer.propose(sample(20, 30, "b"))) == 3


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (sample(20, 30, "absent"), "no proposal file for image 'absent'"),
        (sample(30, 20, "a"), "masks are 20 x 30 .* the image is 30 x 20"),
    ],
)
def test_bad_image(tmp_path: Path, picture: Sample, message: str) -> None:
    write(tmp_path, [sample(20, 30, "a")])
    with pytest.raises(DataError, match=message):
        build({"name": "files", "folder": str(tmp_path)}, CPU).propose(picture)


def test_masks_without_a_pixel_are_left_out(tmp_path: Path) -> None:
    masks = torch.zeros(3, 20, 30, dtype=torch.bool)
    masks[1, 2:5, 3:9] = True
    stored = Proposals(masks, torch.tensor([0.1, 0.2, 0.3]))
    (tmp_path / "a.json").write_bytes(sa1b.dump(sa1b.to_annotations(stored, "a")))
    proposals = build({"name": "files", "folder": str(tmp_path)}, CPU).propose(sample(20, 30, "a"))
    assert torch.equal(proposals.masks, masks[1:2])
    assert torch.equal(proposals.predicted_iou, torch.tensor([0.2]))


def test_digest_follows_the_files(tmp_path: Path) -> None:
    write(tmp_path, [sample(20, 30, "a")])
    proposer = build({"name": "files", "folder": str(tmp_path)}, CPU)
    before = proposer.digest
    (tmp_path / "notes.txt").write_text("not a proposal")
    assert proposer.digest == before
    write(tmp_path, [sample(20, 30, "sub/b")])
    assert proposer.digest != before
