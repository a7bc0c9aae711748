"""KL-Cov: which tokens are penalised, how, and that nothing else changes."""

from __future__ import annotations

from types import SimpleNamespace

import pluggy
import pytest
import torch
from fakes import FakeRun
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from verl.trainer.ppo.core_algos import agg_loss, compute_policy_loss_kl_cov
from verl.workers.config import ActorConfig, PolicyLossConfig

from verl_plugins import Batch, Tokens, hookspecs
from verl_plugins.entropy.kl_cov import PENALISED, KlCov, largest

FEW = settings(max_examples=30, deadline=None)
SEEDS = st.integers(0, 10_000)


def method(**options) -> KlCov:
    return KlCov(KlCov.Config(**options))


def fields(seed=0, rows=6, length=12) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(rows, length, generator=rng, dtype=torch.float64)
    mask = torch.arange(length)[None] < torch.randint(1, length + 1, (rows, 1), generator=rng)
    mask[:, 3] &= torch.rand(rows, generator=rng) > 0.3  # tool tokens
    advantages = 2 * torch.randn(rows, 1, generator=rng, dtype=torch.float64) * mask
    new = old + 0.4 * torch.randn(rows, length, generator=rng, dtype=torch.float64)
    return {"log_probs": new, "old_log_probs": old, "advantages": advantages, "response_mask": mask}


def tokens_of(given: dict, logged=None, **more) -> Tokens:
    given = given | {"log_probs": given["log_probs"].detach().clone().requires_grad_()}
    # Values that any clipping would show.
    config = SimpleNamespace(clip_ratio=1e-3, clip_ratio_low=1e-3, clip_ratio_high=1e-3, clip_ratio_c=1.001)
    logged = {} if logged is None else logged
    return Tokens(config=config, log=lambda owner, metrics, reduce: logged.update(metrics), **given, **more)


def losses_and_gradient(plugin, tokens) -> tuple[torch.Tensor, torch.Tensor]:
    losses = plugin.policy_loss(tokens)
    (losses * tokens.response_mask).sum().backward()
    return losses.detach(), tokens.log_probs.grad


class TestLoss:
    """Against verl's own loss, which equals the authors'."""

    @FEW
    @given(SEEDS, st.sampled_from([2e-4, 0.1, 1.0]), st.sampled_from([0.1, 1.0]))
    def test_equals_verl(self, seed, ratio, coef):
        given, logged = fields(seed), {}
        tokens = tokens_of(given, logged)
        loss = agg_loss(
            method(kl_cov_ratio=ratio, ppo_kl_coef=coef).policy_loss(tokens), tokens.response_mask, "token-mean"
        )
        loss.backward()
        config = ActorConfig(
            strategy="fsdp",
            rollout_n=1,
            ppo_micro_batch_size_per_gpu=1,
            policy_loss=PolicyLossConfig(loss_mode="kl_cov", kl_cov_ratio=ratio, ppo_kl_coef=coef),
        )
        log_probs = given["log_probs"].clone().requires_grad_()
        expected, metrics = compute_policy_loss_kl_cov(
            given["old_log_probs"], log_probs, given["advantages"], given["response_mask"], "token-mean", config
        )
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(tokens.log_probs.grad, log_probs.grad, rtol=1e-9, atol=1e-12)
        assert logged["ppo_kl"] == pytest.approx(metrics["actor/ppo_kl"])

    @FEW
    @given(SEEDS)
    def test_on_the_old_policy_it_is_plain_policy_gradient(self, seed):
        given = fields(seed)
        given["old_log_probs"] = given["log_probs"]
        losses, gradient = losses_and_gradient(method(kl_cov_ratio=0.5), tokens_of(given))
        assert torch.equal(losses, -given["advantages"])
        assert torch.equal(gradient, -given["advantages"] * given["response_mask"])

    @FEW
    @given(SEEDS, st.integers(1, 9))
    def test_wider_padding_changes_nothing(self, seed, width):
        given = fields(seed)
        wide = {name: torch.nn.functional.pad(value, (0, width)) for name, value in given.items()}
        one, other = (losses_and_gradient(method(kl_cov_ratio=0.1), tokens_of(part)) for part in (given, wide))
        torch.testing.assert_close(one[0], other[0][:, :-width])
        torch.testing.assert_close(one[1], other[1][:, :-width])

    def test_the_penalty_pushes_back_to_the_old_policy(self):
        given = fields(1)
        free, held = (losses_and_gradient(method(kl_cov_ratio=1.0, ppo_kl_coef=c), tokens_of(given)) for c in (0, 0.5))
        moved, mask = given["log_probs"] - given["old_log_probs"], given["response_mask"]
        torch.testing.assert_close((held[0] - free[0])[mask], 0.5 * moved.abs()[mask])
        torch.testing.assert_close((held[1] - free[1])[mask], 0.5 * moved.sign()[mask])

    def test_expanded_advantages(self):
        given = fields(3)
        given["advantages"] = torch.ones(6, 1, dtype=torch.float64).expand(6, 12)
        losses_and_gradient(method(), tokens_of(given))


class TestSelection:
    """The k tokens of largest covariance, k by the authors' rounding."""

    @pytest.mark.parametrize(("ratio", "count"), [(2e-4, 1), (0.19, 1), (0.2, 2), (0.25, 2), (1.0, 10)])
    def test_count(self, ratio, count):
        cov = torch.arange(12.0).view(2, 6)
        mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
        assert sorted(largest(cov, mask, ratio).tolist()) == list(range(10 - count, 10))

    def test_negative_covariances_are_taken_too(self):
        assert largest(torch.tensor([[-3.0, -1.0, -2.0]]), torch.ones(1, 3, dtype=torch.bool), 0.1).tolist() == [1]

    def test_whole_call_masked(self):
        given, logged = fields(0), {}
        given["response_mask"] = torch.zeros_like(given["response_mask"])
        given["advantages"] = torch.zeros_like(given["advantages"])
        _, gradient = losses_and_gradient(method(), tokens_of(given, logged))
        assert (gradient == 0).all()
        assert logged["num_selected"] == logged["ppo_kl"] == 0

    def test_one_token(self):
        logged = {}
        losses_and_gradient(method(), tokens_of({name: v[:1, :1] for name, v in fields(0).items()}, logged))
        assert logged["num_selected"] == 1
        assert logged["rest_abs_kl"] == 0

    def test_a_single_token_that_is_not_chosen(self):
        given, logged = {name: value[:1, :2] for name, value in fields(0).items()}, {}
        given |= {"response_mask": torch.ones(1, 2).bool(), "log_probs": given["old_log_probs"] + 0.25}
        losses_and_gradient(method(kl_cov_ratio=0.5), tokens_of(given, logged))
        assert (logged["selected_abs_kl"], logged["rest_abs_kl"]) == pytest.approx((0.25, 0.25))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_all_tokens_chosen_and_none_with_an_advantage(self, dtype):
        given, logged = {name: v if v.dtype == torch.bool else v.to(dtype) for name, v in fields(0).items()}, {}
        given["advantages"] = torch.zeros_like(given["advantages"])
        losses_and_gradient(method(kl_cov_ratio=1.0), tokens_of(given, logged))
        assert logged["num_selected"] == int(given["response_mask"].sum())
        assert logged["rest_abs_kl"] == pytest.approx(0, abs=1e-5)
        assert logged["selected_negative_share"] == 0

    @FEW
    @given(SEEDS)
    def test_metrics(self, seed):
        given, logged = fields(seed), {}
        losses, _ = losses_and_gradient(method(kl_cov_ratio=0.2), tokens_of(given, logged))
        moved, mask = (given["log_probs"] - given["old_log_probs"]).abs(), given["response_mask"]
        plain = -given["advantages"] * (given["log_probs"] - given["old_log_probs"]).exp()
        chosen = (losses != plain) & mask
        assert logged["num_selected"] == int(chosen.sum()) == max(1, int(0.2 * int(mask.sum())))
        assert logged["selected_abs_kl"] == pytest.approx(float(moved[chosen].mean()))
        assert logged["rest_abs_kl"] == pytest.approx(
            float(moved[mask & ~chosen].sum()) / max(mask.sum() - chosen.sum(), 1)
        )
        assert logged["penalty"] == pytest.approx(float((losses - plain)[mask].mean()), rel=1e-6)
        assert logged["selected_negative_share"] == pytest.approx(
            float((given["advantages"][chosen] < 0).double().mean())
        )
        assert logged["selected_cov_min"] <= logged["selected_cov"]
        assert logged["ratio_max"] == pytest.approx(
            float((moved * 0 + (given["log_probs"] - given["old_log_probs"])).exp()[mask].max())
        )


def penalised_in_batch(plugin, given) -> torch.Tensor:
    rewards = torch.zeros_like(given["advantages"])
    batch = Batch.from_tensors(uid=["1-1-0"] * len(rewards), rm_scores=rewards, **given)
    plugin.observe(FakeRun(), batch)
    return batch.written[PENALISED]


class TestBatchScope:
    """Chosen once per step, so the split into micro-batches does not matter."""

    @FEW
    @given(SEEDS, st.sampled_from([1, 4, 16]))
    def test_split_does_not_matter(self, seed, size):
        given, plugin = fields(seed, rows=40), method(scope="batch", kl_cov_ratio=0.2)
        chosen = penalised_in_batch(plugin, given)

        def run(rows: slice):
            part = {name: value[rows] for name, value in given.items()}
            return losses_and_gradient(plugin, tokens_of(part, extra=lambda name: {PENALISED: chosen}[name][rows]))

        whole = run(slice(None))
        parts = [run(slice(start, start + size)) for start in range(0, 40, size)]
        for together, pieces in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(together, torch.cat(pieces))
        assert int(chosen.sum()) == max(1, int(0.2 * int(given["response_mask"].sum())))
        assert not (chosen & ~given["response_mask"]).any()

    def test_the_choice_per_micro_batch_depends_on_the_split(self):
        given, counts = fields(5), []
        for rows in (slice(None), slice(0, 3), slice(3, None)):
            logged = {}
            losses_and_gradient(method(), tokens_of({name: value[rows] for name, value in given.items()}, logged))
            counts.append(logged["num_selected"])
        assert counts == [1, 1, 1]

    def test_per_micro_batch_puts_nothing(self):
        with pytest.raises(KeyError):
            penalised_in_batch(method(), fields(0))


def test_pluggy_calls_it():
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(method())
    tokens = tokens_of(fields(0))
    assert manager.hook.policy_loss(tokens=tokens).shape == tokens.log_probs.shape


@pytest.mark.parametrize(
    ("mini_batch", "epochs", "bypass", "warned"),
    [(16, 1, False, True), (32, 1, False, True), (8, 1, False, False), (16, 2, False, False), (16, 1, True, False)],
)
def test_one_update_per_batch_is_warned_of(mini_batch, epochs, bypass, warned, caplog):
    config = OmegaConf.create(
        {
            "data": {"train_batch_size": 16},
            "actor_rollout_ref": {"actor": {"ppo_mini_batch_size": mini_batch, "ppo_epochs": epochs}},
            "algorithm": {"rollout_correction": {"bypass_mode": bypass}},
        }
    )
    method().check(config)
    assert [f"ppo_mini_batch_size={mini_batch}" in record.message for record in caplog.records] == [True] * warned
