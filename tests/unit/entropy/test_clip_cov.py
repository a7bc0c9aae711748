"""Clip-Cov: which tokens lose their gradient, and that nothing else changes."""

from __future__ import annotations

from types import SimpleNamespace

import pluggy
import pytest
import torch
from fakes import FakeRun
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from verl.trainer.ppo.core_algos import agg_loss, compute_policy_loss_clip_cov
from verl.workers.config import ActorConfig, PolicyLossConfig

from verl_plugins import Batch, CompositionError, Tokens, hookspecs
from verl_plugins.entropy.clip_cov import CHOSEN, ClipCov, candidates, choose, covariance

FEW = settings(max_examples=30, deadline=None)
SEEDS = st.integers(0, 10_000)


def method(**options) -> ClipCov:
    return ClipCov(ClipCov.Config(**options))


def fields(seed=0, rows=6, length=12, dtype=torch.float64) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(rows, length, generator=rng, dtype=dtype)
    mask = torch.arange(length)[None] < torch.randint(1, length + 1, (rows, 1), generator=rng)
    mask[:, 3] &= torch.rand(rows, generator=rng) > 0.3  # tool tokens
    advantages = 2 * torch.randn(rows, 1, generator=rng, dtype=dtype) * mask
    shifted = old + 0.4 * torch.randn(rows, length, generator=rng, dtype=dtype)
    return {"log_probs": shifted, "old_log_probs": old, "advantages": advantages, "response_mask": mask}


def tokens_of(given: dict, low=1.0, high=1.0, logged=None, **more) -> Tokens:
    given = given | {"log_probs": given["log_probs"].detach().clone().requires_grad_()}
    config = SimpleNamespace(clip_ratio=0.2, clip_ratio_low=low, clip_ratio_high=high)

    def log(owner, metrics, reduce):
        if logged is not None:
            logged.update(metrics)

    return Tokens(config=config, log=log, **given, **more)


def losses_and_gradient(plugin, tokens) -> tuple[torch.Tensor, torch.Tensor]:
    losses = plugin.policy_loss(tokens)
    (losses * tokens.response_mask).sum().backward()
    return losses.detach(), tokens.log_probs.grad


class TestLoss:
    """Against verl's own loss, which equals the authors'."""

    @FEW
    @given(SEEDS, st.sampled_from([(1.0, 1.0), (0.2, 0.28)]), st.sampled_from([0.1, 1.0]))
    def test_equals_verl(self, seed, clip, ratio):
        given = fields(seed)
        tokens = tokens_of(given, *clip, seed=seed)
        plugin = method(clip_cov_ratio=ratio, clip_cov_lb=0.2)
        loss = agg_loss(plugin.policy_loss(tokens), tokens.response_mask, "token-mean")
        loss.backward()
        settings = PolicyLossConfig(loss_mode="clip_cov", clip_cov_ratio=ratio, clip_cov_lb=0.2, clip_cov_ub=5.0)
        config = ActorConfig(
            strategy="fsdp",
            rollout_n=1,
            ppo_micro_batch_size_per_gpu=1,
            clip_ratio_low=clip[0],
            clip_ratio_high=clip[1],
            policy_loss=settings,
        )
        log_probs = given["log_probs"].clone().requires_grad_()
        with torch.random.fork_rng():
            torch.random.set_rng_state(tokens.rng().get_state())
            expected, _ = compute_policy_loss_clip_cov(
                given["old_log_probs"], log_probs, given["advantages"], given["response_mask"], "token-mean", config
            )
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(tokens.log_probs.grad, log_probs.grad, rtol=1e-9, atol=1e-12)

    @FEW
    @given(SEEDS)
    def test_float32_suffices(self, seed):
        double = fields(seed)
        single = {name: value.float() if value.is_floating_point() else value for name, value in double.items()}
        options = {"clip_cov_ratio": 1.0, "clip_cov_lb": 1e-9, "clip_cov_ub": 1e9}
        one, other = (losses_and_gradient(method(**options), tokens_of(given)) for given in (double, single))
        agree = (one[0] == 0) == (other[0] == 0)  # a cov at the very bound may fall on either side
        assert agree.float().mean() > 0.97
        torch.testing.assert_close(one[1][agree].float(), other[1][agree], rtol=1e-4, atol=1e-4)

    @FEW
    @given(SEEDS, st.integers(1, 9))
    def test_wider_padding_changes_nothing(self, seed, width):
        given = fields(seed)
        wide = {name: torch.nn.functional.pad(value, (0, width)) for name, value in given.items()}
        plugin = method(clip_cov_ratio=0.1, clip_cov_lb=0.2)
        one, other = (losses_and_gradient(plugin, tokens_of(part)) for part in (given, wide))
        torch.testing.assert_close(one[0] * given["response_mask"], other[0][:, :-width] * given["response_mask"])
        torch.testing.assert_close(one[1], other[1][:, :-width])

    def test_no_candidate_is_clipped_ppo(self):
        given, logged = fields(1), {}
        losses, _ = losses_and_gradient(method(clip_cov_lb=50, clip_cov_ub=60), tokens_of(given, 0.2, 0.2, logged))
        ratio = (given["log_probs"] - given["old_log_probs"]).exp()
        plain = torch.maximum(-given["advantages"] * ratio, -given["advantages"] * ratio.clamp(0.8, 1.2))
        torch.testing.assert_close(losses, plain)
        assert logged["num_candidates"] == logged["num_selected"] == logged["selected_fraction"] == 0

    def test_clip_ratio_is_the_default_of_both_sides(self):
        given = fields(2)
        plugin = method(clip_cov_lb=50, clip_cov_ub=60)
        one = losses_and_gradient(plugin, tokens_of(given, None, None))
        other = losses_and_gradient(plugin, tokens_of(given, 0.2, 0.2))
        assert torch.equal(one[0], other[0])

    def test_expanded_advantages(self):
        given = fields(3)
        given["advantages"] = torch.ones(6, 1, dtype=torch.float64).expand(6, 12)
        losses_and_gradient(method(clip_cov_lb=-1e9, clip_cov_ub=1e9), tokens_of(given))


class TestDegenerate:
    """Nothing to choose from."""

    def test_whole_call_masked(self):
        given = fields(0)
        given["response_mask"] = torch.zeros_like(given["response_mask"])
        logged = {}
        _, gradient = losses_and_gradient(method(), tokens_of(given, logged=logged))
        assert (gradient == 0).all()
        assert logged["num_candidates"] == logged["pg_clipfrac"] == 0

    @pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
    def test_equal_advantages(self, value):
        given, logged = fields(0), {}
        given["advantages"] = torch.full_like(given["advantages"], value) * given["response_mask"]
        losses_and_gradient(method(clip_cov_lb=1e-6), tokens_of(given, logged=logged))
        assert logged["num_candidates"] == 0

    def test_one_token(self):
        given = {name: value[:1, :1] for name, value in fields(0).items()}
        logged = {}
        losses_and_gradient(method(), tokens_of(given, logged=logged))
        assert logged["num_candidates"] == 0
        assert logged["cov_max"] == pytest.approx(0, abs=1e-6)

    def test_at_least_one_is_chosen(self):
        rng = torch.Generator().manual_seed(0)
        assert len(choose(torch.arange(5), tokens=10, ratio=2e-4, rng=rng)) == 1
        assert len(choose(torch.arange(5), tokens=10_000, ratio=2e-4, rng=rng)) == 2
        assert len(choose(torch.arange(1), tokens=10_000, ratio=2e-4, rng=rng)) == 1

    def test_the_bounds_themselves_are_outside(self):
        cov, mask = torch.tensor([[1.0, 2.0, 3.0, 5.0]]), torch.ones(1, 4, dtype=torch.bool)
        assert candidates(cov, mask, lb=1.0, ub=5.0).tolist() == [1, 2]

    def test_covariance_by_hand(self):
        # means over the three valid tokens: A 1, log-prob -2
        advantages, log_probs = torch.tensor([[0.0, 1.0, 2.0, 9.0]]), torch.tensor([[-1.0, -2.0, -3.0, 9.0]])
        found = covariance(advantages, log_probs, torch.tensor([[1.0, 1.0, 1.0, 0.0]]))
        assert found.tolist() == [[-1, 0, -1, 0]]


class TestMetrics:
    """Counts and shares."""

    def test_counts(self):
        given, logged = fields(4), {}
        plugin = method(clip_cov_ratio=0.1, clip_cov_lb=0.2)
        losses, _ = losses_and_gradient(plugin, tokens_of(given, 0.2, 0.2, logged))
        valid = given["response_mask"]
        zeroed = int(((losses == 0) & valid & (given["advantages"] != 0)).sum())
        assert logged["num_selected"] == zeroed == min(max(int(0.1 * valid.sum()), 1), logged["num_candidates"])
        assert logged["pg_clipfrac"] == pytest.approx(zeroed / int(valid.sum()))
        assert logged["selected_fraction"] == pytest.approx(zeroed / logged["num_candidates"])
        assert 0 < logged["selected_fraction"] < 1
        assert 0.2 < logged["selected_cov"] < 5
        ratio, up = (given["log_probs"] - given["old_log_probs"]).exp(), given["advantages"]
        beyond = ((up > 0) & (ratio > 1.2)) | ((up < 0) & (ratio < 0.8))
        assert 0 < logged["ppo_clipfrac"] == pytest.approx(float(beyond[valid].double().mean()))
        cov = covariance(given["advantages"], given["log_probs"], valid.double())[valid]
        assert logged["cov_mean"] == pytest.approx(float(cov.mean()))
        assert logged["cov_p999"] == pytest.approx(float(cov.quantile(0.999)))
        assert logged["cov_max"] == pytest.approx(float(cov.max()))

    def test_generator_is_its_own(self):
        plugin, given = method(clip_cov_ratio=0.1, clip_cov_lb=0.2), fields(5)
        torch.manual_seed(1)
        one, state = losses_and_gradient(plugin, tokens_of(given)), torch.random.get_rng_state()
        other = losses_and_gradient(plugin, tokens_of(given))
        assert torch.equal(one[1], other[1])
        assert torch.equal(state, torch.random.get_rng_state())


def chosen_for_batch(plugin, given, step=1) -> torch.Tensor:
    batch = Batch.from_tensors(
        uid=["1-1-0"] * len(given["advantages"]), rm_scores=torch.zeros_like(given["advantages"]), **given
    )
    plugin.observe(FakeRun(step=step), batch)
    return batch.written[CHOSEN]


class TestBatchScope:
    """Chosen once per step, so the split into micro-batches does not matter."""

    @FEW
    @given(SEEDS, st.sampled_from([1, 4, 16]))
    def test_split_does_not_matter(self, seed, size):
        given = fields(seed, rows=40)
        plugin = method(scope="batch", clip_cov_ratio=0.2, clip_cov_lb=0.2)
        chosen = chosen_for_batch(plugin, given)

        def run(rows: slice):
            part = {name: value[rows] for name, value in given.items()}
            tokens = tokens_of(part, extra=lambda name: {CHOSEN: chosen}[name][rows])
            return losses_and_gradient(plugin, tokens)

        whole = run(slice(None))
        parts = [run(slice(start, start + size)) for start in range(0, 40, size)]
        for together, pieces in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(together, torch.cat(pieces))
        assert (whole[1][chosen] == 0).all()
        assert not (chosen & ~given["response_mask"]).any()

    def test_other_steps_choose_differently(self):
        plugin, given = method(scope="batch", clip_cov_ratio=0.1, clip_cov_lb=0.01), fields(6, rows=40)
        steps = [tuple(chosen_for_batch(plugin, given, step).flatten().tolist()) for step in [1, *range(1, 201)]]
        assert steps[0] == steps[1] and len(set(steps)) == 200

    @FEW
    @given(SEEDS)
    def test_per_micro_batch_of_one_response_nothing_is_chosen(self, seed):
        given, plugin = fields(seed), method(clip_cov_ratio=1.0, clip_cov_lb=1e-6)
        for row in range(6):
            logged = {}
            losses_and_gradient(plugin, tokens_of({name: v[row : row + 1] for name, v in given.items()}, logged=logged))
            assert logged["num_candidates"] == 0

    def test_per_micro_batch_puts_nothing(self):
        with pytest.raises(KeyError):
            chosen_for_batch(method(), fields(0))


def test_pluggy_calls_it():
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(method())
    tokens = tokens_of(fields(0))
    assert manager.hook.policy_loss(tokens=tokens).shape == tokens.log_probs.shape


@pytest.mark.parametrize("upper", [1.0, 5.0])
def test_check(sentence, upper):
    method().check(OmegaConf.create({}))
    with pytest.raises(CompositionError) as error:
        method(clip_cov_lb=5.0, clip_cov_ub=upper).check(OmegaConf.create({}))
    sentence(error.value, "clip_cov_lb=5.0", f"clip_cov_ub={upper}")
