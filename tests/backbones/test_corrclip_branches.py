"""CorrCLIP's scope, branches and regions on a random two-block CLIP, against what each must be equal to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moduseg.backbones.clip import make_resampling_weights
from moduseg.backbones.clip_attention import (
    Affinity,
    Branches,
    compute_scope_attention,
    cosine_similarity,
    encode_patches,
    encode_regions,
    find_region_members,
    mix_values,
    run_blocks,
    run_last_block,
    sum_branches,
)
from moduseg.backbones.regions import merge_regions, sample_regions
from moduseg.errors import ConfigError
from moduseg.masks.id_maps import make_id_map
from moduseg.structures import Proposals
from tests.backbones.test_clip_attention import GRID, make_clip

COUNT = GRID[0] * GRID[1]
Clip = Any


@pytest.fixture
def clip(device: torch.device) -> Clip:
    return make_clip(device)


@pytest.fixture
def pixels(device: torch.device) -> torch.Tensor:
    return torch.randn(2, 3, 4 * GRID[0], 4 * GRID[1], generator=torch.Generator().manual_seed(1)).to(device)


def tokens(device: torch.device, seed: int = 3) -> torch.Tensor:
    return torch.randn(2, *GRID, 6, generator=torch.Generator().manual_seed(seed)).to(device)


def blocks(device: torch.device) -> torch.Tensor:
    """Two images: four regions, one of them of one patch, and patches of no region; no region at all."""
    ids = torch.full((2, *GRID), -1, dtype=torch.int64)
    ids[0, :2], ids[0, 2:4, :3], ids[0, 2:4, 3:6], ids[0, 4, 6] = 0, 1, 2, 3
    return ids.flatten(1).to(device)


def affinity(device: torch.device, regions: torch.Tensor | None = None, **branches: Any) -> Affinity:
    regions = blocks(device) if regions is None else regions
    return Affinity(cosine_similarity(tokens(device)), regions=regions, branches=Branches(**branches))


# Scope and value


def test_attention_stays_inside_regions(device: torch.device) -> None:
    scope = affinity(device)
    weights, regions = compute_scope_attention(scope), blocks(device)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, COUNT, device=device))
    here, there = regions[0, :, None], regions[0, None]
    assert (weights[0][(here >= 0) & (there >= 0) & (here != there)] == 0).all()
    assert (weights[0][(here >= 0) & (here == there)] > 0).all()
    alone = int((regions[0] == 3).nonzero())
    is_similar = scope.similarity[0] > scope.similarity[0].mean()
    has_free_patch = (here < 0) | (there < 0)
    has_free_patch &= ~torch.eye(COUNT, dtype=torch.bool, device=device)
    assert torch.equal((weights[0] > 0)[has_free_patch], is_similar[has_free_patch])
    assert weights[0, alone, alone] > 0


def test_attention_by_a_plain_loop(device: torch.device) -> None:
    scope = affinity(device, temperature=2.5)
    weights, regions = compute_scope_attention(scope), blocks(device)
    for image in range(2):
        similarity, ids = scope.similarity[image], regions[image].tolist()
        mean = similarity.mean()
        for row in range(0, COUNT, 4):
            values = []
            for column in range(COUNT):
                if ids[row] < 0 or ids[column] < 0:
                    seen = bool(similarity[row, column] > mean) or row == column
                else:
                    seen = ids[row] == ids[column]
                values.append(torch.exp(2.5 * similarity[row, column]) if seen else torch.zeros((), device=device))
            expected = torch.stack(values)
            torch.testing.assert_close(weights[image, row], expected / expected.sum())


def test_one_region_is_plain_softmax(device: torch.device) -> None:
    scope = affinity(device, torch.zeros(2, COUNT, dtype=torch.int64, device=device))
    torch.testing.assert_close(compute_scope_attention(scope), (4 * scope.similarity).softmax(-1))


def test_a_patch_like_no_other_sees_itself(device: torch.device) -> None:
    """Similarities all below the mean, its own among them."""
    similarity = torch.full((1, 4, 4), 0.9, device=device)
    similarity[0, 0] = similarity[0, :, 0] = -0.5
    weights = compute_scope_attention(Affinity(similarity, regions=torch.full((1, 4), -1, device=device)))
    assert weights[0, 0].tolist() == [1.0, 0.0, 0.0, 0.0]
    equal = compute_scope_attention(
        Affinity(torch.ones(1, 4, 4, device=device), regions=torch.full((1, 4), -1, device=device))
    )
    assert torch.equal(equal[0], torch.eye(4, device=device))


def test_permuted_ids_change_nothing(clip: Clip, pixels: torch.Tensor, device: torch.device) -> None:
    regions = blocks(device)
    permuted = torch.tensor([2, 7, 0, 1, -1], device=device)[regions]
    first = encode_patches(clip, pixels, "corrclip", affinity(device))
    second = encode_patches(clip, pixels, "corrclip", affinity(device, permuted))
    torch.testing.assert_close(first, second)


# Branches


def test_main_branch_is_the_last_block_under_that_attention(
    clip: Clip, pixels: torch.Tensor, device: torch.device
) -> None:
    scope = affinity(device, spatial=0.0, semantic=0.0)
    hidden = run_blocks(clip, pixels)[-1]
    layer = clip.vision_model.encoder.layers[-1]
    main = mix_values(layer, hidden, GRID, compute_scope_attention(scope))
    torch.testing.assert_close(run_last_block(clip, hidden, GRID, "corrclip", scope), main)
    torch.testing.assert_close(
        encode_patches(clip, pixels, "corrclip", scope), clip.visual_projection(clip.vision_model.post_layernorm(main))
    )


def test_features_are_the_weighted_sum_of_the_branches(clip: Clip, pixels: torch.Tensor, device: torch.device) -> None:
    states = run_blocks(clip, pixels)

    def features(spatial: float, semantic: float) -> torch.Tensor:
        return sum_branches(clip, states, GRID, affinity(device, spatial=spatial, semantic=semantic))

    main = features(0, 0)
    spatial, semantic = features(1, 0) - main, features(0, 1) - main
    torch.testing.assert_close(features(1.0, 0.5), main + spatial + 0.5 * semantic, atol=1e-5, rtol=1e-5)
    # Two blocks: the spatial branch has the first one's output, which is what enters the last.
    torch.testing.assert_close(spatial, main, atol=1e-5, rtol=1e-5)
    slots, members = find_region_members(affinity(device), GRID)
    copies = clip.vision_model.post_layernorm(encode_regions(clip, states, members))
    for image in range(2):
        for patch in range(0, COUNT, 5):
            expected = copies[image, slots[image, patch]]
            torch.testing.assert_close(semantic[image].flatten(0, 1)[patch], expected, atol=1e-5, rtol=1e-5)


def test_copies_in_one_sequence_with_the_others(clip: Clip, pixels: torch.Tensor, device: torch.device) -> None:
    """Copies, class token and patches run together under one mask: same copies, and patches that never noticed."""
    states = run_blocks(clip, pixels)
    _, members = find_region_members(affinity(device), GRID)
    ours = encode_regions(clip, states, members)
    copies = members.shape[1]
    seen = torch.zeros(2, copies + 1 + COUNT, copies + 1 + COUNT, dtype=torch.bool, device=device)
    seen[:, copies:, copies:] = True
    seen[:, :copies, copies] = True
    seen[:, :copies, copies + 1 :] = members
    sequence = torch.cat([states[0][:, :1].expand(-1, copies, -1), states[0]], dim=1)
    for index, layer in enumerate(clip.vision_model.encoder.layers):
        torch.testing.assert_close(sequence[:, copies:], states[index])
        module, normed = layer.self_attn, layer.layer_norm1(sequence)
        heads = [p(normed).unflatten(2, (4, 8)).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj)]
        logits = (heads[0] @ heads[1].mT * 8**-0.5).masked_fill(~seen[:, None], float("-inf"))
        sequence = sequence + module.out_proj((logits.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2))
        sequence = sequence + layer.mlp(layer.layer_norm2(sequence))
    torch.testing.assert_close(ours, sequence[:, :copies], atol=1e-5, rtol=1e-4)


def test_a_region_of_everything_is_the_class_token_itself(
    clip: Clip, pixels: torch.Tensor, device: torch.device
) -> None:
    members = torch.ones(2, 1, COUNT, dtype=torch.bool, device=device)
    class_token = clip.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state[:, :1]
    torch.testing.assert_close(
        encode_regions(clip, run_blocks(clip, pixels), members), class_token, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("kind", ["none", "whole", "one patch each", "as given"])
def test_regions_of_every_kind(kind: str, clip: Clip, pixels: torch.Tensor, device: torch.device) -> None:
    regions = {
        "none": torch.full((2, COUNT), -1, device=device),
        "whole": torch.zeros(2, COUNT, dtype=torch.int64, device=device),
        "one patch each": torch.arange(COUNT, device=device).expand(2, -1),
        "as given": blocks(device),
    }[kind]
    features = encode_patches(clip, pixels, "corrclip", affinity(device, regions))
    assert features.shape == (2, *GRID, 24)
    assert features.isfinite().all()


def test_members_on_another_grid(device: torch.device) -> None:
    """Twice as fine: a region of one small patch has the large one it lies in, the others those they are nearest to."""
    rows, columns = (make_resampling_weights(2 * n, 2.0, n, 4.0, device) for n in (2, 3))
    fine = torch.zeros(1, 4, 6, dtype=torch.int64, device=device)
    fine[0, :, 4:], fine[0, 3, 1], fine[0, 0, 0] = 1, 2, -1
    coarse = torch.tensor([[0, 0, 1, 0, 0, 1]], device=device)
    scope = Affinity(torch.ones(1, 24, 24), rows, columns, regions=fine.flatten(1), patch_regions=coarse)
    slots, members = find_region_members(scope, (2, 3))
    assert torch.equal(slots, fine.flatten(1) + 1)
    expected = [[1, 0, 0, 0, 0, 0], [1, 1, 0, 1, 1, 0], [0, 0, 1, 0, 0, 1], [0, 0, 0, 1, 0, 0]]
    assert members[0].int().tolist() == expected


@pytest.mark.parametrize(("depth", "expected"), [(12, (5, 9)), (24, (10, 21)), (32, (2, 29)), (6, (2, 3)), (2, (0, 0))])
def test_spatial_blocks_follow_the_depth(depth: int, expected: tuple[int, int]) -> None:
    assert Branches().blocks(depth) == expected


def test_mistakes(clip: Clip, pixels: torch.Tensor, device: torch.device) -> None:
    with pytest.raises(ConfigError, match=r"spatial_blocks: got \[5, 9\], expected blocks 0\.\.0 of an encoder of 2"):
        encode_patches(clip, pixels, "corrclip", affinity(device, spatial_blocks=(5, 9)))
    with pytest.raises(ValueError, match=r"regions: got None, expected \(2, 35\)"):
        encode_patches(clip, pixels, "corrclip", Affinity(cosine_similarity(tokens(device))))
    with pytest.raises(ValueError, match="need an affinity"):
        encode_patches(clip, pixels, "corrclip")
    for wrong in ({"temperature": 0.0}, {"spatial": -1.0}, {"semantic": -0.5}, {"spatial_blocks": (3, 2)}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: got"):
            Branches(**wrong)  # type: ignore[arg-type]


# Regions


def test_who_has_a_pixel(device: torch.device) -> None:
    masks = torch.tensor([[[1, 1, 1, 1, 0]], [[0, 1, 1, 0, 0]], [[0, 0, 1, 1, 0]]], device=device).bool()
    proposals = Proposals(masks, torch.tensor([0.8, 0.6, 0.9], device=device))
    assert make_id_map(proposals).tolist() == [[0, 0, 2, 2, -1]]
    assert make_id_map(proposals, "area").tolist() == [[0, 1, 1, 2, -1]]
    assert make_id_map(proposals, "largest").tolist() == [[0, 0, 0, 0, -1]]
    assert make_id_map(proposals.select(torch.tensor([1, 2], device=device)), "largest").tolist() == [[-1, 0, 1, 1, -1]]
    assert make_id_map(proposals.select(torch.zeros(3, dtype=torch.bool, device=device))).tolist() == [[-1] * 5]


def test_regions_of_patches_are_those_of_their_centres(device: torch.device) -> None:
    ids = torch.arange(7 * 10, device=device).view(7, 10)
    grid = sample_regions(ids, (2, 3), 4, (7, 10))
    assert grid.tolist() == [[22, 26, 29], [62, 66, 69]]
    # A model that saw the image at twice the size.
    assert torch.equal(sample_regions(ids, (2, 3), 8, (14, 20)), grid)
    assert torch.equal(sample_regions(ids, (7, 10), 1, (7, 10)), ids)


def test_merging(device: torch.device) -> None:
    """Regions 0 and 5 point the same way, 3 elsewhere, 2 is chained to neither; 1 and 4 are not there."""
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.7, 0.7], [1.0, 0.05]], device=device)
    grid = torch.tensor([[0, 0, 3], [2, 5, -1]], device=device)
    of = torch.tensor([[0, 0, 1], [2, 3, 1]], device=device)
    table = merge_regions(directions[of], grid, 6, 0.2)
    assert table[torch.tensor([1, 4, -1])].tolist() == [-1, -1, -1]
    assert table[0] == table[5]
    assert len({int(table[i]) for i in (0, 2, 3)}) == 3
    for eps in (0.0, 1e-12):
        apart = merge_regions(directions[of], grid, 6, eps)
        assert sorted(apart[torch.tensor([0, 2, 3, 5])].tolist()) == [0, 1, 2, 3]
    assert len(merge_regions(directions[of], grid, 6, 2.0)[grid].unique()) == 2


def test_two_regions_are_never_merged(device: torch.device) -> None:
    grid = torch.tensor([[0, 4, -1]], device=device)
    assert merge_regions(torch.ones(1, 3, 2, device=device), grid, 5, 0.5).tolist() == [0, -1, -1, -1, 1, -1]
    nothing = torch.full((1, 3), -1, device=device)
    assert merge_regions(torch.ones(1, 3, 2, device=device), nothing, 0, 0.5)[nothing].tolist() == [[-1] * 3]


def test_merging_chains(device: torch.device, rng: np.random.Generator) -> None:
    """Each near the next, the ends far apart: one region, and permuting the ids groups the same patches."""
    angles = torch.arange(8, device=device) * 0.3
    directions = torch.stack([angles.cos(), angles.sin()], dim=1)[None]
    ids = torch.arange(8, device=device)[None]
    assert len(merge_regions(directions, ids, 8, 0.06)[ids].unique()) == 1
    assert len(merge_regions(directions, ids, 8, 0.03)[ids].unique()) == 8
    permuted = torch.from_numpy(rng.permutation(8)).to(device)[None]
    noise = torch.from_numpy(rng.normal(size=(1, 8, 3))).float().to(device)
    groups = [merge_regions(noise, i, 8, 0.3)[i][0] for i in (ids, permuted)]
    assert torch.equal(groups[0][:, None] == groups[0], groups[1][:, None] == groups[1])
