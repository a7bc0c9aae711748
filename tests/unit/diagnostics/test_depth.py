"""Variability, geometry and lengths by depth and frequency: formulas, degenerate cases, what the plugins log."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from states import batch_of, hidden_of

from verl_plugins import Plugin
from verl_plugins.composition.settings import typed
from verl_plugins.diagnostics.classes import by_class, quotient
from verl_plugins.diagnostics.mgt import ManifoldGeometry, depth_geometry
from verl_plugins.diagnostics.nc_deep_linear import NCDeepLinear, frame_errors, slope
from verl_plugins.diagnostics.nc_perturbation import NCPerturbation, depth_nc1
from verl_plugins.testing import FakeRun

UID = ["1-1-0"] * 2 + ["2-1-1"] * 2
LABELS = [0, 0, 1, 1, 2, 2, 2, 0]
ROWS = [0, 0, 1, 1, 2, 2, 3, 3]
DECAY = OmegaConf.create({"actor_rollout_ref": {"actor": {"optim": {"weight_decay": 0.01}}}})


def states(layers: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(8, layers, 5, generator=torch.Generator().manual_seed(seed))


def made(cls: type[Plugin], **given: object) -> Plugin:
    return cls(typed(cls.Config, {"freq": 1, **given}, f"plugins.{cls.name}"))


def logged(plugin: Plugin, features: torch.Tensor | None, step: int = 1, labels=LABELS, **more) -> dict[str, float]:
    run, hidden = FakeRun(step=step, config=DECAY), None
    if features is not None:
        label = torch.tensor(labels)
        pooled = features.view(4, 2, *features.shape[1:]).mean(1)
        hidden = hidden_of(features, ROWS, pooled, label=label, head_row=2.0 * torch.eye(9)[label])
    plugin.observe(run=run, batch=batch_of(hidden, UID, [1.0, 0, 0, 1], **more))
    assert all(math.isfinite(value) for value in run.metrics.values())
    return run.metrics


class TestVariability:
    def test_of_each_layer_as_if_it_were_the_only_one(self):
        features, labels = states(3), torch.tensor(LABELS)
        found = depth_nc1(features, labels)
        alone = [float(quotient(by_class(features[:, layer], labels))) for layer in range(3)]
        assert found.quotient.tolist() == pytest.approx(alone)
        assert found.ratio.tolist() == pytest.approx([alone[1] / alone[0], alone[2] / alone[1]])

    def test_undefined_layers(self):
        features = states(3)
        features[:, 1] = 1.0
        found = depth_nc1(features, torch.tensor(LABELS))
        assert found.quotient.isnan().tolist() == [False, True, False] and found.ratio.isnan().all()
        assert depth_nc1(states(1), torch.tensor(LABELS)).ratio.tolist() == []
        assert depth_nc1(states(2), torch.zeros(8).long()).quotient.isnan().all()

    def test_classes_of_too_few(self):
        labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
        kept = depth_nc1(states(2)[:6], labels[:6]).quotient
        assert torch.equal(depth_nc1(states(2), labels, at_least=3).quotient, kept)

    def test_metrics_of_prompts_and_of_tokens(self):
        features = states(3)
        pooled = features.view(4, 2, 3, 5).mean(1)
        for mode, part, labels in (
            ("uid", pooled, torch.tensor([0, 0, 1, 1])),
            ("token", features, torch.tensor(LABELS)),
        ):
            found = logged(made(NCPerturbation, labels=mode, layer_step=1), features)
            expected = depth_nc1(part, labels)
            assert [found[f"quotient_layer_{layer}"] for layer in (1, 2, 3)] == pytest.approx(
                expected.quotient.tolist()
            )
            assert found["min_ratio"] == pytest.approx(float(expected.ratio.min()))
            assert found["min_ratio_layer"] == 2 + int(expected.ratio.argmin())
            assert found["fraction_decreasing"] == float((expected.ratio < 1).double().mean())

    def test_one_layer_has_no_ratio_and_layers_are_numbered_as_in_the_model(self):
        assert set(logged(made(NCPerturbation, layer_step=4), states(3))) == {"quotient_layer_3"}
        assert set(logged(made(NCPerturbation, layer_step=2), states(3))) > {"quotient_layer_2", "quotient_layer_3"}

    def test_alike_rollouts_have_quotient_zero_and_no_ratio(self):
        features = states(2)
        features[:] = features[torch.tensor([0, 0, 0, 0, 4, 4, 4, 4])]
        found = logged(made(NCPerturbation, layer_step=1), features)
        assert found == {"quotient_layer_1": 0, "quotient_layer_2": 0}

    def test_silent_between(self):
        assert logged(made(NCPerturbation, freq=2), states(2), step=2) == logged(made(NCPerturbation), None) == {}

    def test_wishes(self):
        wish = made(NCPerturbation, layer_step=3).hidden_wish()
        assert (wish.tokens, wish.layer_step, wish.head_rows) == (0, 3, False)
        assert made(NCPerturbation, labels="token", tokens_per_response=5).hidden_wish().tokens == 5


class TestGeometry:
    def test_metrics_are_those_of_the_states(self):
        features = states(3)
        found, expected = (
            logged(made(ManifoldGeometry, layer_step=1), features),
            depth_geometry(features.transpose(0, 1)),
        )
        for place, layer in enumerate((1, 2, 3)):
            assert found[f"eff_rank_{layer}"] == pytest.approx(float(expected["effective_rank"][place]), rel=1e-5)
            assert found[f"cos_{layer}"] == pytest.approx(float(expected["mean_pairwise_cosine"][place]), abs=1e-5)
            assert found[f"norm_{layer}"] == pytest.approx(float(expected["mean_norm"][place]))
        assert found["eff_rank_last"] == found["eff_rank_3"] and found["n_tokens"] == 8
        assert found["min_layer_cos"] == pytest.approx(float(expected["layer_to_layer_cosine"].min()))
        assert found["min_update_alignment"] == pytest.approx(float(expected["update_alignment"].min()))

    def test_fewer_tokens_and_one_layer(self):
        found = logged(made(ManifoldGeometry, max_tokens=1), states(2))
        assert found == {
            "eff_rank_2": pytest.approx(1),
            "cos_2": 1,
            "norm_2": pytest.approx(float(states(2)[0, 1].norm())),
            "eff_rank_last": pytest.approx(1),
            "n_tokens": 1,
        }

    def test_nothing_to_measure(self):
        assert logged(made(ManifoldGeometry), None) == logged(made(ManifoldGeometry, freq=3), states(2), step=2) == {}
        run = FakeRun()
        empty = hidden_of(torch.zeros(0, 2, 5), [], torch.zeros(4, 2, 5))
        made(ManifoldGeometry).observe(run=run, batch=batch_of(empty, UID, [0.0] * 4, response_mask=torch.zeros(4, 1)))
        assert run.metrics == {}


class TestLengths:
    @settings(max_examples=40, deadline=None)
    @given(st.floats(-2, 2), st.floats(0.1, 9))
    def test_a_power_law_has_its_exponent(self, exponent, factor):
        counts = torch.tensor([4.0, 9, 31, 100]).double()
        assert slope(counts, factor * counts**exponent) == pytest.approx(exponent, abs=1e-9)

    def test_of_equal_counts_it_is_undefined(self):
        assert math.isnan(slope(torch.full((3,), 5.0), torch.rand(3)))

    def test_orthogonal_means_have_no_error(self):
        assert frame_errors(torch.diag(torch.tensor([1.0, 5, 3]))) == (0, 0)
        rms, largest = frame_errors(torch.tensor([[1.0, 0], [1, 1], [0, -2]]))
        cosines = [0.5**0.5, 0.0, -(0.5**0.5)]
        assert rms == pytest.approx((sum(c * c for c in cosines) / 3) ** 0.5) and largest == pytest.approx(0.5**0.5)

    def test_metrics(self):
        features, labels = states(2), torch.tensor(LABELS)
        found = logged(made(NCDeepLinear, min_per_class=2), features)
        classes = by_class(features[:, -1], labels)
        counts, lengths = [3, 2, 3], classes.means.norm(dim=1).tolist()
        x = [math.log(n) - sum(map(math.log, counts)) / 3 for n in counts]
        expected = sum(a * math.log(b) for a, b in zip(x, lengths, strict=True)) / sum(a * a for a in x)
        assert found["norm_slope_feature"] == pytest.approx(expected)
        assert found["norm_slope_head"] == pytest.approx(0, abs=1e-9) and found["n_classes"] == 3
        assert (found["of_error"], found["of_error_max"]) == pytest.approx(frame_errors(classes.means))
        assert "predicted_collapse" not in found

    def test_too_few_classes_and_equal_sizes(self):
        assert logged(made(NCDeepLinear, min_per_class=3), states(1)) == {"n_classes": 2}
        found = logged(made(NCDeepLinear, min_per_class=2), states(1), labels=[0, 0, 1, 1, 2, 2, 3, 3])
        assert found.keys() == {"n_classes", "of_error", "of_error_max"}

    @pytest.mark.parametrize(("decay", "lost"), [(None, 0.0), (0.24, 0.0), (0.3, 1 / 3), (0.4, 1.0)])
    def test_which_vanish_with_one_layer(self, decay, lost):
        """Of 3, 2 and 3 of 8 tokens those whose share is at most lw N lh vanish."""
        plugin = made(NCDeepLinear, min_per_class=2, feature_decay=1.0, weight_decay=decay)
        assert logged(plugin, states(1))["predicted_collapse"] == pytest.approx(lost)

    def test_more_layers_lose_more(self):
        few, more = (
            logged(made(NCDeepLinear, feature_decay=1.0, weight_decay=0.3, layers=layers), states(1))
            for layers in (1, 2)
        )
        assert few["predicted_collapse"] < more["predicted_collapse"] == 1

    def test_without_decay_nothing_is_predicted(self):
        run = FakeRun(config=OmegaConf.create({"actor_rollout_ref": {"actor": {"optim": {"weight_decay": 0.0}}}}))
        hidden = hidden_of(states(1), ROWS, states(1)[:4], head_row=torch.eye(8))
        made(NCDeepLinear, feature_decay=1.0).observe(run=run, batch=batch_of(hidden, UID, [0.0] * 4))
        assert run.metrics == {"n_classes": 1}

    def test_wish(self):
        wish = made(NCDeepLinear, tokens_per_response=3).hidden_wish()
        assert (wish.tokens, wish.head_rows, wish.argmax, wish.layer_step) == (3, True, False, None)
        assert logged(made(NCDeepLinear), None) == {}
