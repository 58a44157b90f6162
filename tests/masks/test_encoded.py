"""Masks of an image that are lent to one of several threads at a time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from time import sleep

import numpy as np
import torch

from moduseg.masks.encoded import EncodedProposals, decoded
from moduseg.structures import Proposals

RUNS = [np.array([3, 4, 5]), np.array([0, 6, 6])]


def make_encoded() -> EncodedProposals:
    return EncodedProposals(RUNS, (3, 4), torch.tensor([0.5, 0.25]), torch.ones(2))


def test_encoded_masks_are_lent_to_one_thread_at_a_time() -> None:
    at_once, most, lock = 0, 0, threading.Lock()

    def look(_: int) -> list[int]:
        nonlocal at_once, most
        with decoded(make_encoded()) as proposals:
            with lock:
                at_once += 1
                most = max(most, at_once)
            sleep(0.01)
            areas = proposals.areas.tolist()
            with lock:
                at_once -= 1
        return areas

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(look, range(8))) == [[4, 6]] * 8
    assert most == 1


def test_decoded_masks_are_lent_as_they_are() -> None:
    proposals = Proposals(torch.ones(1, 2, 2, dtype=torch.bool))
    with decoded(proposals) as outer, decoded(proposals) as inner:
        assert outer is inner is proposals


def test_a_thread_may_borrow_twice() -> None:
    with decoded(make_encoded()) as first, decoded(make_encoded()) as second:
        assert torch.equal(first.masks, second.masks)
