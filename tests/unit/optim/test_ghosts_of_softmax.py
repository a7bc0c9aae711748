"""Ghosts of softmax: how far a step may go, and what is left of one that goes further."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from verl_plugins import CompositionError
from verl_plugins.optim.ghosts_of_softmax import (
    FLOOR,
    GhostsOfSoftmax,
    inverse_radius,
    scale,
    spread,
    top2,
)
from verl_plugins.testing import FakeActor

FEW = settings(max_examples=50, deadline=None)
SEED = st.integers(0, 10_000)
SHAPE = st.tuples(st.integers(1, 7), st.integers(2, 6))


def draw(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestRadius:
    @FEW
    @given(SHAPE, SEED, st.floats(-1e3, 1e3))
    def test_a_constant_on_all_logits_of_a_token_has_no_effect(self, shape, seed, constant):
        change = draw(shape, seed)
        assert torch.allclose(spread(change + constant), spread(change), atol=1e-9)

    @FEW
    @given(SHAPE, SEED)
    def test_by_the_formula(self, shape, seed):
        change = draw(shape, seed)
        by_hand = max(max(row) - min(row) for row in change.tolist()) / math.pi
        assert inverse_radius(spread(change)) == pytest.approx(by_hand)
        assert inverse_radius(spread(change).flip(0)) == inverse_radius(spread(change))

    @FEW
    @given(SHAPE, SEED, st.floats(0.01, 100))
    def test_twice_the_effect_is_half_the_distance(self, shape, seed, by):
        delta = spread(draw(shape, seed))
        assert inverse_radius(by * delta) == pytest.approx(by * inverse_radius(delta))

    @FEW
    @given(SHAPE, SEED, st.floats(0.01, 1), st.floats(0.01, 1))
    def test_a_smaller_quantile_lets_steps_go_further(self, shape, seed, one, other):
        delta = spread(draw(shape, seed))
        low, high = sorted([one, other])
        assert inverse_radius(delta, quantile=low) <= inverse_radius(delta, quantile=high) <= inverse_radius(delta)

    def test_a_quantile_is_interpolated(self):
        delta = torch.tensor([4.0, 1.0, 2.0, 3.0, 5.0], dtype=torch.float64)
        assert inverse_radius(delta, quantile=0.9) == pytest.approx(4.6 / math.pi)

    @FEW
    @given(SHAPE, SEED)
    def test_the_two_likeliest_alone_are_less_careful(self, shape, seed):
        logits, change = draw(shape, seed), draw(shape, seed + 1)
        margin, gap = top2(logits, change)
        for row in range(shape[0]):
            first, second = sorted(range(shape[1]), key=lambda k: -float(logits[row, k]))[:2]
            assert float(margin[row]) == pytest.approx(float(logits[row, first] - logits[row, second]))
            assert float(gap[row]) == pytest.approx(abs(float(change[row, first] - change[row, second])))
        assert inverse_radius(gap, margin) <= inverse_radius(spread(change)) + 1e-12

    def test_a_margin_lengthens_the_radius(self):
        gap, margin = torch.tensor([2.0]), torch.tensor([4.0])
        assert 1 / inverse_radius(gap, margin) == pytest.approx(math.hypot(4, math.pi) / 2)

    @pytest.mark.parametrize("delta", [torch.zeros(0), torch.zeros(3)], ids=["no token", "no effect"])
    def test_nothing_that_happens_never_caps(self, delta):
        assert 1 / inverse_radius(delta) == pytest.approx(math.pi / FLOOR)
        assert scale(1e6 * inverse_radius(delta)) == 1

    @pytest.mark.parametrize("wrong", [math.nan, math.inf])
    def test_an_effect_that_is_no_number_is_none_to_go_on_with(self, wrong):
        assert scale(3.0 * inverse_radius(torch.tensor([1.0, wrong]))) == 0

    @FEW
    @given(st.floats(0, 1e6), st.floats(0.1, 10))
    def test_what_is_left_is_within_the_target(self, ratio, target):
        assert scale(ratio) == scale(ratio, 1.0)
        by = scale(ratio, target)
        assert 0 < by <= 1 and by * ratio <= target * (1 + 1e-12)
        assert (by == 1) == (ratio <= target)


def step(actor: FakeActor, rate: float = 1e-3, **config: Any) -> dict[str, float]:
    """One step of the actor's optimiser under the plugin; what was logged."""
    plugin = GhostsOfSoftmax(GhostsOfSoftmax.Config(**config))
    actor.optimizer.param_groups[0]["lr"], actor.metrics = rate, {}
    actor.accumulate()
    wrapped = plugin.optimizer_step(actor)
    next(wrapped)
    norm = actor.optimizer_step()
    with pytest.raises(StopIteration) as end:
        wrapped.send(norm)
    assert end.value.value == norm
    return actor.metrics


def flat(actor: FakeActor) -> torch.Tensor:
    return torch.cat([part.flatten() for part in actor.parameters()]).clone()


def plain(rate: float) -> tuple[FakeActor, torch.Tensor, torch.Tensor]:
    """An actor that has made a step without the plugin, and where it was before and is now."""
    actor = FakeActor()
    before = flat(actor)
    actor.optimizer.param_groups[0]["lr"] = rate
    actor.accumulate()
    actor.optimizer_step()
    return actor, before, flat(actor)


def by_derivative(before: torch.Tensor, after: torch.Tensor) -> float:
    """r of the step from before to after, by the Jacobian-vector product."""
    module, place, given, along = FakeActor().module, 0, {}, {}
    for name, parameter in module.named_parameters():
        size = parameter.numel()
        given[name] = before[place : place + size].reshape(parameter.shape)
        along[name] = (after - before)[place : place + size].reshape(parameter.shape)
        place += size
    call = lambda values: torch.func.functional_call(module, values, (torch.arange(16),))  # noqa: E731
    _, change = torch.func.jvp(call, (given,), (along,))
    return float((change.amax(-1) - change.amin(-1)).max()) / math.pi


class TestPlugin:
    def test_the_derivative_is_taken_forwards_at_the_displacement_asked_for(self):
        _, before, after = plain(0.5)
        actor, length = FakeActor(), float((after - before).norm())
        distance = 0.3 * float(before.norm())
        sizes = [part.numel() for part in actor.parameters()]

        def parts(values: torch.Tensor) -> list[torch.Tensor]:
            split = zip(values.split(sizes), actor.parameters(), strict=True)
            return [one.reshape(part.shape) for one, part in split]

        further = before + distance / length * (after - before)
        change = (actor.logits(16, at=parts(further)) - actor.logits(16, at=parts(before))) / distance
        expected = length * float((change.amax(-1) - change.amin(-1)).max()) / math.pi
        told = step(actor, 0.5, mode="diagnose", displacement=0.3)
        assert told["r_proposed"] == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize("rate", [1e-3, 0.1, 10.0])
    @pytest.mark.parametrize("target", [0.5, 1.0])
    def test_the_step_is_as_long_as_the_radius_allows_and_no_longer(self, rate, target):
        other, before, after = plain(rate)
        ratio = by_derivative(before, after)
        actor = FakeActor()
        told = step(actor, rate, target_r=target, displacement=1e-4)
        assert told["r_proposed"] == pytest.approx(ratio, rel=0.02)
        by = min(1.0, target / told["r_proposed"])
        assert told["scale"] == pytest.approx(by) and told["capped"] == float(by < 1)
        assert told["r_applied"] == pytest.approx(by * told["r_proposed"])
        assert told["update_norm"] == pytest.approx(float((after - before).norm()), rel=1e-4)
        assert told["rho_a"] == pytest.approx(told["update_norm"] / told["r_proposed"])
        torch.testing.assert_close(flat(actor), before + by * (after - before))
        moments = [optimizer.state_dict()["state"] for optimizer in (actor.optimizer, other.optimizer)]
        for key, state in moments[0].items():
            assert torch.equal(state["exp_avg_sq"], moments[1][key]["exp_avg_sq"])

    @pytest.mark.parametrize("config", [{"mode": "diagnose"}, {"target_r": 1e9}, {"every": 2}])
    def test_what_is_not_capped_is_the_optimiser_s_to_the_last_bit(self, config):
        actor = FakeActor()
        actor.step = 2
        step(actor, 0.5, **config)
        reference = FakeActor()
        reference.step = 2
        reference.optimizer.param_groups[0]["lr"] = 0.5
        reference.accumulate()
        reference.optimizer_step()
        assert torch.equal(flat(actor), flat(reference))

    def test_measuring_says_what_a_cap_would_do(self):
        told, capped = step(FakeActor(), 1.0, mode="diagnose"), step(FakeActor(), 1.0)
        assert told["scale"] == capped["scale"] < 1
        assert (told["capped"], capped["capped"]) == (0, 1)
        assert told["r_applied"] == told["r_proposed"] == capped["r_proposed"]

    def test_steps_between_probes_are_let_alone(self):
        actor = FakeActor()
        looked = {number: bool(step_at(actor, number, every=3)) for number in range(1, 6)}
        assert looked == {1: True, 2: False, 3: False, 4: True, 5: False}

    def test_a_few_tokens_a_quantile_and_another_radius_let_it_go_further(self):
        whole = step(FakeActor(), 1.0)["r_proposed"]
        for config in ({"probe_tokens": 1}, {"quantile": 0.5}, {"radius": "top2"}):
            assert 0 < step(FakeActor(), 1.0, **config)["r_proposed"] < whole

    def test_delta_is_the_spread_along_the_unit_step(self):
        told = step(FakeActor(), 1e-2)
        assert told["delta_a"] == pytest.approx(math.pi / told["rho_a"])
        assert 0 < told["delta_a_p99"] <= told["delta_a"]
        assert told["probe_noise"] == 0
        other = step(FakeActor(), 1e-2, quantile=0.3)
        assert other["delta_a"] == pytest.approx(told["delta_a"]) and other["rho_a"] > told["rho_a"]

    def test_noise_is_what_two_passes_at_one_place_differ_by(self):
        class Noisy(FakeActor):
            def logits(self, tokens, at=None):
                made = super().logits(tokens, at) + 1e-3 * self.calls * torch.arange(16.0)
                self.calls += 1
                return made

        actor = Noisy()
        actor.calls = 0
        told = step(actor, 1e-2, displacement=1e-2)
        start = float(flat(FakeActor()).norm())
        expected = told["update_norm"] * 15e-3 / (1e-2 * start) / math.pi
        assert told["probe_noise"] == pytest.approx(expected, rel=1e-3)


def step_at(actor: FakeActor, number: int, **config: Any) -> dict[str, float]:
    actor.step = number
    return step(actor, **config)


class TestDegenerate:
    def test_a_step_that_was_left_out_is_not_probed(self):
        actor = FakeActor()
        actor.logits = None
        assert step(actor, 0.0) == {
            "scale": 1,
            "capped": 0,
            "r_proposed": 0,
            "r_applied": 0,
            "update_norm": 0,
        }

    @pytest.mark.parametrize("wrong", [math.nan, math.inf])
    def test_weights_that_are_no_numbers_are_taken_back(self, wrong, caplog):
        actor = FakeActor()
        before, actor.optimizer.step = flat(actor), lambda: actor.parameters()[0].fill_(wrong)
        assert step(actor) == {"scale": 0, "capped": 1}
        assert torch.equal(flat(actor), before)
        assert "step 1: the update's effect on logits is no number" in caplog.text

    @pytest.mark.parametrize(("mode", "kept"), [("cap", True), ("diagnose", False)])
    def test_logits_that_are_no_numbers_are_none_to_go_on_with(self, mode, kept, caplog):
        actor = FakeActor()
        before = flat(actor)
        actor.logits = lambda tokens, at=None: torch.full((3, 4), math.inf)
        assert step(actor, mode=mode) == {"scale": 0, "capped": float(kept)}
        assert torch.equal(flat(actor), before) == kept

    def test_no_token_caps_nothing_and_says_nothing_of_tokens(self):
        actor = FakeActor()
        actor.logits = lambda tokens, at=None: torch.zeros(0, 5)
        told = step(actor, 10.0)
        assert (told["scale"], told["capped"]) == (1, 0)
        assert told["rho_a"] == pytest.approx(math.pi / FLOOR) and not {"delta_a", "delta_a_p99"} & told.keys()

    def test_weights_of_length_zero_are_probed_by_the_step_itself(self):
        actor = FakeActor()
        for part in actor.parameters():
            part.zero_()
        assert step(actor, 1e-2)["scale"] == 1

    def test_frozen_parameters_are_no_part_of_the_step(self):
        actor = FakeActor()
        actor.module.layer.weight.requires_grad_(False)
        before = actor.module.layer.weight.clone()
        actor.optimizer = torch.optim.AdamW([part for part in actor.module.parameters() if part.requires_grad])
        assert step(actor, 10.0)["capped"] == 1
        assert torch.equal(actor.module.layer.weight, before)

    def test_an_error_in_the_step_comes_through(self):
        actor = FakeActor()
        wrapped = GhostsOfSoftmax(GhostsOfSoftmax.Config()).optimizer_step(actor)
        next(wrapped)
        with pytest.raises(ZeroDivisionError):
            wrapped.throw(ZeroDivisionError())


class TestRanks:
    """The largest effect of all ranks decides, and every rank makes the same of its step."""

    def test_the_rank_with_the_largest_effect_decides(self):
        alone = [self.of(lambda whole, part=part: whole[part], lambda values: values) for part in PARTS]
        assert alone[0]["r_proposed"] != alone[1]["r_proposed"]
        everyone: list[list[torch.Tensor]] = [[], []]
        for own, part in zip(everyone, PARTS, strict=True):  # what each would tell
            self.of(lambda whole, part=part: whole[part], lambda values, own=own: own.append(values) or values)
        for part in PARTS:
            calls = zip(*everyone, strict=True)
            told = self.of(lambda whole, part=part: whole[part], lambda values, calls=calls: torch.cat(next(calls)))
            assert told["r_proposed"] == max(one["r_proposed"] for one in alone)

    @staticmethod
    def of(pick: Any, gather: Any) -> dict[str, float]:
        actor = FakeActor()
        logits = actor.logits
        actor.logits, actor.gather = lambda tokens, at=None: pick(logits(16, at)), gather
        return step(actor, 1.0)


PARTS = (slice(0, 5), slice(5, 16))


@pytest.mark.parametrize(
    ("actor", "says"),
    [
        ({"strategy": "fsdp", "fsdp_config": {}}, "fsdp2"),
        ({"strategy": "fsdp2", "fsdp_config": {"mixed_precision": {"param_dtype": "fp16"}}}, "bf16 or fp32"),
    ],
)
def test_what_it_cannot_measure_is_refused(actor, says, sentence):
    plugin = GhostsOfSoftmax(GhostsOfSoftmax.Config())
    with pytest.raises(CompositionError) as refusal:
        plugin.check(OmegaConf.create({"actor_rollout_ref": {"actor": actor}}))
    sentence(refusal.value, "plugins.ghosts_of_softmax", says)
    for fine in ({}, {"mixed_precision": None}, {"mixed_precision": {"param_dtype": "bf16"}}):
        actor = {"strategy": "fsdp2", "fsdp_config": fine}
        plugin.check(OmegaConf.create({"actor_rollout_ref": {"actor": actor}}))
