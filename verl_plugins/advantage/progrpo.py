"""ProGRPO: take confidence out of the advantage, so that rare correct paths gain on those the policy is sure of.

arXiv:2602.05281 (advantage re-weighting, ARM), on top of any estimator. With p the policy before the update and T_low
the 20 % least probable tokens of response o_i to prompt q:

    c(o_i) = exp(mean of log p(o_it) over T_low),   c(q) = exp(mean of log p(q_j) over the prompt's tokens)
    A_i   += alpha (c(q) - c(o_i))        for every response of a group that has a correct one, right or wrong

Against GRPO: that term. It is added after normalisation, and is constant: no gradient flows through c.

The paper's body and the authors' code were not to be had. Inferred from second-hand accounts: the equation's
cases, that T_low is by the probability of the sampled token with k = max(1, ceil(0.2 n)), that c(q) runs over all the
tokens of the prompt, and that groups which are all correct are included. alpha is ours.

Degenerate cases. All wrong: the estimator's own advantage. All correct: A is 0 and the term alone remains. It need not
sum to 0 over a group: a prompt that is more probable than its responses pushes all of them up (`shift_mean`).
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from verl_plugins import Batch, DataError, Plugin, Run, hookimpl, setting


def confidence(log_probs: Tensor, mask: Tensor, share: float) -> Tensor:
    """exp of the mean of the k smallest log-probs of each row, k = max(1, ceil(share · tokens in the mask)).

    log_probs [rows,T], mask [rows,T] bool -> [rows] in [0, 1]; 0 for a row without tokens.
    """
    count = mask.view(torch.uint8).sum(1, dtype=torch.int32)
    k = (share * count.double() - 1e-6).ceil().clamp(min=1).long()
    most, least = int(k.max()), torch.finfo(log_probs.dtype).min
    # Fillers below all log-probs make up the difference to the largest k: one partition then serves every row.
    table = log_probs.new_full((len(log_probs), log_probs.shape[1] + most), torch.inf)
    torch.where(mask, log_probs, log_probs.new_tensor(torch.inf), out=table[:, most:])
    table[:, :most].masked_fill_(torch.arange(most) < (most - k)[:, None], least)
    table.numpy().partition(most - 1, axis=1)
    lowest = table[:, :most]
    return (lowest.masked_fill(lowest == least, 0).sum(1) / -k).neg_().exp_().masked_fill_(count == 0, 0)


def prompt_confidence(log_probs: Tensor, lengths: Tensor, share: float | None = None) -> Tensor:
    """exp of the mean log-prob of a prompt, its inverse perplexity, or of its least probable share: [rows].

    Args:
        log_probs: [rows,P] of the prompt's tokens after its first.
        lengths: [rows] number of those.
        share: None for all of them.
    """
    within = torch.arange(log_probs.shape[1]) < lengths[:, None]
    if share is not None:
        return confidence(log_probs, within, share)
    return ((log_probs * within).sum(1) / lengths).exp()


class ProGrpo(Plugin):
    """Adds alpha · (confidence on the prompt - confidence on the response) to the advantages of any estimator."""

    name = "progrpo"
    paper = "arXiv:2602.05281"
    needs = frozenset({"old_log_probs", "prompt_log_probs"})

    @dataclass
    class Config:
        alpha: float = setting(0.3, "weight of the confidence term; ours, the authors' is not known", ge=0)
        low_prob_ratio: float = setting(
            0.2,
            "share of tokens, the least probable, that give a response's confidence",
            authors=0.2,
            gt=0,
            le=1,
        )
        prompt_scope: str = setting(
            "all", "tokens the prompt's confidence is taken from: all, or its least probable", choices=("all", "low")
        )
        skip_all_correct: bool = setting(False, "leave groups alone whose responses are all correct")

    @hookimpl(wrapper=True)
    def estimate_advantage(self, run: Run, batch: Batch) -> Generator[None, Tensor, Tensor]:
        advantages = yield
        mask, full = batch.response_mask, batch.full
        answer = confidence(batch.old_log_probs, mask, self.config.low_prob_ratio)
        prompt = self._prompt_confidence(batch)
        solved, all_right = full.groups.any(full.correct), full.groups.all(full.correct)
        active = batch.from_full(solved & ~all_right if self.config.skip_all_correct else solved)
        shift = torch.where(active, self.config.alpha * (prompt - answer), 0.0)

        before = advantages.sum(1)
        after = before + shift * mask.view(torch.uint8).sum(1, dtype=torch.int32)
        groups, right, one_each = batch.groups, batch.correct, batch.groups.first(batch.is_last)
        metrics = {
            "prompt_confidence": prompt[one_each].mean(),
            "answer_confidence_spread": groups.std(answer)[one_each].mean(),
            "shift_mean": shift.mean(),
            "shift_abs_mean": shift.abs().mean(),
            "shift_abs_max": shift.abs().max(),
            "sign_changes": (before.sign() * after.sign() < 0).float().mean(),
            "active_groups": active[one_each].float().mean(),
        }
        for name, rows in (("answer_confidence_correct", right), ("answer_confidence_wrong", ~right)):
            if rows.any():
                metrics[name] = answer[rows].mean()
        run.log({name: float(value) for name, value in metrics.items()})
        return batch.to_tokens(shift).add_(advantages)

    def _prompt_confidence(self, batch: Batch) -> Tensor:
        lengths = batch.prompt_lengths - 1
        for row in (lengths < 1).nonzero()[:1, 0].tolist():
            raise DataError(
                f"progrpo: the prompt of row {batch.keys[row]} has {int(lengths[row]) + 1} token, and its confidence "
                "needs two or more, because the first has no log-prob"
            )
        share = self.config.low_prob_ratio if self.config.prompt_scope == "low" else None
        return prompt_confidence(batch.prompt_log_probs, lengths, share)
