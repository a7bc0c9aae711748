"""Tokens that a plugin takes out of the loss: of policy loss, KL and entropy, and of what they are divided by."""

from __future__ import annotations

import pytest
import torch
from fakes import FakeRun
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.workers.config import ActorConfig

from verl_plugins import Batch, CompositionError, DataError
from verl_plugins.bridge.defaults import ActorDefaults
from verl_plugins.bridge.joined import JoinedMetrics
from verl_plugins.bridge.loss import PluginLoss
from verl_plugins.composition.manager import Plugins
from verl_plugins.entropy.prob_mask import ProbMask

PROMPT = 2
ROWS = st.lists(st.lists(st.booleans(), min_size=1, max_size=5), min_size=1, max_size=4)
FEW = settings(max_examples=25, deadline=None)


def nested(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def losses(mask: list[list[bool]], parts: list[list[int]], mode: str = "token-mean") -> tuple[float, torch.Tensor]:
    """Loss and gradient of a mini-batch whose rows are split into parts; all but the mask is drawn by row."""
    rng = torch.Generator().manual_seed(0)
    lengths = [len(row) for row in mask]
    draws = {
        name: [torch.randn(n, generator=rng) for n in lengths] for name in ("log", "old", "ref", "gain", "entropy")
    }
    leaves = [values.clone().requires_grad_() for values in draws["log"]]
    options = {"rollout_n": 1, "ppo_micro_batch_size_per_gpu": 1, "loss_agg_mode": mode, "use_kl_loss": True}
    config = ActorConfig(strategy="fsdp2", entropy_coeff=0.3, kl_loss_coef=0.5, **options)
    plugins = Plugins([ProbMask(ProbMask.Config())])
    plugins.add_fallback(ActorDefaults(lambda: 0.0))
    loss = PluginLoss(plugins, config, 0, JoinedMetrics())
    total = torch.zeros(())
    for rows in parts:
        whole = lambda name, rows=rows: nested([draws[name][row] for row in rows])  # noqa: E731
        padded = lambda values: nested(  # noqa: E731
            [torch.cat([torch.zeros(PROMPT - 1), one, torch.zeros(1)]) for one in values]
        )
        data = TensorDict(
            {
                "prompts": nested([torch.ones(PROMPT, dtype=torch.long) for _ in rows]),
                "responses": nested([torch.ones(lengths[row], dtype=torch.long) for row in rows]),
                "response_mask": nested([torch.ones(lengths[row], dtype=torch.long) for row in rows]),
                "loss_mask": nested([torch.tensor(mask[row]).long() for row in rows]),
                "old_log_probs": whole("old"),
                "ref_log_prob": whole("ref"),
                "advantages": whole("gain"),
            },
            batch_size=len(rows),
        )
        tokens = sum(map(sum, mask))
        tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=tokens, global_batch_size=len(mask))
        output = {
            "log_probs": padded([leaves[row] for row in rows]),
            "entropy": padded([draws["entropy"][r] for r in rows]),
        }
        total = total + loss(output, data)[0]
    total.backward()
    return float(total.detach()), torch.cat([leaf.grad for leaf in leaves])


def in_words(mask: list[list[bool]]) -> float:
    """Mean over the tokens of the mask of clipped loss, minus entropy, plus k3."""
    rng = torch.Generator().manual_seed(0)
    draws = {
        name: torch.cat([torch.randn(len(row), generator=rng) for row in mask])
        for name in ("log", "old", "ref", "gain", "entropy")
    }
    ratio = (draws["log"] - draws["old"]).exp()
    gain = draws["gain"]
    clipped = torch.maximum(-gain * ratio, -gain * ratio.clamp(0.8, 1.2))
    dual = torch.where(gain < 0, torch.minimum(-gain * 3.0, clipped), clipped)
    away = (draws["ref"] - draws["log"]).clamp(-20, 20)
    k3 = (away.exp() - away - 1).clamp(-10, 10)
    flat = torch.tensor([flag for row in mask for flag in row])
    each = dual - 0.3 * draws["entropy"] + 0.5 * k3
    return float(each[flat].sum() / max(int(flat.sum()), 1))


@FEW
@given(ROWS)
def test_the_loss_is_the_mean_over_the_mask(mask):
    assert losses(mask, [[*range(len(mask))]])[0] == pytest.approx(in_words(mask), abs=1e-4)


@FEW
@given(ROWS, st.sampled_from(["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]))
def test_the_split_changes_nothing_and_tokens_outside_have_no_gradient(mask, mode):
    whole, gradient = losses(mask, [[*range(len(mask))]], mode)
    split, parts = losses(mask, [[row] for row in range(len(mask))], mode)
    assert split == pytest.approx(whole, abs=1e-4) and torch.allclose(parts, gradient, atol=1e-5)
    outside = ~torch.tensor([flag for row in mask for flag in row])
    assert bool((gradient[outside] == 0).all()) and bool(gradient.isfinite().all())


def test_a_mini_batch_without_any_token_is_no_number_s_fault():
    loss, gradient = losses([[False, False], [False]], [[0], [1]])
    assert loss == 0 and gradient.tolist() == [0, 0, 0]


def batch(log_probs: list[list[float]], lengths: list[int]) -> Batch:
    width = max(lengths)
    return Batch.from_tensors(
        uid=[f"{row}-1-0" for row in range(len(lengths))],
        response_mask=torch.arange(width) < torch.tensor(lengths)[:, None],
        old_log_probs=torch.tensor(log_probs),
        rm_scores=torch.zeros(len(lengths), width),
    )


def empty() -> Batch:
    """One response of which the policy generated nothing."""
    return Batch.from_tensors(
        uid=["0-1-0"],
        response_mask=torch.zeros(1, 1, dtype=torch.bool),
        old_log_probs=torch.zeros(1, 1),
        rm_scores=torch.zeros(1, 1),
    )


class TestPlugin:
    def test_tokens_below_rho_stay(self):
        run, probabilities = FakeRun(), torch.tensor([[0.85, 0.9, 0.95], [0.1, 0.99, 0.0001]])
        rows = batch(probabilities.log().tolist(), [3, 2])
        ProbMask(ProbMask.Config(rho=0.9)).observe(run, rows)
        assert rows.extra("loss_mask").tolist() == [[1, 0, 0], [1, 0, 0]]
        assert run.metrics == {"masked_out": pytest.approx(3 / 5), "rows_without": 0.0}

    def test_rows_without_such_a_token_are_counted(self):
        run = FakeRun()
        ProbMask(ProbMask.Config(rho=0.5)).observe(run, batch([[-0.1, -0.2], [-2.0, -0.1]], [2, 2]))
        assert run.metrics == {"masked_out": pytest.approx(3 / 4), "rows_without": 0.5}

    @pytest.mark.parametrize(("log_prob", "share"), [(-0.01, 1.0), (-3.0, 0.0)])
    def test_a_single_token(self, log_prob, share):
        run = FakeRun()
        ProbMask(ProbMask.Config()).observe(run, batch([[log_prob]], [1]))
        assert run.metrics == {"masked_out": share, "rows_without": share}

    def test_no_token_at_all(self):
        run = FakeRun()
        ProbMask(ProbMask.Config()).observe(run, empty())
        assert run.metrics == {"masked_out": 1.0, "rows_without": 1.0}

    def test_a_critic_is_refused(self, sentence):
        with pytest.raises(CompositionError) as refusal:
            ProbMask(ProbMask.Config()).check(OmegaConf.create({"algorithm": {"adv_estimator": "gae"}}))
        sentence(refusal.value, "plugins.prob_mask", "algorithm.adv_estimator=grpo")


class TestPut:
    def test_two_masks_leave_what_both_leave(self):
        rows = batch([[0.0, 0.0, 0.0]], [3])
        rows.put("loss_mask", torch.tensor([[True, True, False]]))
        rows.put("loss_mask", torch.tensor([[False, True, True]]))
        assert rows.written["loss_mask"].tolist() == [[0, 1, 0]]

    @pytest.mark.parametrize(
        ("mask", "says"),
        [
            (torch.tensor([[1, 1, 1], [1, 1, 1]]), "did not generate"),
            (torch.tensor([[0.5, 1, 0], [1, 1, 1]]), "expected flags"),
            (torch.tensor([1, 0]), "expected flags"),
        ],
    )
    def test_what_is_no_mask_is_refused(self, mask, says):
        with pytest.raises(DataError, match=says):
            batch([[0.0, 0.0, 0.0]] * 2, [2, 3]).put("loss_mask", mask)
