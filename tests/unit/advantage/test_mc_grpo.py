"""MC-GRPO: median baseline, one response per group left out."""

from __future__ import annotations

import pytest
import torch
from advantages import batch_of, outcomes, per_row
from fakes import FakeRun
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from verl_plugins import Batch, CompositionError, DataError
from verl_plugins.advantage.mc_grpo import McGrpo, median_advantage

FEW = settings(max_examples=50, deadline=None)


def method(**options) -> McGrpo:
    return McGrpo(McGrpo.Config(**options))


def estimate(uid, scores, run=None, fields=None, **options) -> torch.Tensor:
    return per_row(method(**options).estimate_advantage(run or FakeRun(), batch_of(uid, scores, **(fields or {}))))


def dropped(uid, scores, run=None, options=None, **fields) -> list[bool]:
    batch = batch_of(uid, scores, **fields)
    method(**(options or {})).select_rows(run or FakeRun(), batch)
    return batch.dropped.tolist()


class TestAdvantage:
    """(r - m) / (d + epsilon) with lower medians."""

    @FEW
    @given(outcomes(), st.randoms(use_true_random=False))
    def test_row_order_does_not_matter(self, rows, random):
        uid, scores = rows
        order = random.sample(range(len(uid)), len(uid))
        found = estimate([uid[row] for row in order], [scores[row] for row in order])
        assert torch.equal(estimate(uid, scores)[order], found)

    @FEW
    @given(outcomes(), st.integers(-8, 8), st.sampled_from(["mad", "none"]))
    def test_shift(self, rows, shift, scale):
        uid, scores = rows
        moved = [score + shift for score in scores]
        assert torch.equal(estimate(uid, scores, scale=scale), estimate(uid, moved, scale=scale))

    @FEW
    @given(outcomes())
    def test_float32_suffices(self, rows):
        double = estimate(*rows, fields={"dtype": torch.float64})
        torch.testing.assert_close(estimate(*rows), double, rtol=1e-5, atol=1e-6)

    @FEW
    @given(outcomes(distinct=True))
    def test_one_response_of_each_group_is_at_its_median(self, rows):
        uid, scores = rows
        zero = estimate(uid, scores) == 0
        assert sum(zero.tolist()) == len(set(uid))

    @pytest.mark.parametrize("scale", ["mad", "std", "none"])
    @pytest.mark.parametrize("score", [0.0, 0.1, 0.7, 1 / 3, -2.3])
    @pytest.mark.parametrize("size", [1, 2, 5, 12, 64])
    def test_equal_groups_are_exactly_zero(self, size, score, scale):
        assert (estimate(["1-1-0"] * size, [score] * size, scale=scale) == 0).all()

    def test_binary_minority_gets_one_over_epsilon(self):
        assert estimate(["1-1-0"] * 5, [0, 1, 0, 0, 1.0]).tolist() == pytest.approx([0, 1000, 0, 0, 1000])
        assert estimate(["1-1-0"] * 5, [0, 1, 1, 1, 1.0], advantage_clip=5.0).tolist() == [-5, 0, 0, 0, 0]

    def test_rescale_counts_the_group(self):
        # 5 responses, 2 of them away from the median: 1000 * 5/2
        assert estimate(["1-1-0"] * 5, [0, 1, 0, 0, 1.0], rescale_nonzero=True)[1] == pytest.approx(2500)

    def test_scales(self):
        # m = 1 (lower median of 0 1 2 5), |r-m| = 1 0 1 4, d = 1, std = sqrt(14/3)
        scores = [0.0, 1.0, 2.0, 5.0]
        assert estimate(["1-1-0"] * 4, scores)[3] == pytest.approx(4 / 1.001)
        assert estimate(["1-1-0"] * 4, scores, scale="none")[3] == 4
        assert estimate(["1-1-0"] * 4, scores, scale="std")[3] == pytest.approx(4 / ((14 / 3) ** 0.5 + 1e-3))

    def test_a_thousandth_is_added_to_the_scale(self):
        given = (torch.tensor(value) for value in ([3.0, 0.0], [1.0, 1.0], [1.0, 0.0]))
        assert median_advantage(*given).tolist() == pytest.approx([2 / 1.001, -1000])

    def test_padding_width(self):
        uid, scores = ["1-1-0"] * 3, [1.0, 0.0, 0.5]
        assert torch.equal(estimate(uid, scores), estimate(uid, scores, fields={"tokens": 9}))

    def test_nan_is_refused(self):
        with pytest.raises(DataError, match="finite"):
            estimate(["1-1-0"] * 2, [1.0, float("nan")])

    def test_metrics(self):
        run = FakeRun()
        estimate(["1-1-0"] * 3 + ["2-1-0"] * 3, [0.0, 0.25, 3.0, 0.0, 0.0, 1.0], run)
        # group 1: mean 1.083, median 0.25, no row away from both disagrees about the sign; group 2: MAD 0
        assert run.metrics["median_mean"] == pytest.approx(0.125)
        assert run.metrics["frac_mad_zero"] == 0.5
        assert run.metrics["frac_zero_adv_rows"] == 0.5
        assert run.metrics["sign_flip_rate"] == 0
        assert run.metrics["abs_adv_max"] == pytest.approx(1000)
        estimate(["1-1-0"] * 5, [0.0, 1.0, 2.0, 3.0, 100.0], run)
        assert run.metrics["sign_flip_rate"] == 0.25, "3 lies above the median and below the mean"


class TestPivot:
    """Exactly one session per group leaves, and its value was taken into account."""

    @FEW
    @given(outcomes(min_groups=2))
    def test_one_per_group(self, rows):
        uid, scores = [*rows[0], "99-1-0", "99-1-0"], [*rows[1], 0.0, 1.0]
        gone = dropped(uid, scores)
        assert sorted(name for name, out in zip(uid, gone, strict=True) if out) == sorted(set(uid))

    def test_first_of_several(self):
        assert dropped(["1-1-0"] * 5, [1, 0, 0, 1, 0.0]) == [False, True, False, False, False]

    def test_all_rows_of_its_session(self):
        uid, scores = ["1-1-0"] * 5, [9.0, 1.0, 0.0, 9.0, 5.0]
        fields = {"session": [0, 0, 1, 2, 2], "turn": [0, 1, 0, 0, 1]}  # sessions: 1, 0 and 5
        assert dropped(uid, scores, **fields) == [True, True, False, False, False]

    def test_incomplete_groups_may_keep_it(self):
        run = FakeRun(config=OmegaConf.create({"actor_rollout_ref": {"rollout": {"n": 3}}}))
        uid = ["1-1-0"] * 3 + ["2-1-0"] * 2
        gone = dropped(uid, [0.0, 1.0, 2.0, 0.0, 1.0], run, {"drop_only_if_complete": True})
        assert gone == [False, True, False, False, False]
        assert run.metrics == {"pivots_dropped": 1}

    def test_kept_rows_have_the_advantage_of_the_whole_group(self):
        uid, scores = ["1-1-0"] * 3, [0.0, 1.0, 4.0]
        full = batch_of(uid, scores)
        part = batch_of(uid[:2], [4.0, 0.0], session=[2, 0], full=full)
        found = method().estimate_advantage(FakeRun(), part)
        assert per_row(found).tolist() == pytest.approx([3 / 1.001, -1 / 1.001])

    def test_only_groups_of_one(self):
        batch = Batch.from_tensors(uid=["1-1-0"], rm_scores=torch.ones(1, 2), response_mask=torch.ones(1, 2))
        with pytest.raises(DataError, match="dropped all 1 rows"):
            method().select_rows(FakeRun(), batch)


def composed(n=5, mini=8, micro=4, dynamic=False):
    actor = {"ppo_mini_batch_size": mini, "ppo_micro_batch_size_per_gpu": micro, "use_dynamic_bsz": dynamic}
    return OmegaConf.create({"actor_rollout_ref": {"rollout": {"n": n}, "actor": actor}})


class TestCheck:
    """Settings of verl it cannot work with."""

    @pytest.mark.parametrize(
        ("config", "names"),
        [
            (composed(n=1), "rollout.n=1"),
            (composed(n=5, mini=8, micro=5), "actor_rollout_ref.actor.use_dynamic_bsz=true"),
        ],
    )
    def test_impossible(self, config, names, sentence):
        with pytest.raises(CompositionError) as error:
            method().check(config)
        sentence(error.value, names)

    @pytest.mark.parametrize(
        "config",
        [OmegaConf.create({}), composed(), composed(3, 4, 8), composed(4, 8, 3), composed(micro=5, dynamic=True)],
    )
    def test_possible(self, config):
        method().check(config)
