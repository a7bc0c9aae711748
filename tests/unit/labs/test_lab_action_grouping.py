"""The lab of action grouping: its errors against what theory says of them, its claims, and the page."""

from __future__ import annotations

import pytest
import torch
from lab_page import not_on_page

from verl_plugins.labs import action_grouping
from verl_plugins.labs.action_grouping import VARIANCES, Settings, errors, worths


def test_worths_have_the_mean_and_variance_of_their_setting():
    asked = Settings(responses=4, answers=3, deviation=0.2, prompts=20_000)
    worth, prompt, answer = worths(asked, torch.Generator().manual_seed(0))
    assert worth.shape == prompt.shape == answer.shape == (80_000,)
    assert prompt.tolist() == [number // 4 for number in range(80_000)]
    assert {*answer.tolist()} == {0, 1, 2}
    assert float(worth.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(worth.var()) == pytest.approx(1 / 12 + 0.04, rel=0.03)


@pytest.mark.parametrize("variance", VARIANCES)
def test_errors_of_the_fixed_levels_are_those_of_theory(variance):
    """Singletons: sigma^2. The whole group: sigma^2 / n and what worths of one prompt differ by."""
    found = errors(Settings(), variance, torch.Generator().manual_seed(1))
    assert found["singletons"] == pytest.approx(variance, rel=0.03)
    apart = 7 / 8 * (0.08**2 + 2 / 3 / 12)
    assert found["all"] == pytest.approx(variance / 8 + apart, rel=0.03)
    parts = 3 * (1 - (2 / 3) ** 8) / 8
    assert found["by answer"] == pytest.approx(variance * parts + 0.08**2 * (1 - parts), rel=0.03)


class TestLab:
    @pytest.fixture(scope="class")
    def found(self):
        return action_grouping.lab(Settings(), 0, lambda share, what: None)

    def test_every_claim_holds_and_stands_on_the_page(self, found):
        assert found.failed == []
        assert not_on_page("action_grouping", found) == []

    def test_the_picture_has_every_way_of_pooling_at_every_noise(self, found):
        (panel,) = found.panels
        assert [curve.label for curve in panel.curves] == ["singletons", "by answer", "all", "select", "shrink"]
        assert all([x**2 for x in curve.x] == pytest.approx(list(VARIANCES)) for curve in panel.curves)

    def test_other_seeds_say_the_same(self):
        assert action_grouping.lab(Settings(prompts=10_000), 5, lambda share, what: None).failed == []

    @pytest.mark.parametrize(
        ("settings", "failed"),
        [
            ({"deviation": 0.0}, ["the best fixed grouping gets coarser as the noise grows"]),
            ({"deviation": 1.0}, ["the best fixed grouping gets coarser as the noise grows"]),
            (
                {"responses": 1},
                ["the best fixed grouping gets coarser as the noise grows", "`select` gains from there on"],
            ),
        ],
    )
    def test_settings_that_break_claims(self, settings, failed):
        found = action_grouping.lab(Settings(prompts=2000, **settings), 0, lambda share, what: None)
        assert {claim.name for claim in found.failed} >= {*failed}
