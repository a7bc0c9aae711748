"""The metrics every run shows, on batches whose answer is known, and their laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_plugins import Batch
from verl_plugins.diagnostics.health import PATIENCE, Watch, group_health, policy_health, reward_parts, signal_health

EOS = 7


class Tokenizer:
    eos_token_id = EOS


def make_batch(scores: list[list[float]], advantages: torch.Tensor | None = None, **fields: object) -> Batch:
    """One group per list; responses of two tokens, the last one the end."""
    flat = torch.tensor([float(score) for group in scores for score in group])
    rewards = torch.zeros(len(flat), 3).index_copy_(1, torch.tensor([1]), flat[:, None])
    mask = torch.tensor([[1, 1, 0]]).repeat(len(flat), 1)
    base = {
        "uid": [f"{number}-1-0" for number, group in enumerate(scores) for _ in group],
        "rm_scores": rewards,
        "response_mask": mask,
        "response_lengths": mask.sum(1),
        "responses": torch.tensor([[1, EOS, 0]]).repeat(len(flat), 1),
        "budget": 3,
        "tokenizer": Tokenizer(),
        "__rollout_n__": torch.full((len(flat),), 2),
    }
    if advantages is not None:
        base["advantages"] = advantages[:, None] * mask
    return Batch.from_tensors(**{**base, **fields})


class TestGroups:
    def test_shares(self) -> None:
        found = group_health(make_batch([[1, 1], [0, 0], [0, 1], [0, 1]]))
        assert found["health/accuracy"] == 0.5
        assert found["health/mixed_groups"] == 0.5
        assert found["health/all_right_groups"] == found["health/all_wrong_groups"] == 0.25
        assert found["health/groups_off_size"] == 0
        assert found["health/generated_tokens"] == 16

    def test_reward_and_accuracy_are_over_the_same_rows(self) -> None:
        """Of plain 0/1 rewards they are equal, also where a session has several outputs."""
        two_turns = make_batch([[0, 1, 1]], session=[0, 0, 1], turn=[0, 1, 0])
        for batch in (make_batch([[1, 1], [0, 0], [0, 1]]), two_turns):
            found = group_health(batch)
            assert found["health/reward"] == found["health/accuracy"]
        assert group_health(two_turns)["health/reward"] == 1

    def test_length_by_verdict(self) -> None:
        found = group_health(make_batch([[1, 1], [0, 1]], response_lengths=torch.tensor([1, 2, 3, 3])))
        assert (found["health/length_right"], found["health/length_wrong"]) == (2, 3)
        assert "health/length_wrong" not in group_health(make_batch([[1, 1]]))

    def test_groups_of_another_size(self) -> None:
        batch = make_batch([[1, 1], [0], [0, 1], [0, 1]])
        assert group_health(batch)["health/groups_off_size"] == 0.25

    def test_a_prompt_may_ask_for_its_own_size(self) -> None:
        batch = make_batch([[1, 1], [0]], __rollout_n__=torch.tensor([2, 2, 1]))
        assert group_health(batch)["health/groups_off_size"] == 0

    def test_truncated_responses_used_their_budget_and_did_not_end(self) -> None:
        responses = torch.tensor([[1, 2, 0], [1, EOS, 0], [1, 1, 0], [1, EOS, 0]])
        batch = make_batch([[1, 1], [0, 1]], responses=responses, budget=2)
        assert group_health(batch)["health/truncated"] == 0.5


class TestSignal:
    def test_rows_against_their_score(self) -> None:
        batch = make_batch([[0, 1, 1, 1], [1, 1, 1, 1]], torch.tensor([-3.0, 1, -1, 1, 0, 0, 0, 0]))
        found = signal_health(batch)
        assert found["health/zero_advantage_rows"] == 0.5
        assert found["health/sign_flips"] == pytest.approx(1 / 8)
        assert found["health/effective_rows"] == pytest.approx(6**2 / (8 * 12))

    def test_no_signal_at_all(self) -> None:
        found = signal_health(make_batch([[1, 1]], torch.zeros(2)))
        assert found == {
            "health/zero_advantage_rows": 1.0,
            "health/sign_flips": 0.0,
            "health/effective_rows": 0.0,
        }

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=9), st.floats(0.5, 8))
    def test_scale_of_advantages_does_not_matter(self, values: list[float], scale: float) -> None:
        values = [value if abs(value) > 1e-3 else 0.0 for value in values]
        scores = [[float(i % 2) for i in range(len(values))]]
        one = signal_health(make_batch(scores, torch.tensor(values)))
        other = signal_health(make_batch(scores, torch.tensor(values) * scale))
        assert one == pytest.approx(other, rel=1e-5)
        assert 0 <= one["health/effective_rows"] <= 1 + 1e-9


class TestPolicy:
    def test_entropy_of_generated_tokens_only(self) -> None:
        entropy = torch.tensor([[1.0, 2.0, 99.0], [3.0, 4.0, 99.0]])
        found = policy_health(make_batch([[0, 1]], entropy=entropy))
        assert found["health/entropy_mean"] == 2.5
        assert found["health/entropy_q50"] == 2.5
        assert found["health/entropy_q10"] == pytest.approx(np.quantile([1, 2, 3, 4], 0.1))

    def test_on_policy_rows_all_count(self) -> None:
        logs = torch.randn(4, 3)
        found = policy_health(make_batch([[0, 1, 0, 1]], old_log_probs=logs, rollout_log_probs=logs.clone()))
        assert found == {"health/effective_sample_size": 1.0}

    def test_one_row_that_outweighs_the_others(self) -> None:
        old = torch.zeros(4, 3)
        rollout = torch.tensor([[-500.0, -500, 0]] + [[0.0, 0, -1e6]] * 3)
        found = policy_health(make_batch([[0, 1, 0, 1]], old_log_probs=old, rollout_log_probs=rollout))
        assert found["health/effective_sample_size"] == pytest.approx(1 / 4)

    def test_what_was_not_computed_is_left_out(self) -> None:
        assert policy_health(make_batch([[0, 1]])) == {}


class TestRewardParts:
    def test_numeric_parts_are_averaged_over_the_responses_that_have_them(self) -> None:
        infos = [
            {"acc": True, "answer": "5", "verifier_error": 0.0},
            {"acc": False, "answer": "", "verifier_error": 1.0, "format": 0.5},
            {"acc": False, "answer": "7", "verifier_error": 0.0},
            {},
        ]
        batch = make_batch([[1, 0], [0, 0]], extra_fields=[{"reward_extra_info": info} for info in infos])
        assert reward_parts(batch) == {
            "reward/acc": pytest.approx(1 / 3),
            "reward/verifier_error": pytest.approx(1 / 3),
            "reward/format": 0.5,
        }

    def test_a_session_counts_once_by_its_last_output(self) -> None:
        fields = [{"reward_extra_info": {"acc": value}} for value in (0.0, 1.0)]
        batch = make_batch([[0, 1]], extra_fields=fields, session=torch.tensor([0, 0]), turn=torch.tensor([0, 1]))
        assert reward_parts(batch) == {"reward/acc": 1.0}


class TestWatch:
    GOOD = {"health/mixed_groups": 0.5, "health/truncated": 0.0, "health/groups_off_size": 0.0}

    @pytest.mark.parametrize(
        ("bad", "words"),
        [
            ({"health/mixed_groups": 0.0}, "nothing to learn"),
            ({"health/truncated": 0.95}, "cut off"),
            ({"health/groups_off_size": 0.2}, "another size"),
        ],
    )
    def test_says_it_once_after_ten_steps(self, bad: dict[str, float], words: str) -> None:
        watch = Watch()
        said = [watch.look({**self.GOOD, **bad}) for _ in range(3 * PATIENCE)]
        assert [step for step, sentences in enumerate(said) if sentences] == [PATIENCE - 1]
        assert words in said[PATIENCE - 1][0] and len(said[PATIENCE - 1]) == 1

    def test_a_good_step_starts_the_count_again(self) -> None:
        watch = Watch()
        for _ in range(5):
            assert [watch.look({**self.GOOD, "health/mixed_groups": 0.0}) for _ in range(PATIENCE - 1)] == [[]] * 9
            assert watch.look(self.GOOD) == []
