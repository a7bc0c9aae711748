"""DRPO's loss in its three forms, splits of the rows that change nothing, and the trust region."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from test_drpo import BUDGET, FEW, MODE, SEEDS, estimate, make_batch, method, responses, run_with
from verl.trainer.ppo.core_algos import agg_loss

from verl_plugins import Batch, Tokens


def tokens_of(batch: Batch, log_probs, advantages, rows=None, put=None, logged=None, dp_size: int = 1) -> Tokens:
    """One micro-batch of a mini-batch that is the whole batch."""
    pick = torch.arange(len(batch)) if rows is None else rows
    info = {
        "dp_size": dp_size,
        "batch_num_tokens": int(batch.response_mask.sum()),
        "global_batch_size": len(batch),
        "loss_scale_factor": None,
    }
    return Tokens(
        log_probs=log_probs[pick],
        old_log_probs=batch.old_log_probs[pick],
        advantages=advantages[pick],
        response_mask=batch.response_mask[pick],
        config=OmegaConf.create({"global_batch_info": info}),
        extra=lambda name: (put or {})[name][pick],
        log=lambda owner, metrics, reduce: None if logged is None else logged.update(metrics),
    )


def loss_and_gradient(plugin, batch, log_probs, parts, dp_size: int = 1):
    """verl's sum over micro-batches, and the gradient by all log-probs; `parts` are the rows of each micro-batch."""
    leaf = log_probs.clone().requires_grad_()
    advantages = plugin.estimate_advantage(run_with(), batch).double()
    total = 0.0
    for rows in parts:
        tokens = tokens_of(batch, leaf, advantages, torch.as_tensor(rows), batch.written, dp_size=dp_size)
        losses = plugin.policy_loss(tokens)
        # Ranks are averaged over, which takes dp_size out again.
        loss = agg_loss(losses, tokens.response_mask, MODE, **tokens.config.global_batch_info) / dp_size
        loss.backward()
        total += loss.item()
    return total, leaf.grad


def drifted(batch: Batch, drift: float, seed: int = 1) -> torch.Tensor:
    """Log-probs of a policy that has moved, no row of it down on the whole: all stay within the trust region."""
    noise = torch.randn(batch.old_log_probs.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise = drift * noise * batch.response_mask
    n = batch.response_mask.sum(1, keepdim=True).clamp(min=1)
    return batch.old_log_probs + (noise - noise.sum(1, keepdim=True).clamp(max=0) / n) * batch.response_mask


def authors_gradient(batch: Batch, log_probs: torch.Tensor, options) -> torch.Tensor:
    """-J by autograd, a group at a time."""
    leaf = log_probs.clone().requires_grad_()
    scores = (leaf * batch.response_mask).sum(1) / batch.response_mask.sum(1)
    lengths, right = batch.response_mask.sum(1).double(), batch.scores == 1
    total = torch.zeros((), dtype=torch.float64)
    for name in set(batch.uid):
        mine = torch.from_numpy(batch.uid == name)
        if (right & mine).any() and (~right & mine).any():
            shares = ((1 - lengths[right & mine] / BUDGET) / options.length_temperature).softmax(0)
            wrong = scores[~right & mine]
            total += (shares * scores[right & mine]).sum()
            total -= options.tau * ((wrong / options.tau).exp().mean()).log()
    if total.requires_grad:
        (-total / len(set(batch.uid))).backward()
    return torch.zeros_like(log_probs) if leaf.grad is None else leaf.grad


class TestLoss:
    """-J and the trust region."""

    @FEW
    @given(responses(), SEEDS, st.sampled_from(["current", "exact", "old"]))
    def test_all_forms_are_the_authors_before_the_first_update(self, rows, seed, negatives):
        batch, plugin = make_batch(*rows, seed), method(negatives=negatives)
        _, gradient = loss_and_gradient(plugin, batch, batch.old_log_probs, [range(len(batch))])
        expected = authors_gradient(batch, batch.old_log_probs, plugin.config)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)

    @FEW
    @given(responses(), SEEDS, st.sampled_from([0.1, 1.0, 10.0]))
    def test_exact_is_the_authors_where_groups_are_whole(self, rows, seed, tau):
        batch, plugin = make_batch(*rows, seed), method(negatives="exact", tau=tau)
        log_probs = drifted(batch, 0.3)
        by_group = [np.flatnonzero(batch.uid == name).tolist() for name in sorted(set(batch.uid))]
        _, gradient = loss_and_gradient(plugin, batch, log_probs, by_group)
        expected = authors_gradient(batch, log_probs, plugin.config)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)

    @FEW
    @given(responses(), SEEDS, st.sampled_from(["current", "old"]), st.sampled_from([0.0, 0.3]))
    def test_the_split_changes_nothing(self, rows, seed, negatives, drift):
        batch, plugin = make_batch(*rows, seed), method(negatives=negatives, tau=0.5)
        log_probs = drifted(batch, drift)
        random = np.random.default_rng(seed)
        order = random.permutation(len(batch)).tolist()
        parts = [[order], [part.tolist() for part in np.array_split(order, 4) if len(part)], [[row] for row in order]]
        (loss, gradient), *others = [loss_and_gradient(plugin, batch, log_probs, part) for part in parts]
        for other_loss, other_gradient in others:
            assert other_loss == pytest.approx(loss, rel=1e-9, abs=1e-12)
            torch.testing.assert_close(other_gradient, gradient)
        on_two_ranks = loss_and_gradient(plugin, batch, log_probs, parts[1], dp_size=2)
        torch.testing.assert_close(on_two_ranks[1], gradient)

    @pytest.mark.parametrize(("negatives", "error"), [("current", 0.003), ("old", 0.006)])
    def test_how_far_the_forms_are_from_the_authors(self, negatives, error):
        """With the authors' tau of 10 and means of log-probs that moved by 0.02."""
        uid = [f"{row // 8}-1-0" for row in range(64)]
        rng = np.random.default_rng(0)
        batch = make_batch(uid, (rng.random(64) < 0.5).tolist(), rng.integers(1, BUDGET, 64).tolist())
        moved = batch.old_log_probs + 0.02 * torch.from_numpy(rng.choice([-1.0, 1.0], (64, 1)))
        plugin = method(negatives=negatives, beta=0.0)
        expected = authors_gradient(batch, moved, plugin.config)
        _, gradient = loss_and_gradient(plugin, batch, moved, [range(64)])
        wrong = expected > 0
        difference = (gradient[wrong] / expected[wrong] - 1).abs()
        assert 1e-5 < float(difference.max()) < error

    def test_unmixed_prompts_leave_the_graph_attached(self):
        batch = make_batch(["1-1-0"] * 2, [True, True], [2, 3])
        _, gradient = loss_and_gradient(method(), batch, batch.old_log_probs, [[0, 1]])
        assert (gradient == 0).all()

    def test_a_response_without_tokens_changes_no_other(self):
        """Also where the weights are of the whole group."""
        rows = (["1-1-0"] * 3, [True, False, False], [2, 3, 0])
        batch, plugin = make_batch(*rows), method(negatives="exact")
        gradient = loss_and_gradient(plugin, batch, drifted(batch, 0.3), [range(3)])[1]
        few = make_batch(*[column[:2] for column in rows], old_log_probs=batch.old_log_probs[:2])
        expected = loss_and_gradient(plugin, few, drifted(batch, 0.3)[:2], [range(2)])[1]
        torch.testing.assert_close(gradient[:2], expected)
        assert not gradient[2].any()

    def test_an_advantage_of_0_stays_0_however_far_the_policy_has_moved(self):
        batch = make_batch(["1-1-0"] * 2, [False, False], [2, 3])
        tokens = tokens_of(batch, batch.old_log_probs + 90, estimate(batch).double())
        assert not method(tau=0.01, beta=0.0).policy_loss(tokens).any()


class TestTrustRegion:
    """beta/2 max(K - delta, 0)^2 with K the token mean of log old - log new."""

    ROWS = (["1-1-0"] * 3, [True, True, True], [2, 4, 10])

    @pytest.mark.parametrize("kl_type", ["kl", "low_var_kl"])
    @pytest.mark.parametrize("drift", [-0.5, -0.05, 0.05])
    def test_gradient(self, kl_type, drift):
        """No prompt is mixed, so it is the whole gradient."""
        batch, options = make_batch(*self.ROWS), {"kl_type": kl_type, "beta": 50.0, "delta": 0.01}
        noise = torch.randn(3, BUDGET, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        log_probs = (batch.old_log_probs + drift + 0.1 * noise).requires_grad_()
        change = (log_probs - batch.old_log_probs)[batch.response_mask]
        mean = (-change if kl_type == "kl" else change.exp() - 1 - change).mean()
        expected = torch.autograd.grad(50.0 / 2 * (mean - 0.01).clamp(min=0) ** 2, log_probs)[0]
        _, gradient = loss_and_gradient(method(**options), batch, log_probs.detach(), [range(3)])
        torch.testing.assert_close(gradient, expected)
        assert bool(gradient.any()) == (float(mean.detach()) > 0.01)

    def test_equal_drift_in_all_rows_does_not_depend_on_the_split(self):
        batch = make_batch(["1-1-0"] * 4, [True, True, False, False], [2, 4, 10, 3])
        moved = batch.old_log_probs - 0.1
        whole = loss_and_gradient(method(), batch, moved, [range(4)])
        for parts in ([[0, 2], [3, 1]], [[0], [1], [2], [3]]):
            loss, gradient = loss_and_gradient(method(), batch, moved, parts)
            assert loss == pytest.approx(whole[0])
            torch.testing.assert_close(gradient, whole[1])

    def test_a_micro_batch_of_padding_rows(self):
        batch, logged = make_batch(*self.ROWS), {}
        tokens = tokens_of(batch, batch.old_log_probs - 0.1, estimate(batch).double(), logged=logged)
        tokens.response_mask = torch.zeros_like(tokens.response_mask)
        method(beta=10.0, delta=0.02).policy_loss(tokens)
        assert logged == {"ppo_kl": 0, "constraint_coef": 0, "constraint_active": 0}

    def test_metrics(self):
        batch, logged = make_batch(*self.ROWS), {}
        advantages = estimate(batch).double()
        tokens = tokens_of(batch, batch.old_log_probs - 0.1, advantages, logged=logged)
        method(beta=10.0, delta=0.02).policy_loss(tokens)
        assert logged == pytest.approx({"ppo_kl": 0.1, "constraint_coef": 0.8, "constraint_active": 1})
        tokens.response_mask = torch.arange(BUDGET) < torch.tensor([1, 0, 0])[:, None]
        method(beta=10.0, delta=0.02).policy_loss(tokens)
        assert logged == pytest.approx({"ppo_kl": 0.1, "constraint_coef": 0.8, "constraint_active": 1}), "one token"
        tokens = tokens_of(batch, batch.old_log_probs, advantages, logged=logged)
        method().policy_loss(tokens)
        assert logged == {"ppo_kl": 0, "constraint_coef": 0, "constraint_active": 0}
