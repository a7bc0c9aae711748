"""RiskPO's quantiles: tracked over steps, the nearest level, and what is remembered."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_riskpo import FEW, estimate, method, prompts_of

from verl_plugins import Groups
from verl_plugins.advantage.riskpo import LEVELS, at_level, make_papers, nearest, track


class TestTracking:
    @FEW
    @given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=9), min_size=1, max_size=4))
    def test_is_what_plain_python_computes(self, steps):
        tracked, expected = torch.zeros(0), None
        for scores in steps:
            tracked = track(tracked, torch.tensor(scores).double(), 0.1)
            if expected is None:
                expected = [np.quantile(scores, level) for level in LEVELS.tolist()]
            else:
                below = [sum(score < q for score in scores) / len(scores) for q in expected]
                expected = [q + 0.1 * (a - b) for q, a, b in zip(expected, LEVELS.tolist(), below, strict=True)]
            assert tracked.tolist() == pytest.approx(expected, abs=1e-9)

    def test_finds_the_quantiles_of_what_it_sees(self):
        rng, tracked = np.random.default_rng(0), torch.zeros(0)
        for _ in range(400):
            tracked = track(tracked, torch.tensor(rng.normal(3, 1, 64)), 0.1)
        assert at_level(tracked, 0.5) == pytest.approx(3, abs=0.15)
        assert at_level(tracked, 0.2) == pytest.approx(3 - 0.8416, abs=0.15)

    def test_the_nearest_level_the_lower_of_two(self):
        assert at_level(LEVELS, 0.2) == at_level(LEVELS, 0.22) == at_level(LEVELS, 0.225) == 0.2
        assert at_level(LEVELS, 0.99) == 0.95

    def test_a_step_uses_the_quantiles_of_the_steps_before(self):
        easy, hard = prompts_of([3, 2, 3, 4]), prompts_of([0, 1, 0, 0])
        plugins = {mode: method(quantiles=mode, credit="uniform", scale="none") for mode in ("track", "batch", "mix")}
        first = [estimate(*easy, plugin=plugin).tolist() for plugin in plugins.values()]
        assert first[0] == first[1] == first[2]
        track_, batch, mix = (estimate(*hard, plugin=plugin) for plugin in plugins.values())
        assert (track_ < 0).all(), "all lie below what was tracked"
        assert (batch > 0).any()
        assert torch.equal(batch, estimate(*hard, quantiles="batch", credit="uniform", scale="none"))
        assert ((track_ < mix) & (mix <= batch)).all()

    def test_before_the_first_step_there_is_no_mean_to_subtract(self):
        rows = prompts_of([0, 1, 0, 3], [1, 0, 1, 2])
        for objective in ("mixed", "rvar"):
            one, other = (estimate(*rows, objective=objective, mean_baseline=flag) for flag in (True, False))
            assert torch.equal(one, other)

    def test_a_resumed_run_goes_on_as_if_never_interrupted(self):
        rows, later = prompts_of([0, 1, 0], [1, 0, 1]), prompts_of([1, 1, 0], [0, 0, 0])
        plugin, resumed, fresh = method(), method(), method()
        estimate(*rows, plugin=plugin)
        resumed.load_state_dict(plugin.state_dict())
        expected, found = estimate(*later, plugin=plugin), estimate(*later, plugin=resumed)
        assert torch.equal(expected, found)
        assert torch.equal(plugin.tracked, resumed.tracked)
        assert not torch.equal(expected, estimate(*later, plugin=fresh))


class TestLevels:
    """Of 19 tracked levels the nearest, of two equally near ones the lower."""

    @pytest.mark.parametrize(
        ("level", "place"),
        [
            (0.05, 0),
            (0.01, 0),
            (0.074, 0),
            (0.075, 0),
            (0.076, 1),
            (0.225, 3),
            (0.5, 9),
            (0.825, 15),
            (0.95, 18),
            (0.99, 18),
        ],
    )
    def test_nearest(self, level, place):
        assert nearest(level) == place
        assert float(at_level(torch.arange(19.0), level)) == place

    def test_the_mean_of_both(self):
        """`mix`: halfway between the bundle's own and the tracked quantiles."""
        plugin, groups = method(quantiles="mix", bundle_size=1), Groups(["1-1-0"] * 5)
        plugin.tracked = torch.linspace(10, 28, 19, dtype=torch.float64)
        papers = make_papers(
            torch.tensor([0.0, 1, 2, 3, 4]), groups, torch.arange(5), torch.zeros(1, dtype=torch.int64)
        )
        low, high = plugin.limits(papers)
        assert (low.item(), high.item()) == pytest.approx(((0.8 + 13) / 2, (3.2 + 25) / 2))
