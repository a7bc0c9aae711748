"""Rows that leave a step and rows that come to it: those of this step, and those of earlier ones."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from verl_plugins import Batch, DataError
from verl_plugins.replay import StoredRow

PAST = StoredRow(
    uid="5-1-3",
    step=1,
    context=np.array([1, 2, 3], np.int32),
    offset=1,
    response=np.array([4, 5], np.int32),
    old_log_probs=np.array([-0.5, -0.25], np.float32),
    reward=1.0,
    correct=True,
    truncated=False,
    columns={"gain": 0.5},
)


def make(**fields: object) -> Batch:
    base = {
        "uid": ["7-2-1", "3-2-0", "3-2-0"],
        "session": [0, 0, 1],
        "response_mask": torch.ones(3, 2),
        "rm_scores": torch.zeros(3, 2),
    }
    return Batch.from_tensors(**{**base, **fields})


def later(batch: Batch) -> Batch:
    """The rows of the next stage."""
    keys = [key for key, gone in zip(batch.keys, batch.dropped.tolist(), strict=True) if not gone]
    keys += [new.key for new in batch.additions]
    uid, session, _ = zip(*[key.rsplit("_", 2) for key in keys], strict=True)
    return Batch.from_tensors(
        uid=uid,
        session=[*map(int, session)],
        full=batch,
        response_mask=torch.ones(len(keys), 2),
        rm_scores=torch.zeros(len(keys), 2),
    )


class TestBringingBack:
    def test_each_is_a_session_of_its_own_draw(self):
        batch = make()
        batch.bring_back([PAST, PAST, dataclasses.replace(PAST, uid="7-1-0")])
        batch.bring_back([PAST])
        assert [new.key for new in batch.additions] == ["5-1-3_0_0", "5-1-3_1_0", "7-1-0_0_0", "5-1-3_2_0"]
        assert PAST.prompt_id == 5 and all(new.past for new in batch.additions)

    def test_beside_what_is_added_to_a_group(self):
        batch = make()
        batch.add(1, np.array([4]), reward=1.0, correct=True)
        batch.bring_back([PAST])
        assert [new.key for new in batch.additions] == ["3-2-0_2_0", "5-1-3_0_0"]

    def test_what_later_stages_see(self):
        batch = make()
        batch.add(1, np.array([4]), reward=1.0, correct=True)
        batch.bring_back([PAST])
        batch.drop(torch.tensor([True, False, False]))
        after = later(batch)
        assert after.is_added.tolist() == [False, False, True, True]
        assert after.from_full(torch.tensor([10, 11, 12])).tolist() == [11, 12, 11, 0]
        assert after.from_full(torch.tensor([True, True, True])).tolist() == [True, True, True, False]
        assert after.groups.count().tolist() == [3, 3, 3, 1] and after.prompt_id.tolist() == [3, 3, 3, 5]

    def test_the_row_whose_columns_it_has_is_the_same_in_any_order(self):
        for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
            batch = make(uid=[make().uid[row] for row in order], session=[[0, 0, 1][row] for row in order])
            batch.bring_back([PAST])
            assert batch.keys[batch.additions[0].like] == "3-2-0_0_0"

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"response": np.zeros(0, np.int32)}, "0 tokens and 2 old_log_probs"),
            ({"old_log_probs": np.zeros(1)}, "2 tokens and 1 old_log_probs"),
            ({"old_log_probs": np.array([0.0, np.nan])}, "no finite number"),
            ({"reward": np.inf}, "no finite number"),
        ],
    )
    def test_what_nothing_can_be_learnt_from(self, change, says, sentence):
        with pytest.raises(DataError) as refusal:
            make().bring_back([PAST, dataclasses.replace(PAST, **change)])
        sentence(refusal.value, "bring_back", "5-1-3", says)


def test_the_update_is_made_unless_it_is_skipped():
    batch = make()
    assert not batch.update_skipped
    batch.skip_update()
    assert batch.update_skipped and not batch.dropped.any()
