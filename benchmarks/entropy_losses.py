"""Forward and backward of the losses of STEER, EPO and DCPO, aggregated, against verl's own `vanilla` loss.

EPO's term comes on top of verl's entropy bonus, which is therefore part of both sides there.

    python benchmarks/entropy_losses.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from timing import best_times, report
from verl.trainer.ppo.core_algos import agg_loss, compute_policy_loss_vanilla
from verl.workers.config import ActorConfig

from verl_plugins import Plugin, Tokens
from verl_plugins.bridge.defaults import ActorDefaults
from verl_plugins.composition.manager import Plugins
from verl_plugins.entropy.dcpo import Dcpo
from verl_plugins.entropy.epo import GATE, REFERENCE, Epo
from verl_plugins.entropy.steer import LEAST, MOST, Steer

VARIANTS = {
    "steer, exp": Steer(Steer.Config()),
    "steer, linear": Steer(Steer.Config(map="linear")),
    "steer, exp, scope batch": Steer(Steer.Config(scope="batch")),
    "epo, hinge": Epo(Epo.Config(min_ratio=0.8, max_ratio=1.2)),
    "epo, indicator": Epo(Epo.Config(smooth_form="indicator")),
    "epo, mask_pg": Epo(Epo.Config(smooth_form="mask_pg")),
    "dcpo, previous_mc": Dcpo(Dcpo.Config(entropy_source="previous_mc")),
}


def make_fields(rows: int, tokens: int, seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What `Tokens` holds, and the queue's fields."""
    rng = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(rows, tokens, generator=rng)
    mask = torch.arange(tokens)[None] < torch.randint(1, tokens + 1, (rows, 1), generator=rng)
    entropy = torch.rand(rows, tokens, generator=rng)
    fields = {
        "log_probs": (old + 0.1 * torch.randn(rows, tokens, generator=rng)).requires_grad_(),
        "old_log_probs": old,
        "advantages": torch.randn(rows, 1, generator=rng) * mask,
        "response_mask": mask,
        "entropy": (entropy + 0.1 * torch.rand(rows, tokens, generator=rng)).requires_grad_(),
    }
    stored = {
        "entropy": entropy,
        REFERENCE: 0.5 * mask,
        GATE: torch.ones(rows),
        MOST: torch.full((rows,), 2.0),
        LEAST: torch.zeros(rows),
    }
    return fields, stored


def compare(name: str, plugin: Plugin, rows: int, tokens: int) -> None:
    """Print the times of both."""
    fields, stored = make_fields(rows, tokens)
    bonus = "current_entropy" in plugin.needs
    # Unused fields of verl's settings are filled in as its own tests do.
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, entropy_coeff=0.001 * bonus)
    plugins = Plugins([plugin])
    plugins.add_fallback(ActorDefaults(lambda: 0.0))
    mask = fields["response_mask"]

    def aggregated(losses: torch.Tensor) -> torch.Tensor:
        return agg_loss(loss_mat=losses, loss_mask=mask, loss_agg_mode="token-mean")

    def finish(loss: torch.Tensor) -> None:
        if bonus:
            loss = loss - config.entropy_coeff * aggregated(fields["entropy"])
        loss.backward()
        fields["log_probs"].grad = fields["entropy"].grad = None

    def vanilla() -> torch.Tensor:
        four = [fields[name] for name in ("old_log_probs", "log_probs", "advantages", "response_mask")]
        return compute_policy_loss_vanilla(*four, "token-mean", config)[0]

    def verl() -> None:
        finish(vanilla())

    def ours() -> None:
        batch = Tokens(config=config, log=lambda *_: None, extra=stored.__getitem__, **fields)
        replaced = plugins.implements("policy_loss")
        loss = aggregated(plugins.hook.policy_loss(tokens=batch)) if replaced else vanilla()
        for terms in plugins.hook.loss_terms(tokens=batch):
            for term in (terms or {}).values():
                loss = loss + aggregated(term)
        finish(loss)

    report(f"[{rows}, {tokens}]", best_times({"verl": verl, name: ours}, rounds=3), "verl")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for shape in ((1024, 1024), (8192, 256)):
        for label, method in VARIANTS.items():
            compare(label, method, *shape)
