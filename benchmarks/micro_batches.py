"""What Clip-Cov and KL-Cov choose in one batch when it is split into micro-batches of several sizes.

64 responses to 8 prompts with GRPO's advantages, the authors' settings, a policy that has moved a little since the
rollout. Nothing is timed or trained: the tables stand on the pages of both recipes, and the tests compute them again.

    python benchmarks/micro_batches.py
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from verl_plugins import Batch, Plugin, Tokens
from verl_plugins.advantage.grpo import grpo_advantage
from verl_plugins.entropy.clip_cov import ClipCov
from verl_plugins.entropy.kl_cov import KlCov
from verl_plugins.testing import FakeRun

PROMPTS, RESPONSES, LENGTH = 8, 8, 512
SIZES = (1, 4, 16, 64)


def make_batch(seed: int = 0) -> tuple[Batch, Tensor]:
    """The batch and the log-probs of the policy being trained; most tokens are likely, a few very unlikely."""
    rng = torch.Generator().manual_seed(seed)
    rows = PROMPTS * RESPONSES
    mask = torch.arange(LENGTH) < torch.randint(LENGTH // 8, LENGTH, (rows, 1), generator=rng)
    old = -(torch.randn(rows, LENGTH, generator=rng).abs() ** 3)
    right = torch.rand(rows, generator=rng) < torch.linspace(0.1, 0.9, PROMPTS).repeat_interleave(RESPONSES)
    fields = dict(
        uid=[f"{prompt}-1-0" for prompt in range(PROMPTS) for _ in range(RESPONSES)],
        rm_scores=torch.nn.functional.pad(right[:, None].float(), (0, LENGTH - 1)),
        response_mask=mask,
        old_log_probs=old,
    )
    batch = Batch.from_tensors(**fields)
    advantages = batch.to_tokens(grpo_advantage(batch.scores, batch.groups))
    return Batch.from_tensors(**fields, advantages=advantages), old + 0.05 * torch.randn(rows, LENGTH, generator=rng)


def chosen_in_parts(plugin: Plugin, batch: Batch, log_probs: Tensor, size: int) -> tuple[Tensor, int]:
    """[rows,T] tokens chosen in micro-batches of `size` responses, and Clip-Cov's candidates (KL-Cov has none)."""
    batch.written, found, chosen = {}, [], []
    plugin.observe(FakeRun(), batch)
    put = batch.written
    for number, rows in enumerate(torch.arange(len(batch)).split(size)):
        given = {
            "log_probs": log_probs[rows],
            "old_log_probs": batch.old_log_probs[rows],
            "advantages": batch.advantages[rows],
            "response_mask": batch.response_mask[rows],
        }
        tokens = Tokens(
            **given,
            config=SimpleNamespace(clip_ratio=0.2, clip_ratio_low=1.0, clip_ratio_high=1.0),
            extra=lambda name, rows=rows: put[name][rows],
            log=lambda owner, metrics, reduce: found.append(metrics.get("num_candidates", 0)),
            micro_batch=number,
        )
        ratio = (given["log_probs"] - given["old_log_probs"]).exp()
        plain = torch.maximum(-given["advantages"] * ratio, -given["advantages"] * ratio.clamp(0, 2))
        chosen.append((plugin.policy_loss(tokens) != plain) & given["response_mask"])
    return torch.cat(chosen), sum(found)


def clip_cov_table() -> str:
    """Markdown: a line for each size of the micro-batches."""
    batch, log_probs = make_batch()
    lines = ["| responses per micro-batch | candidates | tokens left out | with `scope: batch` |", "|---|---|---|---|"]
    for size in SIZES:
        chosen, found = chosen_in_parts(ClipCov(ClipCov.Config()), batch, log_probs, size)
        fixed, _ = chosen_in_parts(ClipCov(ClipCov.Config(scope="batch")), batch, log_probs, size)
        lines.append(f"| {size} | {found} | {int(chosen.sum())} | {int(fixed.sum())} |")
    return "\n".join(lines)


def kl_cov_table() -> str:
    """Markdown: a line for each size of the micro-batches."""
    batch, log_probs = make_batch()
    lines = [
        "| responses per micro-batch | tokens penalised | of them, in the whole batch's share | with `scope: batch` |",
        "|---|---|---|---|",
    ]
    for size in SIZES:
        chosen, _ = chosen_in_parts(KlCov(KlCov.Config()), batch, log_probs, size)
        fixed, _ = chosen_in_parts(KlCov(KlCov.Config(scope="batch")), batch, log_probs, size)
        lines.append(f"| {size} | {int(chosen.sum())} | {int((chosen & fixed).sum())} | {int(fixed.sum())} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(clip_cov_table(), kl_cov_table(), sep="\n\n")
