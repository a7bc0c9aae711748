"""The entropy law: the fit, which score belongs to which entropy, and what is said of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from fakes import FakeRun
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from verl_plugins import Batch, CompositionError, DataError
from verl_plugins.composition import needs
from verl_plugins.composition.compose import compose
from verl_plugins.diagnostics.entropy_law import NARROW, PICTURE, EntropyLaw, draw, fit, response_entropy

FEW = settings(max_examples=60, deadline=None)
SCORE = "val-core/arithmetic/acc/mean@8"
POINTS = st.lists(st.tuples(st.floats(0, 2), st.floats(0, 1)), min_size=2, max_size=30)


def method(**options) -> EntropyLaw:
    return EntropyLaw(EntropyLaw.Config(**options))


def batch(entropy: float) -> Batch:
    return Batch.from_tensors(
        uid=["1-1-0"] * 2,
        response_mask=torch.tensor([[1, 1, 0], [1, 0, 0]]),
        rm_scores=torch.zeros(2, 3),
        entropy=torch.tensor([[entropy, entropy, 9.0], [entropy, 9.0, 9.0]], dtype=torch.float64),
    )


def play(plugin: EntropyLaw, entropies, scores, run: FakeRun | None = None, before: float | None = None) -> FakeRun:
    """Steps: the entropy of the policy before the update, the score of a validation after it (None: no validation).

    `before` is the score of a validation before the first step.
    """
    run = run or FakeRun()
    if before is not None:
        plugin.on_validation_end({SCORE: before})
    for entropy, score in zip(entropies, scores, strict=True):
        run.metrics = {}
        plugin.observe(run, batch(entropy))
        if score is not None:
            plugin.on_validation_end({SCORE: score})
    return run


class TestFit:
    """Least squares on exp(entropy)."""

    @FEW
    @given(POINTS)
    def test_is_numpys(self, points):
        entropy, score = map(np.array, zip(*points, strict=True))
        assume(np.ptp(np.exp(entropy)) > 1e-3 and np.ptp(score) > 1e-3)
        law = fit(entropy, score)
        slope, intercept = np.polyfit(np.exp(entropy), score, 1)
        assert (law.a, law.b) == (pytest.approx(-slope, abs=1e-8), pytest.approx(intercept, abs=1e-8))
        error = score - law.predicted(entropy)
        assert law.rmse == pytest.approx(math.sqrt(np.mean(error**2)), abs=1e-9)
        assert law.r2 == pytest.approx(np.corrcoef(np.exp(entropy), score)[0, 1] ** 2, abs=1e-6)
        assert law.n == len(points)

    @FEW
    @given(st.floats(0.01, 1), st.floats(0, 1), st.lists(st.floats(0, 2), min_size=3, max_size=20))
    def test_finds_the_law_that_made_the_points(self, a, b, entropy):
        entropy = np.array(entropy)
        assume(np.ptp(entropy) > 0.01)
        law = fit(entropy, b - a * np.exp(entropy))
        assert (law.a, law.b) == (pytest.approx(a, abs=1e-6), pytest.approx(b, abs=1e-6))
        assert law.ceiling == pytest.approx(b - a, abs=1e-6)
        assert law.rmse < 1e-7

    @FEW
    @given(POINTS, st.floats(0.1, 100), st.floats(-5, 5))
    def test_scale_and_shift_of_the_score_carry_over(self, points, scale, shift):
        entropy, score = map(np.array, zip(*points, strict=True))
        assume(np.ptp(np.exp(entropy)) > 1e-3 and np.ptp(score) > 1e-3)
        one, other = fit(entropy, score), fit(entropy, scale * score + shift)
        assert other.a == pytest.approx(scale * one.a, rel=1e-6, abs=1e-6 * scale)
        assert other.b == pytest.approx(scale * one.b + shift, rel=1e-6, abs=1e-6 * scale)
        assert other.rmse == pytest.approx(scale * one.rmse, rel=1e-5, abs=1e-7 * scale)
        assert other.r2 == pytest.approx(one.r2, abs=1e-5)

    @FEW
    @given(POINTS, st.randoms())
    def test_the_order_of_the_points_does_not_matter(self, points, random):
        mixed = random.sample(points, len(points))
        one, other = (fit(*zip(*some, strict=True)) for some in (points, mixed))
        assert (one is None) == (other is None)
        if one is not None and np.ptp([entropy for entropy, _ in points]) > 1e-3:
            assert one.a == pytest.approx(other.a, abs=1e-7)

    @pytest.mark.parametrize(
        "points", [([], []), ([0.5], [0.5]), ([0.5, 0.5], [0.1, 0.2]), ([0.3, 0.3 + 1e-7], [0, 1])]
    )
    def test_too_little_gives_none(self, points):
        assert fit(*points) is None

    def test_a_range_of_entropies_that_is_just_wide_enough(self):
        assert fit([0.0, NARROW], [1.0, 0.0]).a == pytest.approx(1 / NARROW, rel=1e-3)

    def test_scores_that_are_all_alike(self):
        law = fit([0.1, 0.2, 0.3], [0.1 + 0.2] * 3)
        assert (law.a, law.b, law.rmse, law.r2, law.ceiling) == (0, 0.1 + 0.2, 0, None, None)

    @pytest.mark.parametrize("noise", [[0, 1, 0, 1], [0, 0, 0, 1], [2, 1, 0, -1]])
    @pytest.mark.parametrize("score", [0.3, 1.0, 57.1, -0.2])
    def test_the_last_digit_of_a_constant_is_no_law(self, score, noise):
        scores = [score + n * math.ulp(score) for n in noise]
        law = fit([0.9, 0.7, 0.4, 0.2], scores)
        assert (law.a, law.rmse, law.r2, law.ceiling) == (0, 0, None, None)
        assert law.b == pytest.approx(score)

    def test_a_score_that_rises_with_entropy_has_no_ceiling(self):
        law = fit([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
        assert law.a < 0
        assert law.ceiling is None

    def test_scores_that_hardly_differ(self):
        """The variance is too small for a float, but the scores are not all alike."""
        law = fit([0.0, 1.0], [5e-324, 0.0])
        assert (law.a, law.b, law.r2) == (pytest.approx(0), pytest.approx(0), None)


class TestPairing:
    """A validation belongs to the policy whose entropy the next step measures."""

    def test_is_with_the_entropy_of_the_next_step(self):
        plugin = method()
        run = play(plugin, [0.9, 0.8, 0.7, 0.6, 0.5], [0.1, None, 0.2, None, 0.3])
        state = plugin.state_dict()
        assert state["entropy"].tolist() == [0.8, 0.6]
        assert state["score"].tolist() == [0.1, 0.2]
        assert state["waiting"] == 0.3
        assert run.metrics == {"entropy": pytest.approx(0.5), "n": 2}

    def test_the_validation_before_training_is_with_the_entropy_of_the_first_step(self):
        plugin = method()
        run = play(plugin, [0.9, 0.8], [0.2, None], before=0.1)
        state = plugin.state_dict()
        assert (state["entropy"].tolist(), state["score"].tolist()) == ([0.9, 0.8], [0.1, 0.2])
        assert run.metrics["n"] == 2

    def test_a_resumed_run_validates_again_what_its_checkpoint_had_not_seen(self):
        """A checkpoint is saved before the validation of its step; the run that resumes from it begins with one."""
        whole, before, after = method(), method(), method()
        play(whole, [0.9, 0.8, 0.7, 0.6], [0.1, 0.2, 0.3, None])
        play(before, [0.9, 0.8], [0.1, None])
        after.load_state_dict(before.state_dict())
        play(after, [0.7, 0.6], [0.3, None], before=0.2)
        for name in ("entropy", "score"):
            assert after.state_dict()[name].tolist() == whole.state_dict()[name].tolist()

    @pytest.mark.parametrize(("entropy", "score"), [(0.8, math.nan), (0.8, math.inf), (math.nan, 0.2)])
    def test_points_that_are_not_finite_are_left_out(self, entropy, score):
        plugin = method()
        play(plugin, [0.9, entropy, 0.7], [score, 0.3, None])
        state = plugin.state_dict()
        assert (state["entropy"].tolist(), state["score"].tolist()) == ([0.7], [0.3])

    def test_survives_a_restart(self):
        entropies, scores = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [0.1, 0.15, 0.2, 0.22, 0.27, 0.3]
        whole, before, after = method(min_points=3), method(min_points=3), method(min_points=3)
        expected = play(whole, entropies, scores)
        play(before, entropies[:3], scores[:3])
        after.load_state_dict(before.state_dict())
        assert play(after, entropies[3:], scores[3:]).metrics == expected.metrics

    def test_entropy_is_a_mean_over_responses_of_means_over_tokens(self):
        entropy = torch.tensor([[1.0, 2.0, 3.0], [5.0, 7.0, 7.0], [9.0, 9.0, 9.0]])
        mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
        assert response_entropy(entropy, mask) == pytest.approx((2 + 5) / 2)
        order = torch.tensor([2, 1, 0])
        wide = torch.nn.functional.pad(entropy[order], (0, 3), value=4.0)
        assert response_entropy(wide, torch.nn.functional.pad(mask[order], (0, 3))) == pytest.approx((2 + 5) / 2)


class TestMetrics:
    """What is logged, from `min_points` points on."""

    ENTROPY = [0.9, 0.8, 0.7, 0.6, 0.5, 0.45, 0.4]

    def scores(self, a=0.2, b=0.6):
        """Of the policies after each step, whose entropies the next one shows."""
        return [b - a * math.exp(entropy) for entropy in self.ENTROPY[1:]] + [0.99]

    def test_nothing_before_there_are_enough_points(self):
        assert "a" not in play(method(), self.ENTROPY[:5], self.scores()[:5]).metrics
        assert "a" in play(method(), self.ENTROPY[:6], self.scores()[:6]).metrics

    def test_the_law(self):
        run = play(method(), self.ENTROPY, self.scores())
        assert run.metrics == pytest.approx(
            {
                "entropy": 0.4,
                "n": 6,
                "a": 0.2,
                "b": 0.6,
                "ceiling": 0.4,
                "headroom": 0.4 - (0.6 - 0.2 * math.exp(0.4)),
                "rmse": 0,
                "r2": 1,
                "predicted": 0.6 - 0.2 * math.exp(0.4),
                "residual": 0,
            },
            abs=1e-6,
        )

    def test_the_first_points_predict_the_rest(self):
        scores = self.scores()
        scores[-2] += 0.05
        run = play(method(fit_points=5), self.ENTROPY, scores)
        assert run.metrics["a"] == pytest.approx(0.2)
        assert run.metrics["residual"] == pytest.approx(0.05)
        assert run.metrics["n"] == 6

    def test_no_ceiling_where_the_score_rises_with_entropy(self):
        run = play(method(), self.ENTROPY, self.scores(a=-0.2))
        assert run.metrics["a"] == pytest.approx(-0.2)
        assert {"ceiling", "headroom"}.isdisjoint(run.metrics)

    def test_entropies_all_alike_are_not_fitted(self):
        assert "a" not in play(method(), [0.5] * 7, self.scores()).metrics

    def test_is_said_once_that_the_ceiling_is_near(self, caplog):
        play(method(warn_headroom=0.2), self.ENTROPY, self.scores())
        assert ["headroom" in record.message for record in caplog.records] == [True]
        caplog.clear()
        scores = self.scores()
        scores[-2] = 0.9
        run = play(method(warn_headroom=0.0, fit_points=5), self.ENTROPY, scores)
        assert run.metrics["headroom"] == pytest.approx(0.4 - 0.9)
        assert caplog.records == [], "not even if the score is above the ceiling"

    def test_a_ceiling_just_as_far_as_told_is_not_near(self, caplog):
        headroom = play(method(warn_headroom=0.0), self.ENTROPY, self.scores()).metrics["headroom"]
        play(method(warn_headroom=headroom), self.ENTROPY, self.scores())
        assert caplog.records == []


class TestScore:
    """Which metric of the validation is taken."""

    @pytest.mark.parametrize("names", [[], ["val-core/a/acc/mean@8", "val-core/b/acc/mean@8"]])
    def test_must_be_named_unless_there_is_just_one(self, names, sentence):
        with pytest.raises(DataError) as error:
            method().on_validation_end(
                {"val-aux/a/reward/mean@8": 0.1, "val-core/a/acc/std@8": 0.1} | dict.fromkeys(names, 0.5)
            )
        sentence(error.value, "plugins.entropy_law.performance", str(len(names)), *names)

    def test_named(self, sentence):
        plugin = method(performance="val-core/b/acc/mean@8")
        plugin.on_validation_end({"val-core/a/acc/mean@8": 0.1, "val-core/b/acc/mean@8": 0.2})
        assert plugin.state_dict()["waiting"] == 0.2
        with pytest.raises(DataError) as error:
            plugin.on_validation_end({"val-core/a/acc/mean@8": 0.1})
        sentence(error.value, "plugins.entropy_law.performance=val-core/b/acc/mean@8", "val-core/a/acc/mean@8")


class TestPicture:
    """Drawn at the end, beside the metrics."""

    def test_is_drawn_if_there_is_a_fit(self, tmp_path):
        folder = tmp_path / "a project" / "run"
        run = FakeRun(config=OmegaConf.create({"trainer": {"default_local_dir": str(folder)}}))
        plugin = method()
        plugin.on_train_end(run)
        assert not folder.exists()
        play(plugin, TestMetrics.ENTROPY, TestMetrics().scores(), run)
        for _ in range(2):
            plugin.on_train_end(run)
            assert (folder / PICTURE).read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize(("a", "ceiling"), [(0.2, [0.4]), (-0.2, [])])
    def test_shows_points_law_and_ceiling(self, monkeypatch, tmp_path, a, ceiling):
        figures = []
        monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
        entropy = [0.9, 0.6, 0.3]
        score = [0.6 - a * math.exp(one) for one in entropy]
        draw(fit(entropy, score), entropy, score, tmp_path / PICTURE)
        (axes,) = figures[0].axes
        (points,), (law, *flat) = axes.collections, axes.lines
        np.testing.assert_allclose(points.get_offsets(), list(zip(entropy, score, strict=True)))
        shades = points.norm(points.get_array())
        assert 0 < shades[0] < shades[1] < shades[2], "later points are darker, and none is white"
        x, y = law.get_data()
        assert (x.min(), x.max()) == (0, 0.9), "the ceiling is where the entropy is used up"
        np.testing.assert_allclose(y, 0.6 - a * np.exp(x))
        assert [line.get_ydata()[0] for line in flat] == pytest.approx(ceiling)


class TestRefusals:
    """Settings under which there would never be a fit."""

    @pytest.mark.parametrize(
        ("overrides", "parts"),
        [
            (["trainer.test_freq=-1"], ["plugins.entropy_law", "trainer.test_freq=-1"]),
            (["trainer.test_freq=0"], ["trainer.test_freq=0"]),
            (["trainer.test_freq=45"], ["trainer.test_freq=45", "trainer.total_training_steps=45"]),
            (["plugins.entropy_law.fit_points=3"], ["plugins.entropy_law.fit_points=3", "min_points=5"]),
            (["algorithm.rollout_correction.bypass_mode=True"], ["'entropy_law'", "bypass_mode=True"]),
        ],
    )
    def test_one_sentence(self, overrides, parts, sentence):
        with pytest.raises(CompositionError) as error:
            needs.check(compose("entropy_law", "cpu", overrides))
        sentence(error.value, *parts)

    @pytest.mark.parametrize("recipe", ["entropy_law", "vade+entropy_law", "clip_cov+entropy_law", "steer+entropy_law"])
    def test_goes_with_anything(self, recipe):
        needs.check(compose(recipe, "cpu", []))

    @pytest.mark.parametrize("override", ["trainer.test_freq=1", "plugins.entropy_law.fit_points=5"])
    def test_just_enough(self, override):
        needs.check(compose("entropy_law", "cpu", [override]))
