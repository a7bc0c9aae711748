"""DRPO: weights of right and wrong answers, and what it refuses; the loss has its own file."""

from __future__ import annotations

import math

import pytest
import torch
from fakes import FakeRun
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from verl_plugins import Batch, CompositionError, DataError, Groups
from verl_plugins.advantage.drpo import Drpo, signed_weights, softmax_within

FEW = settings(max_examples=50, deadline=None)
BUDGET = 16
MODE = "seq-mean-token-sum"
SEEDS = st.integers(0, 1000)


def method(**options) -> Drpo:
    return Drpo(Drpo.Config(**options))


def run_with(budget: int = BUDGET) -> FakeRun:
    return FakeRun(config=OmegaConf.create({"data": {"max_response_length": budget}}))


@st.composite
def responses(draw):
    """uid, right or wrong, and length of each row, groups of 1 to 6 in any order."""
    group = st.lists(st.tuples(st.booleans(), st.integers(1, BUDGET)), min_size=1, max_size=6)
    groups = draw(st.lists(group, min_size=1, max_size=4))
    rows = [(f"{number}-1-0", *row) for number, rows in enumerate(groups) for row in rows]
    return [list(column) for column in zip(*draw(st.permutations(rows)), strict=True)]


def make_batch(uid, right, lengths, seed: int = 0, dtype=torch.float64, width: int = BUDGET, **fields) -> Batch:
    """Responses with the reward on their last token and log-probs of their own."""
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    rewards = torch.zeros(len(uid), width, dtype=dtype)
    rewards[torch.arange(len(uid)), torch.tensor(lengths).clamp(min=1) - 1] = torch.tensor(right).to(dtype)
    old = -torch.rand(len(uid), BUDGET, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    old = torch.nn.functional.pad(old, (0, width - BUDGET)).to(dtype)
    return Batch.from_tensors(
        **{"uid": uid, "rm_scores": rewards, "response_mask": mask, "old_log_probs": old} | fields
    )


def estimate(batch: Batch, run: FakeRun | None = None, **options) -> torch.Tensor:
    return method(**options).estimate_advantage(run or run_with(), batch)


def per_sequence(batch: Batch, **options) -> torch.Tensor:
    """What each response's mean log-prob is multiplied by, over the number of prompts: [rows]."""
    return estimate(batch, **options).sum(1) / len(batch)


class TestWeights:
    """Softmax of length over the right answers, of mean log-prob over the wrong ones."""

    @FEW
    @given(responses(), SEEDS)
    def test_formula(self, rows, seed):
        uid, right, lengths = rows
        batch = make_batch(*rows, seed)
        scores = [float(row[:n].mean()) for row, n in zip(batch.old_log_probs, lengths, strict=True)]
        for row, found in enumerate(per_sequence(batch, tau=0.5, length_temperature=0.2).tolist()):
            group = [other for other in range(len(uid)) if uid[other] == uid[row]]
            same = [other for other in group if right[other] == right[row]]
            if len(same) == len(group):
                assert found == 0
                continue
            logit = (lambda i: (1 - lengths[i] / BUDGET) / 0.2) if right[row] else (lambda i: scores[i] / 0.5)
            share = math.exp(logit(row)) / sum(math.exp(logit(other)) for other in same)
            assert found == pytest.approx((share if right[row] else -share) / len(set(uid)), rel=1e-5)

    @FEW
    @given(responses(), SEEDS)
    def test_right_answers_are_never_pushed_down(self, rows, seed):
        weights, right = per_sequence(make_batch(*rows, seed), length_temperature=0.02), torch.tensor(rows[1])
        assert (weights[right] >= 0).all()
        assert (weights[~right] <= 0).all()

    @FEW
    @given(responses(), SEEDS, st.randoms(use_true_random=False))
    def test_row_order_padding_and_precision_do_not_matter(self, rows, seed, random):
        batch = make_batch(*rows, seed)
        found, order = per_sequence(batch), random.sample(range(len(batch)), len(batch))
        shuffled = make_batch(*[[column[row] for row in order] for column in rows], seed)
        shuffled._source.fields["old_log_probs"] = batch.old_log_probs[order]
        torch.testing.assert_close(per_sequence(shuffled), found[order])
        torch.testing.assert_close(per_sequence(make_batch(*rows, seed, width=BUDGET + 5)), found)
        torch.testing.assert_close(
            per_sequence(make_batch(*rows, seed, torch.float32)), found, rtol=1e-5, atol=1e-6, check_dtype=False
        )

    def test_the_budget_is_the_configured_one(self):
        rows = (["1-1-0"] * 3, [True, True, False], [2, 4, 3])
        for width, budget in ((BUDGET, 16), (BUDGET, 1600), (BUDGET + 9, 16)):
            found = estimate(make_batch(*rows, width=width), run_with(budget), length_temperature=0.1).sum(1) / 3
            ratio = float(found[0] / found[1])
            assert ratio == pytest.approx(math.exp(2 / budget / 0.1), rel=1e-4)

    @pytest.mark.parametrize("length_temperature", [1e-4, 1e4])
    def test_extreme_temperatures(self, length_temperature):
        batch = make_batch(["1-1-0"] * 4, [True, True, True, False], [2, 4, 15, 3])
        found = (per_sequence(batch, length_temperature=length_temperature)).tolist()
        assert found == pytest.approx([1, 0, 0, -1] if length_temperature < 1 else [1 / 3] * 3 + [-1], abs=1e-3)

    @pytest.mark.parametrize("size", [1, 2, 8])
    @pytest.mark.parametrize("right", [True, False])
    def test_equal_groups_are_exactly_zero(self, right, size):
        assert (estimate(make_batch(["1-1-0"] * size, [right] * size, [3] * size)) == 0).all()

    def test_unmixed_prompts_count_in_the_average(self):
        mixed = make_batch(["1-1-0"] * 2, [True, False], [2, 2])
        more = make_batch(["1-1-0"] * 2 + ["2-1-0"] * 2, [True, False, True, True], [2, 2, 2, 2])
        assert per_sequence(mixed)[0] == pytest.approx(1.0)
        assert per_sequence(more)[0] == pytest.approx(0.5)

    def test_a_response_without_tokens_is_left_out(self):
        uid, right = ["1-1-0"] * 3 + ["2-1-0"] * 2, [True, False, False, False, False]
        found = estimate(make_batch(uid, right, [2, 2, 0, 0, 0]))
        assert (found.sum(1) / len(uid)).tolist() == pytest.approx([1, -1, 0, 0, 0]), "prompt 2 has nothing left"

    @pytest.mark.parametrize("right", [True, False])
    def test_a_group_that_only_a_response_without_tokens_mixes_is_not_mixed(self, right):
        verdicts, lengths = torch.tensor([right, not right, not right]), torch.tensor([0, 3, 4])
        found = signed_weights(verdicts, lengths, torch.zeros(3), Groups(["a"] * 3), 1.0, 0.1, BUDGET)
        assert found.tolist() == [0, 0, 0]

    def test_tool_output_does_not_lengthen(self):
        rows = (["1-1-0"] * 3, [True, True, False], [3, 3, 3])
        mask = torch.arange(BUDGET) < torch.tensor([3, 5, 3])[:, None]
        mask[1, 1:3] = False
        weights = per_sequence(make_batch(*rows, response_mask=mask))
        assert float(weights[0]) == pytest.approx(float(weights[1]))

    def test_softmax(self):
        found = softmax_within(torch.tensor([1000.0, 9.0, 1000.0, 9.0]), torch.tensor([0, 2, 0, 0]), 3)
        assert found.tolist() == [0.5, 1, 0.5, 0]


class TestData:
    """What it cannot use."""

    @pytest.mark.parametrize("score", [-1.0, 0.5, 2.0])
    def test_other_rewards_are_refused(self, score, sentence):
        with pytest.raises(DataError) as error:
            estimate(make_batch(["1-1-0"] * 2, [1.0, score], [2, 2]))
        sentence(
            error.value,
            *("drpo", "row 1-1-0_1_0", f"{score:g}", "expected 0 for wrong or 1", "plugins.drpo.correct_threshold"),
        )

    @pytest.mark.parametrize(("wrong", "right", "threshold"), [(-1, 1, 0), (0, 1, 0.5), (0.25, 2, 0.25), (-3, -1, -2)])
    def test_scores_of_another_scale(self, wrong, right, threshold):
        """A score at the threshold is wrong."""
        uid, truth, lengths = ["1-1-0"] * 4 + ["2-1-0"] * 2, [True, False, True, False, True, True], [2, 3, 4, 1, 2, 3]
        scores = [float(right if one else wrong) for one in truth]
        found = estimate(make_batch(uid, scores, lengths), correct_threshold=threshold)
        assert torch.equal(found, estimate(make_batch(uid, truth, lengths)))
        assert (found[[0, 2], 0] > 0).all() and (found[[1, 3], 0] < 0).all() and not found[4:].any()

    @pytest.mark.parametrize("lengths", [[0, 3, 2], [2, 0, 3], [0, 0, 2], [0, 0, 0]])
    def test_responses_without_tokens(self, lengths):
        """They are neither right nor wrong, and a prompt of which nothing is left is not counted."""
        rows = (["1-1-0"] * 3 + ["2-1-0"] * 2, [True, False, False, True, False], [*lengths, 2, 2])
        found = per_sequence(make_batch(*rows))
        assert torch.isfinite(found).all() and not found[:3][torch.tensor(lengths) == 0].any()
        prompts = 1 + any(lengths)
        assert found[3:].tolist() == pytest.approx([1 / prompts, -1 / prompts])
        if lengths[0] and lengths[2]:
            assert found[:3].tolist() == pytest.approx([0.5, 0, -0.5])

    def test_a_batch_without_tokens_teaches_nothing(self):
        assert not estimate(make_batch(["1-1-0"] * 2, [True, False], [0, 0])).any()

    def test_sessions_of_several_outputs_are_refused(self, sentence):
        batch = make_batch(["1-1-0"] * 3, [True, True, False], [2, 2, 2], session=[0, 0, 1], turn=[0, 1, 0])
        with pytest.raises(DataError) as error:
            estimate(batch)
        sentence(error.value, "row 1-1-0_0_0", "one output per session")

    def test_metrics(self):
        run = run_with()
        uid = ["1-1-0"] * 4 + ["2-1-0"] * 2 + ["3-1-0"] * 2
        right = [True, True, True, False, True, True, False, False]
        estimate(make_batch(uid, right, [4, 4, 4, 5, 6, 6, 1, 1]), run)
        found = run.metrics
        assert found["effective_positives"] == pytest.approx(3)
        assert (found["weight_max"], found["negative_weight_max"]) == pytest.approx((1 / 3, 1))
        estimate(make_batch(["1-1-0"] * 2, [True, True], [2, 2]), other := run_with())
        assert other.metrics == {"weight_max": 0, "negative_weight_max": 0}


def composed(mode=MODE, in_reward=False, n=8, mini=16, epochs=1) -> OmegaConf:
    return OmegaConf.create(
        {
            "data": {"train_batch_size": 16},
            "algorithm": {"use_kl_in_reward": in_reward},
            "actor_rollout_ref": {
                "rollout": {"n": n},
                "actor": {"loss_agg_mode": mode, "ppo_mini_batch_size": mini, "ppo_epochs": epochs},
            },
        }
    )


@pytest.mark.parametrize(
    ("config", "options", "names"),
    [
        (composed(mode="token-mean"), {}, "loss_agg_mode=token-mean"),
        (composed(in_reward=True), {}, "algorithm.use_kl_in_reward=true"),
        (composed(n=1), {}, "rollout.n=1"),
        (composed(mini=4), {"negatives": "old", "tau": 0.1}, "negatives=current"),
        (composed(epochs=2), {"negatives": "old", "tau": 0.1}, "negatives=current"),
    ],
)
def test_settings_it_cannot_work_with(config, options, names, sentence):
    with pytest.raises(CompositionError) as error:
        method(**options).check(config)
    sentence(error.value, names)


@pytest.mark.parametrize("options", [{}, {"negatives": "old", "tau": 1.0}, {"tau": 0.1}])
def test_settings_it_works_with(options):
    method(**options).check(composed(mini=4, n=2))
    method(negatives="old", tau=0.1).check(composed())


def test_weights_of_groups_sum_to_one():
    groups, right = Groups([0, 0, 0, 0]), torch.tensor([True, True, False, False])
    found = signed_weights(right, torch.tensor([1, 9, 3, 4]), torch.zeros(4), groups, 10.0, 0.1, BUDGET)
    assert (float(found[right].sum()), float(found[~right].sum())) == pytest.approx((1, -1))
