"""Forward and backward of the Clip-Cov and KL-Cov losses, aggregated, against verl's own `clip_cov` and `kl_cov`.

python benchmarks/clip_cov.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from timing import best_times, report
from verl.trainer.ppo.core_algos import agg_loss, compute_policy_loss_clip_cov, compute_policy_loss_kl_cov
from verl.workers.config import ActorConfig, PolicyLossConfig

from verl_plugins import Plugin, Tokens
from verl_plugins.entropy.clip_cov import ClipCov
from verl_plugins.entropy.kl_cov import KlCov

VERL = {"clip_cov": compute_policy_loss_clip_cov, "kl_cov": compute_policy_loss_kl_cov}


def make_fields(rows: int, tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(rows, tokens, generator=rng)
    mask = torch.arange(tokens)[None] < torch.randint(1, tokens + 1, (rows, 1), generator=rng)
    return {
        "log_probs": (old + 0.1 * torch.randn(rows, tokens, generator=rng)).requires_grad_(),
        "old_log_probs": old,
        "advantages": torch.randn(rows, 1, generator=rng) * mask,
        "response_mask": mask,
    }


def compare(plugin: Plugin, rows: int, tokens: int) -> None:
    fields, rng = make_fields(rows, tokens), torch.Generator()
    # Unused fields of verl's settings are filled in as its own tests do.
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=1.0,
        clip_ratio_high=1.0,
        policy_loss=PolicyLossConfig(loss_mode=plugin.name, kl_cov_ratio=2e-3, ppo_kl_coef=1.0),
    )

    def ours() -> None:
        fields["log_probs"].grad = None
        losses = plugin.policy_loss(Tokens(config=config, log=lambda *_: None, seed=rng.initial_seed(), **fields))
        agg_loss(loss_mat=losses, loss_mask=fields["response_mask"], loss_agg_mode="token-mean").backward()

    def verl() -> None:
        fields["log_probs"].grad = None
        VERL[plugin.name](
            fields["old_log_probs"],
            fields["log_probs"],
            fields["advantages"],
            fields["response_mask"],
            "token-mean",
            config,
        )[0].backward()

    report(f"[{rows}, {tokens}]", best_times({"verl": verl, plugin.name: ours}, rounds=3), "verl")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for method in (ClipCov(ClipCov.Config()), KlCov(KlCov.Config())):
        for shape in ((1024, 1024), (256, 4096), (32, 2048)):
            compare(method, *shape)
