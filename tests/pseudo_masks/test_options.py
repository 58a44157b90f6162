"""Settings of generators: shared ones are inherited, each generator takes its own and no other's."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from moduseg.backbones.clip_attention import Branches
from moduseg.errors import ConfigError
from moduseg.pseudo_masks import build
from moduseg.pseudo_masks.clip_dense import ClipDenseOptions
from moduseg.pseudo_masks.clip_words import ClipWordsOptions
from moduseg.pseudo_masks.corrclip import CorrClipOptions
from tests.pseudo_masks.contract import CLASSES
from tests.pseudo_masks.test_given_masks import CPU, no_backbone


@pytest.mark.parametrize(("name", "key"), [
    pytest.param("cam", "neighbours", id="cam asks no neighbours"),
    pytest.param("cam_neighbours", "region_scores", id="neighbours always score regions"),
    pytest.param("cam_neighbours", "scale", id="neighbours have one scale"),
    pytest.param("clip_dense", "activation", id="a generator's CLIP says its activation itself"),
    pytest.param("clip_dense", "affinity", id="only corrclip has an affinity"),
    pytest.param("corrclip", "gaussian_std", id="only clip_dense has naclip"),
    pytest.param("fusion", "device", id="what the program supplies is no key"),
])  # fmt: skip
def test_keys_of_other_generators_are_unknown(name: str, key: str) -> None:
    cfg: dict[str, Any] = {"name": name, key: 1}
    with pytest.raises(ConfigError, match=rf"pseudo_masks\.generator\.{key}: unknown key"):
        build(cfg, CPU, no_backbone, CLASSES)


@pytest.mark.parametrize("options", [ClipDenseOptions, CorrClipOptions])
def test_generators_that_compare_words_share_their_settings(options: type[ClipWordsOptions]) -> None:
    shared = {f.name: f.default for f in fields(ClipWordsOptions) if f.name != "batch_size"}
    assert shared.items() <= {f.name: f.default for f in fields(options)}.items()


def test_corrclip_checks_all_it_inherits() -> None:
    assert issubclass(CorrClipOptions, Branches)
    for wrong in ({"temperature": 0.0}, {"logit_scale": 0.0}, {"weights": ""}, {"min_area": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: got"):
            CorrClipOptions(**wrong)  # type: ignore[arg-type]
