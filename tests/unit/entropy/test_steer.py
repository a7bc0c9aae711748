"""STEER: how far a token moves the entropy, the weights that follow, and that only those change the loss."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from fakes import FakeRun
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_plugins import Batch, CompositionError, Tokens
from verl_plugins.bridge.defaults import ActorDefaults, clipped_loss
from verl_plugins.composition import needs
from verl_plugins.composition.compose import compose
from verl_plugins.composition.manager import Plugins
from verl_plugins.entropy.kl_cov import KlCov
from verl_plugins.entropy.steer import LEAST, MOST, Steer, entropy_change

FEW = settings(max_examples=30, deadline=None)
SEEDS = st.integers(0, 10_000)
MAPS = st.sampled_from([{"map": "exp"}, {"map": "linear"}, {"map": "exp", "floor": 0.0, "token_weight_min": 0.5}])
CONFIG = {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 10.0}


def method(**options) -> Steer:
    return Steer(Steer.Config(**options))


def fields(seed=0, rows=6, length=12) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(rows, length, generator=rng, dtype=torch.float64)
    mask = torch.arange(length)[None] < torch.randint(1, length + 1, (rows, 1), generator=rng)
    mask[:, 3] &= torch.rand(rows, generator=rng) > 0.3  # tool tokens
    return {
        "log_probs": old + 0.2 * torch.randn(rows, length, generator=rng, dtype=torch.float64),
        "old_log_probs": old,
        "advantages": torch.randn(rows, 1, generator=rng, dtype=torch.float64).expand(rows, length) * mask,
        "response_mask": mask,
        "entropy": 2 * torch.rand(rows, length, generator=rng, dtype=torch.float64),
    }


def tokens_of(given: dict, logged=None, **extra) -> Tokens:
    given, logged = dict(given), {} if logged is None else logged
    extra = {"entropy": given.pop("entropy")} | extra
    given["log_probs"] = given["log_probs"].detach().clone().requires_grad_()
    return Tokens(
        config=SimpleNamespace(**CONFIG, get=CONFIG.get),
        log=lambda owner, metrics, reduce: logged.update(metrics),
        extra=extra.__getitem__,
        **given,
    )


def losses_and_gradient(plugin, tokens, *others) -> tuple[torch.Tensor, torch.Tensor]:
    plugins = Plugins([*others, plugin])
    plugins.add_fallback(ActorDefaults(lambda: 0.0))
    losses = plugins.hook.policy_loss(tokens=tokens)
    (losses * tokens.response_mask).sum().backward()
    return losses.detach(), tokens.log_probs.grad


def weights(given: dict, **options) -> torch.Tensor:
    return method(**options).weights(tokens_of(given))


def by_hand(given: dict, config: Steer.Config) -> torch.Tensor:
    """The steps of the authors' function, one token at a time."""
    flat = {name: value.flatten().tolist() for name, value in given.items()}
    size = []
    for log_prob, old, advantage, entropy in zip(
        flat["log_probs"], flat["old_log_probs"], flat["advantages"], flat["entropy"], strict=True
    ):
        p, q = min(max(math.exp(log_prob), 1e-8), 1 - 1e-8), min(max(math.exp(old), 1e-8), 1)
        omega = advantage / q * p * (1 - p) * (math.log(p) + entropy)
        size.append(abs(omega) if math.isfinite(omega) else 0.0)
    valid = [value for value, inside in zip(size, flat["response_mask"], strict=True) if inside]
    most, least, low, high = max(valid), min(valid), config.token_weight_min, config.token_weight_max
    found = []
    for value, inside in zip(size, flat["response_mask"], strict=True):
        if config.map == "exp":
            scale = max(most, config.floor) or 1.0
            weight = min(max(math.exp(math.log(low) / scale * value), low), 1.0)
        elif most == least:
            weight = (low + high) / 2
        else:
            weight = min(max(high - (value - least) * (high - low) / (most - least), low), high)
        found.append(weight if inside else 0.0)
    return torch.tensor(found, dtype=torch.float64).view_as(given["log_probs"])


class TestWeights:
    """From |Omega| to the weight, over the tokens of one loss call."""

    @FEW
    @given(SEEDS, MAPS)
    def test_are_those_computed_by_hand(self, seed, options):
        given, plugin = fields(seed), method(**options)
        torch.testing.assert_close(plugin.weights(tokens_of(given)), by_hand(given, plugin.config))
        given = {name: value.float() if value.is_floating_point() else value for name, value in given.items()}
        torch.testing.assert_close(
            plugin.weights(tokens_of(given)), by_hand(given, plugin.config).float(), rtol=1e-4, atol=1e-5
        )

    @FEW
    @given(SEEDS, MAPS)
    def test_more_change_means_less_weight(self, seed, options):
        given = fields(seed)
        found, mask = weights(given, **options), given["response_mask"]
        size = entropy_change(*(given[name] for name in ("log_probs", "old_log_probs", "advantages", "entropy"))).abs()
        order = size[mask].argsort()
        assert (found[mask][order].diff() <= 1e-12).all()
        low = options.get("token_weight_min", 0.8)
        assert found[mask].min() == pytest.approx(low) or size[mask].max() < 0.02
        assert (found[~mask] == 0).all()

    @FEW
    @given(SEEDS, st.sampled_from([0.25, -1.0, 40.0]), st.sampled_from([{"floor": 0.0}, {"map": "linear"}]))
    def test_the_size_and_sign_of_the_advantages_do_not_matter(self, seed, factor, options):
        given = fields(seed)
        scaled = given | {"advantages": factor * given["advantages"]}
        torch.testing.assert_close(weights(scaled, **options), weights(given, **options))

    @FEW
    @given(SEEDS, MAPS, st.integers(1, 9))
    def test_row_order_and_padding_do_not_matter(self, seed, options, width):
        given = fields(seed)
        plain = losses_and_gradient(method(**options), tokens_of(given))
        wide = {name: torch.nn.functional.pad(value, (0, width)) for name, value in given.items()}
        wide["advantages"] = wide["advantages"].masked_fill(~wide["response_mask"], 7.0)
        wide["log_probs"] = wide["log_probs"].masked_fill(~wide["response_mask"], -40.0)
        wide["entropy"] = wide["entropy"].masked_fill(~wide["response_mask"], torch.nan)
        order = torch.randperm(len(wide["entropy"]), generator=torch.Generator().manual_seed(seed))
        found = losses_and_gradient(method(**options), tokens_of({name: value[order] for name, value in wide.items()}))
        for ours, theirs in zip(found, plain, strict=True):
            expected = (theirs * given["response_mask"])[order]
            torch.testing.assert_close((ours * wide["response_mask"][order])[:, :-width], expected)

    @pytest.mark.parametrize(("options", "weight"), [({}, 0.8), ({"map": "linear"}, 1.0)])
    def test_one_token(self, options, weight):
        given = {name: value[:1, :1] for name, value in fields(0).items()} | {"entropy": torch.full((1, 1), 3.0)}
        assert weights(given, **options).tolist() == [[pytest.approx(weight)]]

    @pytest.mark.parametrize(("options", "weight"), [({}, 1.0), ({"map": "linear"}, 1.0), ({"floor": 0.0}, 1.0)])
    def test_without_advantages_nothing_is_weighed(self, options, weight):
        given = fields(0)
        given["advantages"] = torch.zeros_like(given["advantages"])
        assert (weights(given, **options)[given["response_mask"]] == weight).all()

    def test_small_changes_keep_a_weight_near_1(self):
        given = fields(0)
        given["advantages"] = given["advantages"] * 1e-4
        assert (weights(given)[given["response_mask"]] > 0.99).all()
        assert weights(given, floor=0.0)[given["response_mask"]].min() == pytest.approx(0.8)

    def test_an_outlier_switches_the_others_off(self):
        given = fields(0)
        given["old_log_probs"][0, 0] = -30.0
        given["advantages"][0, 0] = 1.0
        found = weights(given)
        assert found[0, 0] == pytest.approx(0.8)
        assert (found[given["response_mask"]] < 0.99).sum() == 1

    @pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
    def test_an_entropy_that_is_not_finite_counts_as_no_change(self, value):
        given, logged = fields(0), {}
        given["entropy"][1, 0] = value
        tokens = tokens_of(given, logged)
        losses_and_gradient(method(), tokens)
        assert method().weights(tokens)[1, 0] == 1
        assert all(math.isfinite(number) for number in logged.values())

    def test_impossible_and_certain_tokens(self):
        given = fields(0)
        given["log_probs"][0, 0], given["log_probs"][1, 0] = -torch.inf, 0.0
        assert torch.isfinite(weights(given)).all()
        assert weights(given)[1, 0] == pytest.approx(1)


class TestLoss:
    """The loss of the run times a constant."""

    @FEW
    @given(SEEDS, MAPS)
    def test_loss_and_gradient_are_scaled_alike(self, seed, options):
        given, plugin = fields(seed), method(**options)
        factor, plain = plugin.weights(tokens_of(given)), tokens_of(given)
        losses = clipped_loss(plain)
        (losses * plain.response_mask).sum().backward()
        found = losses_and_gradient(plugin, tokens_of(given))
        torch.testing.assert_close(found[0], losses.detach() * factor)
        torch.testing.assert_close(found[1], plain.log_probs.grad * factor)

    def test_on_top_of_another_plugins_loss(self):
        given, kl_cov = fields(0), KlCov(KlCov.Config(kl_cov_ratio=0.2))
        tokens = tokens_of(given)
        expected = kl_cov.policy_loss(tokens).detach() * method().weights(tokens)
        torch.testing.assert_close(losses_and_gradient(method(), tokens_of(given), kl_cov)[0], expected)

    def test_whole_call_masked(self):
        given, logged = fields(0), {}
        given["response_mask"] = torch.zeros_like(given["response_mask"])
        for options in ({}, {"map": "linear"}):
            losses, gradient = losses_and_gradient(method(**options), tokens_of(given, logged))
            assert (losses == 0).all()
            assert (gradient == 0).all()
        assert "token_weight_mean" not in logged

    @FEW
    @given(SEEDS, MAPS)
    def test_metrics(self, seed, options):
        given, logged = fields(seed), {}
        tokens, mask = tokens_of(given, logged), given["response_mask"]
        found = method(**options).weights(tokens)[mask]
        omega = entropy_change(tokens.log_probs.detach(), tokens.old_log_probs, tokens.advantages, given["entropy"])
        omega = omega[mask]
        assert logged == pytest.approx(
            {
                "token_weight_mean": float(found.mean()),
                "token_weight_min": float(found.min()),
                "token_weight_max": float(found.max()),
                "low_weight_share": float((found < 0.9).double().mean()),
                "abs_omega_mean": float(omega.abs().mean()),
                "abs_omega_max": float(omega.abs().max()),
                "abs_omega_p99": float(omega.abs().quantile(0.99)),
                "positive_share": float((omega > 0).double().mean()),
                "predicted_entropy_change": -float((omega * found).mean()),
            }
        )


def test_a_weight_of_nine_tenths_is_not_low():
    """A single token has the middle of the range, here 0.9 in the precision that trainings have."""
    given, logged = {name: value.float() for name, value in fields(rows=1, length=4).items()}, {}
    given["response_mask"] = torch.tensor([[False, True, False, False]])
    method(map="linear", token_weight_min=0.8, token_weight_max=1.0).weights(tokens_of(given, logged))
    assert logged["token_weight_mean"] == pytest.approx(0.9)
    assert logged["low_weight_share"] == 0


class TestOmega:
    """It predicts what an update does to the entropy."""

    def test_predicts_the_change_of_a_softmax_policy(self):
        """To first order in the step, estimated from the sampled token alone, which stands for 1 / p of them."""
        rng = torch.Generator().manual_seed(0)
        logits = torch.randn(7, generator=rng, dtype=torch.float64).requires_grad_()
        log_probs = logits.log_softmax(0)
        entropy = -(log_probs.exp() * log_probs).sum()
        (slope,) = torch.autograd.grad(entropy, logits)
        for token in range(7):
            moved = torch.zeros(7, dtype=torch.float64)
            moved[token] = 1 - log_probs[token].exp().detach()  # the sampled logit's part of the policy gradient
            log_p = log_probs.detach()[token].view(1, 1)
            omega = entropy_change(log_p, log_p, torch.ones(1, 1), entropy.detach().view(1, 1))
            assert float(omega) == pytest.approx(-float(slope @ moved / log_p.exp()))

    def test_a_likely_token_that_is_reinforced_lowers_the_entropy(self):
        log_p, entropy = torch.tensor([[-0.1, -5.0]]), torch.ones(1, 2)
        assert entropy_change(log_p, log_p, torch.ones(1, 2), entropy).sign().tolist() == [[1, -1]]
        assert entropy_change(log_p, log_p, -torch.ones(1, 2), entropy).sign().tolist() == [[-1, 1]]


def bounds(plugin: Steer, given: dict) -> dict[str, torch.Tensor]:
    rewards = torch.zeros_like(given["advantages"])
    batch = Batch.from_tensors(uid=["1-1-0"] * len(rewards), rm_scores=rewards, **given)
    plugin.observe(FakeRun(), batch)
    return batch.written


class TestBatchScope:
    """M and m once per step, so that the split into micro-batches does not matter."""

    @FEW
    @given(SEEDS, MAPS, st.sampled_from([1, 4, 16]))
    def test_split_does_not_matter(self, seed, options, size):
        given, plugin = fields(seed, rows=16), method(scope="batch", **options)
        put = bounds(plugin, given)

        def run(rows: slice):
            part = {name: value[rows] for name, value in given.items()}
            return losses_and_gradient(plugin, tokens_of(part, **{name: value[rows] for name, value in put.items()}))

        whole = run(slice(None))
        parts = [run(slice(start, start + size)) for start in range(0, 16, size)]
        for together, pieces in zip(whole, zip(*parts, strict=True), strict=True):
            torch.testing.assert_close(together, torch.cat(pieces), rtol=1e-12, atol=0)

    @FEW
    @given(SEEDS, MAPS)
    def test_on_the_old_policy_and_in_one_piece_both_scopes_agree(self, seed, options):
        given = fields(seed)
        given["log_probs"] = given["old_log_probs"]
        put = bounds(method(scope="batch", **options), given)
        put = {name: torch.cat([value, value.new_zeros(2)]) for name, value in put.items()}  # verl's padding rows
        padded = {name: torch.nn.functional.pad(value, (0, 0, 0, 2)) for name, value in given.items()}
        found = method(scope="batch", **options).weights(tokens_of(padded, **put))
        torch.testing.assert_close(found[:-2], weights(given, **options))
        assert (found[-2:] == 0).all()

    def test_the_authors_scope_depends_on_the_split(self):
        given = fields(5)
        parts = [{name: value[rows] for name, value in given.items()} for rows in (slice(0, 3), slice(3, None))]
        assert not torch.allclose(weights(given), torch.cat([weights(part) for part in parts]))
        assert bounds(method(), given) == {}

    def test_fields_are_named_for_the_loss(self):
        assert set(bounds(method(scope="batch"), fields(0))) == {MOST, LEAST}


class TestEntropyChange:
    """What the entropy did since the last step, beside what was predicted."""

    def test_is_logged_from_the_second_step_on_and_survives_a_restart(self):
        plugin, run = method(), FakeRun()
        plugin.on_step_end(run, {"actor/entropy": 0.7})
        assert run.metrics == {}
        resumed = method()
        resumed.load_state_dict(plugin.state_dict())
        resumed.on_step_end(run, {"actor/entropy": 0.65})
        assert run.metrics == {"entropy_change": pytest.approx(-0.05)}


def test_equal_weights_are_refused(sentence):
    settings = ["plugins.steer.map=linear", "plugins.steer.token_weight_min=1.0", "plugins.steer.token_weight_max=1.0"]
    with pytest.raises(CompositionError) as error:
        needs.check(compose("steer", "cpu", settings))
    sentence(error.value, "plugins.steer.token_weight_min", "token_weight_max", "1.0")
    for accepted in (settings[1:], settings[:1]):
        needs.check(compose("steer", "cpu", accepted))


def test_bypass_mode_is_refused(sentence):
    bypass = "algorithm.rollout_correction.bypass_mode=True"
    with pytest.raises(CompositionError) as error:
        needs.check(compose("steer", "cpu", [bypass]))
    sentence(error.value, "'steer'", "entropy", bypass)


def test_two_policy_losses_are_refused_and_one_is_wrapped(sentence):
    needs.check(compose("steer+kl_cov", "cpu", []))
    with pytest.raises(CompositionError) as error:
        needs.check(compose("steer+kl_cov", "cpu", ["+plugins.clip_cov.scope=batch"]))
    assert "kl_cov" in str(error.value)
    assert "clip_cov" in str(error.value)


class TestBounds:
    """Weights stay between their ends and Omega stays finite, whatever a token does."""

    @pytest.mark.parametrize(("options", "high"), [({"map": "exp"}, 1.0), ({"map": "linear"}, 1.2)])
    def test_a_token_beyond_what_the_batch_had(self, options, high):
        """`scope: batch` takes M and m from the old policy: later tokens may lie beyond both."""
        size, most, least = torch.tensor([0.0, 0.05, 0.1, 0.3, 0.5, 50.0]), torch.tensor(0.3), torch.tensor(0.1)
        found = method(scope="batch", **options).of_size(size, most, least)
        assert found[-3:].tolist() == pytest.approx([0.8] * 3)
        assert float(found[0]) == pytest.approx(high) and found.max() <= high + 1e-6 and found.min() >= 0.8 - 1e-6
        if options["map"] == "linear":
            assert found[:3].tolist() == pytest.approx([1.2] * 3)

    def test_where_all_of_the_batch_were_alike_every_token_has_the_middle(self):
        alike = torch.tensor(0.2)
        found = method(scope="batch", map="linear").of_size(torch.tensor([0.0, 0.2, 0.5]), alike, alike)
        assert found.tolist() == pytest.approx([1.0] * 3)

    def test_probabilities_of_0_and_1(self):
        log_p = torch.tensor([[-200.0, -torch.inf, 0.0, -1e-12, -1.0]], dtype=torch.float64)
        old = torch.tensor([[-1.0, -1.0, -1.0, -1.0, -300.0]], dtype=torch.float64)
        found = entropy_change(log_p, old, torch.ones(1, 5, dtype=torch.float64), torch.full((1, 5), 0.5).double())
        p, q = [1e-8, 1e-8, 1 - 1e-8, 1 - 1e-8, math.exp(-1)], [*[math.exp(-1)] * 4, 1e-8]
        expected = [a / b * (1 - a) * (math.log(a) + 0.5) for a, b in zip(p, q, strict=True)]
        assert found[0].tolist() == pytest.approx(expected, rel=1e-6)

    def test_an_old_log_prob_that_rounding_has_lifted_above_0(self):
        log_p, one = torch.full((1, 1), -1.0).double(), torch.ones(1, 1).double()
        lifted, certain = (entropy_change(log_p.clone(), old * one, one, 0.5 * one) for old in (0.25, 0.0))
        assert torch.equal(lifted, certain)

    @pytest.mark.parametrize("entropy", [math.nan, math.inf])
    def test_what_is_not_finite_is_0(self, entropy):
        one = torch.full((1, 1), -1.0)
        assert float(entropy_change(one, one, torch.ones(1, 1), torch.full((1, 1), entropy))) == 0
