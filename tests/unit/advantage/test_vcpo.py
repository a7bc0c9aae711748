"""VCPO: properties of the step's multiplier and of the weighted baseline, and the corner cases of its page."""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from verl_plugins import Batch, CompositionError, Tokens
from verl_plugins.advantage.vcpo import (
    COUNTED,
    LIMIT,
    LOG_WEIGHT,
    Vcpo,
    effective_sample_size,
    log_weights,
    logit_proxy,
    step_multiplier,
)
from verl_plugins.advantage.weighted import average, total
from verl_plugins.testing import FakeRun

numbers = st.floats(-3, 3, allow_nan=False)
positive = st.floats(1e-3, 1e3)


def rows(draw_values, weights, labels):
    return (
        torch.tensor(draw_values, dtype=torch.float64),
        torch.tensor(weights, dtype=torch.float64),
        torch.tensor(labels),
    )


@st.composite
def weighted_rows(draw):
    size = draw(st.integers(1, 12))
    listed = lambda of: draw(st.lists(of, min_size=size, max_size=size))  # noqa: E731
    values = [round(value, 1) for value in listed(numbers)]
    return values, listed(st.one_of(st.just(0.0), positive)), listed(st.integers(0, 3))


def by_hand(values, weights, labels, mode):
    """The same in plain Python, group by group."""
    found = []
    for label in labels:
        members = sorted((v, w) for v, w, other in zip(values, weights, labels, strict=True) if other == label)
        whole = sum(w for _, w in members)

        def reached(share, members=members, whole=whole):
            running = 0.0
            for value, weight in members:
                running += weight
                if running >= share * whole - 1e-9 * whole:
                    return value
            return members[-1][0]

        if mode == "median":
            found.append(reached(0.5) if whole else 0.0)
            continue
        if mode == "winsorized_mean" and whole:
            low, high = reached(0.05), reached(0.95)
            members = [(min(max(v, low), high), w) for v, w in members]
        found.append(sum(v * w for v, w in members) / (whole + 1e-8))
    return found


class TestAverage:
    @pytest.mark.parametrize("mode", ["mean", "median", "winsorized_mean"])
    @given(given=weighted_rows())
    def test_as_by_hand(self, mode, given):
        labels = np.unique(given[2], return_inverse=True)[1].tolist()
        found = average(*rows(given[0], given[1], labels), mode)
        assert found.tolist() == pytest.approx(by_hand(given[0], given[1], labels, mode), abs=1e-9)

    @pytest.mark.parametrize("mode", ["mean", "median", "winsorized_mean"])
    @given(given=weighted_rows(), seed=st.integers(0, 9))
    def test_order_does_not_matter(self, mode, given, seed):
        labels = np.unique(given[2], return_inverse=True)[1].tolist()
        values, weights, index = rows(given[0], given[1], labels)
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(values)))
        found = average(values[order], weights[order], index[order], mode)
        torch.testing.assert_close(found, average(values, weights, index, mode)[order], rtol=1e-6, atol=1e-9)

    def test_weights_of_very_different_size_stay_apart(self):
        """One group's weights are 1e60 times another's: neither is lost in the other's sum."""
        values, weights = torch.tensor([0.0, 1, 2, 0, 1, 2]), torch.tensor([1.0, 5, 1, 1, 5, 1]).double()
        weights[:3] *= 1e60
        index = torch.tensor([0, 0, 0, 1, 1, 1])
        assert average(values, weights, index, "median").tolist() == [1.0] * 6
        assert average(values, weights, index).tolist() == pytest.approx([1.0] * 6)

    def test_no_rows(self):
        nothing = torch.zeros(0)
        assert total(nothing, nothing.long()).shape == (0,)
        assert average(nothing, nothing, nothing.long(), "median").shape == (0,)


class TestStep:
    @given(st.lists(positive, min_size=1, max_size=20))
    def test_between_one_and_all(self, weights):
        ess = effective_sample_size(torch.tensor(weights).double())
        assert 0 < ess <= len(weights) * (1 + 1e-9)

    @given(positive, st.integers(1, 30))
    def test_equal_weights_are_all_effective(self, weight, count):
        ess = effective_sample_size(torch.full((count,), weight).double())
        assert ess == pytest.approx(count * weight**2 * count / (weight**2 * count + 1e-8))

    @given(st.lists(positive, min_size=1, max_size=9), st.floats(1, 1e3))
    def test_scale_does_not_matter(self, weights, scale):
        values = torch.tensor(weights).double() * 1e3
        assert effective_sample_size(values * scale) == pytest.approx(effective_sample_size(values), rel=1e-6)

    @pytest.mark.parametrize(
        ("ratio", "base", "rule", "expected"),
        [
            (0.25, 1.0, "sqrt", 0.5),
            (0.25, 1.0, "linear", 0.25),
            (0.25, 0.5, "linear", 0.5),
            (0.9, 0.55, "sqrt", 1.0),
            (0.0, 1.0, "sqrt", 0.0),
            (math.nan, 1.0, "sqrt", 0.0),
            (math.inf, 1.0, "linear", 0.0),
        ],
    )
    def test_multiplier(self, ratio, base, rule, expected):
        assert step_multiplier(ratio, base, rule) == pytest.approx(expected)


def make(mask, old, rollout, scores, uid, **fields):
    mask = torch.tensor(mask).bool()
    rewards = torch.zeros(mask.shape)
    rewards[torch.arange(len(mask)), mask.sum(1).clamp(min=1) - 1] = torch.tensor(scores)
    squares = fields.pop("sum_pi_squared", torch.full(mask.shape, 0.5))
    return Batch.from_tensors(
        uid=uid,
        rm_scores=rewards,
        response_mask=mask,
        old_log_probs=torch.tensor(old),
        rollout_log_probs=torch.tensor(rollout),
        sum_pi_squared=squares,
        **fields,
    )


def plugin(**settings):
    return Vcpo(Vcpo.Config(**settings))


def random_batch(seed, prompts=3, n=4, width=5, uid=None):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, width + 1, prompts * n)
    mask = np.arange(width) < lengths[:, None]
    old = -rng.exponential(1.0, mask.shape).astype(np.float32)
    rollout = (old + rng.normal(0, 0.5, mask.shape)).astype(np.float32)
    names = uid or [f"{row // n}-1-0" for row in range(prompts * n)]
    scores = rng.integers(0, 2, prompts * n).astype(np.float32).tolist()
    squares = torch.from_numpy(np.exp(2 * old) + rng.uniform(0, 0.1, mask.shape).astype(np.float32))
    return make(mask.tolist(), old.tolist(), rollout.tolist(), scores, names, sum_pi_squared=squares)


class TestBaseline:
    def test_equal_rewards_leave_next_to_nothing(self):
        batch = make([[1, 1]] * 4, [[-1.0, -1]] * 4, [[-1.2, -0.7]] * 4, [1.0] * 4, ["0-1-0"] * 4)
        assert plugin().estimate_advantage(FakeRun(), batch).abs().max() < 1e-6

    def test_a_lone_response_has_nothing_to_compare_with(self):
        batch = make([[1, 1]] * 3, [[-1.0, -1]] * 3, [[-1.0, -1]] * 3, [1.0, 0, 1], ["0-1-0", "0-1-0", "1-1-0"])
        assert plugin().estimate_advantage(FakeRun(), batch)[2].tolist() == [0, 0]

    def test_where_nothing_weighs_the_baseline_is_the_mean(self):
        """A policy that is certain of every token has no score: W is 0."""
        batch = make(
            [[1]] * 4, [[0.0]] * 4, [[0.0]] * 4, [1.0, 0, 0, 0], ["0-1-0"] * 4, sum_pi_squared=torch.ones(4, 1)
        )
        found = plugin(norm_by_std=False).estimate_advantage(FakeRun(), batch)[:, 0]
        assert found.tolist() == pytest.approx([0.75, -0.25, -0.25, -0.25])

    def test_a_response_without_tokens_weighs_nothing(self):
        batch = make([[1, 1], [0, 0], [1, 0]], [[-1.0, -1]] * 3, [[-1.0, -1]] * 3, [1.0, 1, 0], ["0-1-0"] * 3)
        one = plugin(normalize_by_length=True)
        weights = one.weights(torch.zeros(3), torch.tensor([2.0, 7, 3]), batch.response_mask.sum(1))
        assert weights.tolist() == [0.5, 0.0, 3.0]
        assert torch.isfinite(one.estimate_advantage(FakeRun(), batch)).all()

    def test_the_heavier_trajectory_pulls_the_baseline(self):
        """w = e of the right one: W is e^2 times that of the wrong one."""
        batch = make([[1]] * 2, [[-1.0]] * 2, [[-2.0], [-1.0]], [1.0, 0], ["0-1-0"] * 2)
        run = FakeRun()
        found = plugin(norm_by_std=False).estimate_advantage(run, batch)[:, 0]
        level = math.e**2 / (math.e**2 + 1)
        assert found.tolist() == pytest.approx([1 - level, -level], abs=1e-6)
        assert run.metrics["baseline_minus_group_mean"] == pytest.approx(level - 0.5, abs=1e-6)
        assert run.metrics["weight_top1_share"] == pytest.approx(level, abs=1e-6)

    def test_truncated_weights_and_the_authors_norm(self):
        c, w = 2.0, torch.tensor([1.0, 3.0]).log()
        norms, lengths = torch.tensor([4.0, 4.0]), torch.tensor([1, 1])
        found = {
            "w": plugin(rollout_is_threshold=c),
            "clipped": plugin(rollout_is_threshold=c, use_clipped_is_ratios=True),
            "none": plugin(rollout_is_threshold=c, use_is_weights=False),
            "authors": plugin(rollout_is_threshold=c, grad_norm_includes_is=True),
        }
        weights = {name: one.weights(w, norms, lengths).tolist() for name, one in found.items()}
        assert weights["w"] == pytest.approx([4, 36]) and weights["clipped"] == pytest.approx([4, 16])
        assert weights["none"] == pytest.approx([4, 4]) and weights["authors"] == pytest.approx([4, 144])

    def test_on_policy_and_by_length_it_is_the_length_weighted_mean(self):
        batch = make([[1, 1], [1, 0]], [[-1.0, -1]] * 2, [[-1.0, -1]] * 2, [1.0, 0], ["0-1-0"] * 2)
        found = plugin(score_norm="length", norm_by_std=False).estimate_advantage(FakeRun(), batch)
        assert found[:, 0].tolist() == pytest.approx([1 / 3, -2 / 3], abs=1e-6)

    @pytest.mark.parametrize("settings", [{}, {"scope": "minibatch"}, {"agg_mode": "median"}])
    @pytest.mark.parametrize("seed", range(3))
    def test_order_of_rows_does_not_matter(self, settings, seed):
        batch = random_batch(seed)
        found = plugin(**settings).estimate_advantage(FakeRun(), batch)
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(batch)))
        fields = ("response_mask", "old_log_probs", "rollout_log_probs", "sum_pi_squared")
        other = Batch.from_tensors(
            uid=[batch.uid[row] for row in order.tolist()],
            rm_scores=batch.rewards[order],
            **{name: getattr(batch, name)[order] for name in fields},
        )
        torch.testing.assert_close(plugin(**settings).estimate_advantage(FakeRun(), other), found[order])

    def test_outputs_of_one_response_are_one_trajectory(self):
        """Two outputs of session 0 add up; the baseline counts the session once."""
        split = make(
            [[1], [1], [1]], [[-1.0]] * 3, [[-1.5], [-1.5], [-1.0]], [0.0, 1, 0], ["0-1-0"] * 3,
            session=[0, 0, 1], turn=[0, 1, 0],
        )  # fmt: skip
        whole = make([[1, 1], [1, 0]], [[-1.0, -1]] * 2, [[-1.5, -1.5], [-1.0, -1]], [1.0, 0], ["0-1-0"] * 2)
        one, other = (plugin().estimate_advantage(FakeRun(), batch) for batch in (split, whole))
        assert one[:, 0].tolist() == pytest.approx([float(other[0, 0])] * 2 + [float(other[1, 0])])

    def test_the_proxy_is_the_score_in_the_logits(self):
        logits = torch.randn(3, 7, dtype=torch.float64)
        probs, labels = logits.softmax(-1), torch.tensor([0, 3, 6])
        expected = (torch.nn.functional.one_hot(labels, 7) - probs).square().sum()
        log_probs = probs[torch.arange(3), labels].log()[None]
        found = logit_proxy(log_probs, probs.square().sum(-1)[None], torch.ones(1, 3))
        assert float(found) == pytest.approx(float(expected))


class Optimizer:
    def __init__(self, *rates):
        self.param_groups = [{"lr": rate} for rate in rates]


def actor(*rates, others=()):
    logged = {}
    gathered = lambda values: torch.cat([values, *map(torch.as_tensor, others)])  # noqa: E731
    return SimpleNamespace(optimizer=Optimizer(*rates), gather=gathered, log=logged.update, logged=logged)


def noted(one, values, counted=None):
    """Micro-batches as the loss sees them."""
    for value in values:
        log_weight = torch.tensor(value).double()
        fields = {LOG_WEIGHT: log_weight, COUNTED: torch.ones(len(value)) if counted is None else torch.tensor(counted)}
        size = (len(value), 1)
        tokens = Tokens(
            log_probs=torch.zeros(size), old_log_probs=torch.zeros(size), advantages=torch.zeros(size),
            response_mask=torch.ones(size).bool(), config=None, extra=fields.__getitem__,
        )  # fmt: skip
        assert one.loss_terms(tokens) is None


def stepped(one, on, fails=False):
    """The rates during the step, and after it."""
    step = one.optimizer_step(on)
    next(step)
    during = [group["lr"] for group in on.optimizer.param_groups]
    with contextlib.suppress(StopIteration, RuntimeError):
        step.throw(RuntimeError("no memory")) if fails else step.send(1.0)
    return during, [group["lr"] for group in on.optimizer.param_groups]


class TestOptimizerStep:
    def test_the_rate_is_lowered_for_the_step_and_put_back(self):
        one, on = plugin(), actor(1e-3, 1e-4)
        noted(one, [[0.0, 0.0], [math.log(3.0)]])
        ratio = 25 / 11 / 3
        during, after = stepped(one, on)
        assert during == pytest.approx([1e-3 * math.sqrt(ratio), 1e-4 * math.sqrt(ratio)], rel=1e-6)
        assert after == [1e-3, 1e-4]
        assert on.logged["ess_ratio"] == pytest.approx(ratio) and on.logged["lr_multiplier"] == pytest.approx(
            ratio**0.5
        )
        assert on.logged["effective_lr"] == pytest.approx(during[0])

    def test_a_step_that_raises_leaves_the_rate_as_it_was(self):
        one, on = plugin(), actor(1e-3)
        noted(one, [[0.0, 5.0]])
        during, after = stepped(one, on, fails=True)
        assert during[0] < 1e-3 and after == [1e-3]

    def test_other_ranks_and_other_mini_batches(self):
        one = plugin()
        noted(one, [[0.0, 0.0]])
        alone = actor(1.0, others=[torch.tensor([0.0, 3.0]).double()])
        stepped(one, alone)
        noted(one, [[0.0, 0.0, 0.0, 3.0]])
        together = actor(1.0)
        stepped(one, together)
        assert alone.logged == pytest.approx(together.logged), "weights of the first mini-batch are gone"

    def test_rows_that_are_no_trajectory_do_not_count(self):
        one, on = plugin(), actor(1.0)
        noted(one, [[0.0, 0.0, 9.0]], counted=[1.0, 1.0, 0.0])
        stepped(one, on)
        assert on.logged["ess_ratio"] == pytest.approx(1.0)

    def test_what_is_no_number_makes_no_step(self, caplog):
        one, on = plugin(), actor(1.0)
        noted(one, [[0.0, math.nan]])
        during, after = stepped(one, on)
        assert (during, after) == ([0.0], [1.0])
        assert on.logged["skipped"] == 1 and "ess" not in on.logged
        assert "effective sample size" in caplog.text

    def test_the_rule_may_be_none(self):
        one, on = plugin(scaling_rule="none"), actor(1.0)
        noted(one, [[0.0, 5.0]])
        assert stepped(one, on)[0] == [1.0]
        assert on.logged["ess_ratio"] < 0.6

    def test_no_weights_no_change(self):
        assert stepped(plugin(), on := actor(1.0))[0] == [1.0]
        assert on.logged["lr_multiplier"] == 1.0

    def test_clipped_weights_count_less(self):
        one = plugin(use_clipped=True, scaling_rule="linear", rollout_is_threshold=2.0)
        noted(one, [[0.0, math.log(10.0)]])
        stepped(one, on := actor(1.0))
        assert on.logged["lr_multiplier"] == pytest.approx(9 / 5 / 2) == on.logged["ess_ratio_clipped"]

    def test_weights_beyond_any_number_are_held(self):
        old = torch.full((1, 3), -1.0)
        found = log_weights(old, old - 100, torch.ones(1, 3))
        assert found.tolist() == [300.0]
        batch = make([[1, 1, 1]] * 2, [[-1.0] * 3] * 2, [[-101.0] * 3, [-1.0] * 3], [1.0, 0], ["0-1-0"] * 2)
        assert torch.isfinite(plugin().estimate_advantage(FakeRun(), batch)).all()
        assert batch.extra(LOG_WEIGHT).tolist() == [LIMIT, 0.0]


class TestCheck:
    GOOD = {"rollout_is": "sequence", "rollout_is_threshold": 8.0, "bypass_mode": False}

    def test_what_verl_must_do(self, sentence):
        config = lambda **changes: OmegaConf.create({"algorithm": {"rollout_correction": {**self.GOOD, **changes}}})  # noqa: E731
        plugin().check(config())
        for key, wrong in (("rollout_is", "token"), ("rollout_is_threshold", 2.0), ("bypass_mode", True)):
            with pytest.raises(CompositionError) as error:
                plugin().check(config(**{key: wrong}))
            sentence(
                error.value,
                f"algorithm.rollout_correction.{key}",
                str(wrong),
                f"set algorithm.rollout_correction.{key}=",
            )
