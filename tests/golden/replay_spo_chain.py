"""SPO-chain: where responses are cut, what a segment earns, the loss on unsure tokens."""

from types import SimpleNamespace

import numpy as np
import torch
from cases import Case, NotOffered
from fakes import FakeRun

from verl_plugins import Batch, Tokens
from verl_plugins.advantage.spo_chain import CUTS, VALUES, SpoChain, cutpoints, whitened
from verl_plugins.entropy.prob_mask import ProbMask

LOSS = {"dual_clip": False, "normaliser": "masked_token_mean", "kl_loss": "k3", "kl_agg": "seq_sum_batch_mean"}
LOSS |= {"log_ratio_clamp": 10.0, "ratio_skip_threshold": 10.0}
WHITEN = {"eps": 1e-8, "unbiased": True, "compare_only_where": "response_mask"}


def fixed(case: Case, values: dict) -> None:
    for name, value in values.items():
        if case.param(name, value) != value:
            raise NotOffered(f"{name} is {value}, not {case.param(name)}")


def unsure(case: Case, mask: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """The mask as the plugin prob_mask puts it."""
    batch = Batch.from_tensors(
        uid=[f"{row}-1-0" for row in range(len(mask))],
        response_mask=mask,
        old_log_probs=old,
        rm_scores=torch.zeros_like(old),
    )
    ProbMask(ProbMask.Config(rho=case.param("prob_threshold"))).observe(FakeRun(), batch)
    return batch.written["loss_mask"].bool()


def replay(case: Case, expected: dict) -> dict:
    mask, old = case.tensor("response_mask").bool(), case.tensor("old_log_probs")
    if case.has("log_prob"):
        return loss(case, mask, old)
    if case.has("advantages_in"):
        fixed(case, WHITEN)
        over, given = unsure(case, mask, old), case.tensor("advantages_in")
        whiten = case.param("whiten") == "batch"
        return {"advantages": whitened(given, over, mask) if whiten else given}
    rho, interval = case.param("prob_threshold"), case.param("cutpoint_interval")
    rewards = case.input("mc_rewards")
    cuts = [cutpoints(row, there, rho, interval) for row, there in zip(old.tolist(), mask.tolist(), strict=True)]
    values = [[float(np.mean(found)) if found else 0.0 for found in row] for row in rewards]
    lengths = (mask * torch.arange(1, mask.shape[1] + 1)).amax(1)
    scores = torch.zeros(mask.shape, dtype=torch.double)
    scores[torch.arange(len(mask)), lengths.clamp(min=1) - 1] = case.tensor("scores")
    plugin = SpoChain(SpoChain.Config(interval=interval, rho=rho, whiten=case.param("whiten", "none")))
    batch = Batch.from_tensors(
        uid=[f"{row}-1-0" for row in range(len(mask))],
        response_mask=mask,
        response_lengths=lengths,
        responses=torch.zeros(mask.shape, dtype=torch.long),
        tokenizer=SimpleNamespace(eos_token_id=0),
        old_log_probs=old,
        rm_scores=scores,
        budget=mask.shape[1] + 1,
        **{CUTS: cuts, VALUES: values},
    )
    return {
        "cutpoints": cuts,
        "cutpoint_values": values,
        "advantages": plugin.estimate_advantage(FakeRun(), batch).double(),
        "prob_mask": unsure(case, mask, old),
    }


def loss(case: Case, mask: torch.Tensor, old: torch.Tensor) -> dict:
    """Aggregated as verl does in token-mean: over the tokens of the loss mask."""
    fixed(case, LOSS)
    counted = unsure(case, mask, old) if case.param("use_prob_mask") else mask
    log_probs, clip = case.tensor("log_prob").requires_grad_(), case.param("clip_ratio")
    tokens, rows = max(int(counted.sum()), 1), len(mask)
    plugin = SpoChain(SpoChain.Config(kl_coef=case.param("kl_coef"), rho=case.param("prob_threshold")))
    info, logged = {"batch_num_tokens": tokens, "global_batch_size": rows}, {}
    seen = Tokens(
        log_probs=log_probs,
        old_log_probs=old,
        advantages=case.tensor("advantages"),
        response_mask=counted,
        config=SimpleNamespace(clip_ratio_low=clip, clip_ratio_high=clip, global_batch_info=info),
        extra={"ref_log_prob": case.tensor("ref_log_prob")}.__getitem__,
        log=lambda owner, metrics, reduce: logged.update(metrics),
    )
    total = plugin.policy_loss(seen) + sum((plugin.loss_terms(seen) or {}).values())
    value = (total * counted).sum() / tokens
    value.backward()
    return {"loss": value.detach(), "grad_log_prob": log_probs.grad, **logged}
