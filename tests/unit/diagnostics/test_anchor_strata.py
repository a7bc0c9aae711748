"""Rewards and entropy by anchor, and how evenly a step covers the anchors of the dataset."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from verl_plugins import Batch, DataError
from verl_plugins.diagnostics.anchor_strata import MOST_ANCHORS, AnchorStrata, coverage_entropy
from verl_plugins.testing import FakeRun


class Anchored:
    """A dataset whose row p lies at an anchor."""

    fingerprint = "anchored"

    def __init__(self, *anchors: int | None, inside: bool = False) -> None:
        self.rows = [{"extra_info": {"anchor_id": one}} if inside else {"anchor_id": one} for one in anchors]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, prompt_id: int) -> dict:
        return self.rows[prompt_id]


def batch(**changed: object) -> Batch:
    """Prompts 0 and 1 at anchor 2, prompt 2 at anchor 7; of the last one, a row without a token."""
    fields = {
        "uid": ["0-1-0", "0-1-0", "1-1-1", "1-1-1", "2-1-2", "2-1-2"],
        "anchor_id": [2, 2, 2, 2, 7, 7],
        "rm_scores": torch.tensor([[1.0, 0], [0, 0], [1, 0], [1, 0], [0, 0], [1, 0]]),
        "response_mask": torch.tensor([[1, 1], [1, 0], [1, 0], [1, 0], [1, 0], [0, 0]]),
        "entropy": torch.tensor([[1.0, 3.0], [2.0, torch.nan], [0.0, 0.0], [4.0, 0.0], [0.5, 9.0], [9.0, 9.0]]),
    }
    return Batch.from_tensors(**fields | changed)


def observed(batch: Batch, dataset: Anchored) -> dict[str, float]:
    run = FakeRun(dataset=dataset)
    AnchorStrata(AnchorStrata.Config()).observe(run, batch)
    return run.metrics


@pytest.mark.parametrize("inside", [False, True])
def test_by_hand(inside: bool) -> None:
    found = observed(batch(), Anchored(2, 2, 7, 3, inside=inside))
    covered = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert found == pytest.approx(
        {
            "coverage_entropy": covered,
            "evenness": covered / math.log(3),
            "anchors": 2,
            "2/reward": 0.75,
            "7/reward": 0.5,
            "2/entropy": (1 + 3 + 2 + 0 + 4) / 5,
            "7/entropy": 0.5,
        }
    )


def test_groups_count_once_however_many_responses_they_have() -> None:
    counts = np.array([1, 1, 0])
    assert coverage_entropy(counts) == pytest.approx(math.log(2))
    uneven = batch(uid=["0-1-0", "0-1-0", "0-1-0", "0-1-0", "2-1-2", "2-1-2"])
    assert observed(uneven, Anchored(2, 2, 7))["coverage_entropy"] == pytest.approx(math.log(2))


def test_one_anchor_has_no_evenness() -> None:
    found = observed(batch(anchor_id=[2] * 6), Anchored(2, 2, 2))
    assert found["coverage_entropy"] == 0 and "evenness" not in found


def test_a_session_of_several_outputs_is_rewarded_once() -> None:
    found = observed(batch(session=[0, 0, 0, 1, 0, 1], turn=[0, 1, 0, 0, 0, 0]), Anchored(2, 2, 7))
    assert found["2/reward"] == pytest.approx((0 + 1 + 1) / 3)


def test_rows_without_an_anchor_and_too_many_are_named(sentence) -> None:
    with pytest.raises(DataError) as error:
        observed(batch(), Anchored(2, None, 7))
    sentence(error.value, "row 1 of the dataset", "'anchor_id'", "verl-plugins data anchors")
    with pytest.raises(DataError) as error:
        observed(batch(), Anchored(*range(MOST_ANCHORS + 1)))
    sentence(error.value, "257", "256")
