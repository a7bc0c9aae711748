"""What `Batch` and `Tokens` promise to plugins."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_plugins import Batch, DataError, Tokens
from verl_plugins.fields import TensorSource


def make(uid=("3-1-0", "3-1-0", "8-1-0"), **fields) -> Batch:
    rows = len(uid)
    fields = {"rm_scores": torch.zeros(rows, 4), "response_mask": torch.ones(rows, 4, dtype=torch.bool)} | fields
    return Batch.from_tensors(uid=uid, **fields)


class TestIdentity:
    """Keys say it all: uid, session, turn and prompt."""

    def test_read_from_keys(self):
        fields = {"rm_scores": torch.zeros(3, 2), "response_mask": torch.ones(3, 2)}
        batch = Batch(TensorSource(["17-3-0_0_0", "17-3-0_0_1", "4-3-1_1_0"], fields))
        assert batch.uid.tolist() == ["17-3-0", "17-3-0", "4-3-1"]
        assert batch.session.tolist() == [0, 0, 1]
        assert batch.turn.tolist() == [0, 1, 0]
        assert batch.prompt_id.tolist() == [17, 17, 4]
        assert batch.is_last.tolist() == [False, True, True]

    def test_tensors_say_the_same_as_keys(self):
        given = make(session=[0, 0, 1], turn=[0, 1, 0])
        read = Batch(TensorSource(given.keys, {}))
        assert (read.uid == given.uid).all()
        assert torch.equal(read.session, given.session)
        assert torch.equal(read.turn, given.turn)

    def test_foreign_uid(self):
        with pytest.raises(DataError, match="does not start with a prompt id"):
            make(uid=["abc", "abc", "d"]).prompt_id  # noqa: B018

    def test_a_session_counts_once(self):
        batch = make(session=[0, 0, 1], turn=[0, 1, 0])
        assert batch.groups.count().tolist() == [1, 1, 1]


class TestScores:
    """Sums of rewards, the verdict apart from them."""

    def test_of_a_session_is_that_of_its_last_output(self):
        rewards = torch.tensor([[5.0, 0], [0, 1], [2, 2]])
        batch = make(rm_scores=rewards, response_mask=torch.ones(3, 2), session=[0, 0, 0], turn=[0, 1, 0])
        assert batch.scores.tolist() == [1, 1, 4]

    def test_follow_an_assignment(self):
        batch = make(response_lengths=[4, 2, 1])
        assert batch.scores.tolist() == [0, 0, 0]
        batch.rewards = torch.tensor([1.0, 2.0, 3.0])
        assert batch.scores.tolist() == [1, 2, 3]
        assert batch.rewards[1].tolist() == [0, 2, 0, 0]
        assert batch.correct.tolist() == [False] * 3, "the raw verdict is kept"

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_refuses_what_is_not_finite(self, bad):
        rewards = torch.zeros(3, 4)
        rewards[1, 2] = bad
        for read in ("rewards", "scores", "correct"):
            with pytest.raises(DataError, match="row 3-1-0_1_0 .* finite"):
                getattr(make(rm_scores=rewards), read)

    def test_refuses_an_assignment_that_is_not_finite(self):
        batch = make(response_lengths=[4, 4, 4])
        for rewards in (torch.tensor([0.0, float("nan"), 0.0]), torch.full((3, 4), float("inf"))):
            with pytest.raises(DataError, match="rewards: .* finite"):
                batch.rewards = rewards

    @pytest.mark.parametrize(
        ("rewards", "said"),
        [
            (torch.zeros(2), r"rewards: shape \(2,\), expected \(3,\) or \(3, 4\)"),
            (torch.zeros(4, 3), r"rewards: shape \(4, 3\), expected \(3,\) or \(3, 4\)"),
            (torch.zeros(()), r"rewards: shape \(\), expected"),
            ([0.0, 0.0, 0.0], "rewards: a list, expected a tensor"),
            (torch.zeros(3).numpy(), "rewards: a ndarray, expected a tensor"),
        ],
    )
    def test_refuses_rewards_that_are_not_the_rows(self, rewards, said):
        with pytest.raises(DataError, match=said):
            make(response_lengths=[4, 4, 4]).rewards = rewards

    @pytest.mark.parametrize("mask", [torch.zeros(2), torch.zeros(3, 4), [True, False, False]])
    def test_refuses_to_drop_what_are_no_rows(self, mask):
        with pytest.raises(DataError, match="drop: "):
            make().drop(mask)

    def test_huge_rewards_are_finite(self):
        assert make(rm_scores=torch.full((3, 4), 3e38) / 4).scores.isfinite().all()


class TestTokens:
    """Values per row on generated tokens."""

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=8), st.floats(-1e3, 1e3))
    def test_to_tokens(self, mask, value):
        mask = torch.tensor(mask)
        batch = make(uid=["1-1-0"] * len(mask), rm_scores=torch.zeros(mask.shape), response_mask=mask)
        values = value + torch.arange(len(mask))
        expected = torch.where(mask, values[:, None].float(), 0.0)
        assert torch.equal(batch.to_tokens(values), expected)
        assert batch.to_tokens(values).dtype == torch.float32

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
    def test_any_kind_of_mask(self, dtype):
        mask = torch.tensor([[1, 0, 1]]).to(dtype)
        batch = make(uid=["1-1-0"], rm_scores=torch.zeros(1, 3), response_mask=mask)
        assert batch.to_tokens(torch.tensor([2.0])).tolist() == [[2, 0, 2]]

    @pytest.mark.parametrize("name", ["verdict", "acc"])
    def test_a_verdict_that_is_no_number_is_refused(self, name):
        with pytest.raises(DataError, match=f"field {name} of row .* is nan"):
            make(**{name: torch.tensor([1.0, float("nan"), 1.0])}).correct  # noqa: B018
        for values in ([1.0, None, 0.0], ["right", "wrong", "right"]):
            with pytest.raises(DataError, match=f"field '{name}' must have one number per row, and has"):
                make(extra_fields=[{name: value} for value in values]).correct  # noqa: B018

    def test_not_finite(self):
        with pytest.raises(DataError, match="to_tokens: the value of row 8-1-0_2_0 is inf"):
            make().to_tokens(torch.tensor([0.0, 1.0, float("inf")]))

    def test_generators_are_their_own(self):
        nothing = torch.zeros(1, 1)
        tokens = Tokens(
            log_probs=nothing, old_log_probs=nothing, advantages=nothing, response_mask=nothing, config=None
        )
        first = torch.rand(4, generator=tokens.rng())
        assert torch.equal(first, torch.rand(4, generator=tokens.rng()))
        assert not torch.equal(first, torch.rand(4, generator=tokens.scoped("other").rng()))


class TestTruncation:
    """A response is judged by its own budget."""

    @staticmethod
    def make(**fields) -> Batch:
        responses = torch.tensor([[7, 7, 7, 2], [7, 7, 0, 0], [7, 2, 0, 0], [7, 7, 7, 7]])
        lengths = torch.tensor([4, 2, 2, 4])
        mask = torch.arange(4) < lengths[:, None]
        tokenizer = SimpleNamespace(eos_token_id=2)
        known = {"responses": responses, "response_lengths": lengths, "response_mask": mask, "tokenizer": tokenizer}
        return make(["1-1-0"] * 4, rm_scores=torch.zeros(4, 4), budget=4, **known | fields)

    def test_without_budgets_of_prompts(self):
        batch = self.make()
        assert batch.budgets.tolist() == [4, 4, 4, 4]
        assert batch.truncated.tolist() == [False, False, False, True]

    def test_each_prompt_has_its_own(self):
        batch = self.make(__max_tokens__=[4, 2, 2, 4])
        assert batch.budgets.tolist() == [4, 2, 2, 4]
        assert batch.truncated.tolist() == [False, True, False, True]

    def test_none_exceeds_that_of_the_run(self):
        batch = self.make(__max_tokens__=[9, 9, 9, 9])
        assert batch.budgets.tolist() == [4, 4, 4, 4]
        assert batch.truncated.tolist() == [False, False, False, True]

    def test_what_the_rollout_told_of_its_end_counts(self):
        batch = self.make(truncated=[True, False, True, False])
        assert batch.truncated.tolist() == [True, False, True, False]


class TestDropping:
    """Dropped rows stay in `full`."""

    def test_from_full(self):
        full = make()
        batch = make(uid=["8-1-0", "3-1-0"], session=[2, 0], full=full)
        assert batch.from_full(torch.tensor([10, 11, 12])).tolist() == [12, 10]
        assert full.from_full(torch.tensor([10, 11, 12])).tolist() == [10, 11, 12]

    def test_not_all(self):
        with pytest.raises(DataError, match="dropped all 3 rows"):
            make().drop(torch.ones(3))

    def test_put(self):
        batch = make()
        batch.put("mine", torch.arange(3))
        assert batch.extra("mine").tolist() == [0, 1, 2]
        with pytest.raises(DataError, match="expected"):
            batch.put("mine", torch.arange(4))


class TestExtra:
    """Fields from the queue, the reward's parts, the dataset row."""

    def test_places(self):
        batch = make(extra_fields=[{"reward_extra_info": {"acc": 1.0, "kind": "a"}}] * 3, extra_info=[{"level": 2}] * 3)
        assert batch.extra("acc").tolist() == [1, 1, 1]
        assert batch.extra("kind") == ["a"] * 3
        assert batch.extra("level").tolist() == [2, 2, 2]
        assert batch.correct.all()
        with pytest.raises(DataError, match="'nowhere'"):
            batch.extra("nowhere")

    def test_missing_field(self):
        with pytest.raises(DataError, match="field 'entropy' is not in the batch"):
            make().entropy  # noqa: B018
