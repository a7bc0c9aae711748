"""Ghosts of softmax: how far log-softmax reaches, and what the plugin leaves of an AdamW step of a linear layer."""

import math
from collections.abc import Iterable
from contextlib import suppress

import torch
from cases import Case

from verl_plugins.bridge.moving import moved
from verl_plugins.optim.ghosts_of_softmax import FLOOR, GhostsOfSoftmax, inverse_radius, scale, spread, top2


def of_tokens(case: Case, key: str, mask: torch.Tensor) -> torch.Tensor:
    """[B,T,V]; a vocabulary of one where there are no tokens at all."""
    values = case.tensor(key)
    return values if values.numel() else values.new_zeros(*mask.shape, 1)


def along_a_unit_step(case: Case, mask: torch.Tensor) -> dict:
    delta, length = spread(of_tokens(case, "logit_jvp", mask)), case.input("update_norm", 1.0)
    quantile, floor = case.param("quantile", 1.0), case.param("floor", FLOOR)
    inverse = inverse_radius(delta[mask], quantile=quantile, floor=floor)
    plain = math.pi * inverse_radius(delta[mask], quantile=quantile, floor=0.0)
    found = {"spread": (delta * mask).tolist(), "delta_a": plain, "rho_a": 1 / inverse, "r": length * inverse}
    return found | {"scale": scale(length * inverse, case.param("target_r", 1.0))}


def of_the_likeliest(case: Case, mask: torch.Tensor) -> dict:
    logits, change = of_tokens(case, "logits", mask), of_tokens(case, "logit_jvp", mask)
    margin, gap = top2(logits, change)
    inverse = inverse_radius(gap[mask], margin[mask], case.param("quantile", 1.0), case.param("floor", FLOOR))
    return {"margin": (margin * mask).tolist(), "gap_derivative": (gap * mask).tolist(), "rho": 1 / inverse}


class Linear:
    """The actor: one layer, every row of the features a token."""

    def __init__(self, case: Case) -> None:
        self.module = torch.nn.ParameterDict({"weight": case.tensor("weight")})
        if case.has("bias"):
            self.module["bias"] = case.tensor("bias")
        self.bias = self.module["bias"] if case.has("bias") else None
        self.features = case.tensor("features").reshape(-1, self.module["weight"].shape[1])
        self.step, self.metrics = 1, {}

    def parameters(self) -> list[torch.Tensor]:
        return [parameter.detach() for parameter in self.module.parameters()]

    def logits(self, tokens: int, at: Iterable[torch.Tensor] | None = None) -> torch.Tensor:
        with moved(self.parameters(), at), torch.no_grad():
            return torch.nn.functional.linear(self.features, self.module["weight"], self.bias)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def log(self, metrics: dict) -> None:
        self.metrics |= metrics


def capped_step(case: Case) -> dict:
    actor, rate = Linear(case), case.param("lr")
    options = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    options = {name: case.param(name, value) for name, value in options.items()}
    optimizer = torch.optim.AdamW(actor.module.parameters(), lr=rate, **options)
    for name, parameter in actor.module.items():
        parameter.grad = case.tensor(f"grad_{name}")
        moments = {key: case.input(f"{key}_{name}", None) for key in ("exp_avg", "exp_avg_sq")}
        if made := case.param("step", 0):
            there = {
                key: torch.zeros_like(parameter) if value is None else torch.tensor(value, dtype=torch.float64)
                for key, value in moments.items()
            }
            optimizer.state[parameter] = {"step": torch.tensor(float(made)), **there}
    before = actor.parameters()
    start = [one.clone() for one in before]
    plugin = GhostsOfSoftmax(GhostsOfSoftmax.Config(target_r=case.param("target_r", 1.0)))
    step = plugin.optimizer_step(actor)
    next(step)
    optimizer.step()
    full = math.sqrt(sum(float((b - a).square().sum()) for b, a in zip(before, start, strict=True)))
    with suppress(StopIteration):
        step.send(1.0)
    told = actor.metrics
    return {
        "unit_norm": full / rate if rate else 0.0,
        "rho_a": told.get("rho_a", math.pi / FLOOR),
        "r_proposed": told["r_proposed"],
        "effective_lr": rate * told["scale"],
        "scale": told["scale"],
        "r": told["r_applied"],
        **{f"new_{name}": parameter.tolist() for name, parameter in actor.module.items()},
    }


def replay(case: Case, expected: dict) -> dict:
    op = case.param("op")
    if op == "adamw_step":
        return capped_step(case)
    mask = torch.tensor(case.input("response_mask")).bool()
    if op == "radius":
        return along_a_unit_step(case, mask)
    if op == "top2_radius":
        return of_the_likeliest(case, mask)
    here, there = of_tokens(case, "logits_before", mask), of_tokens(case, "logits_after", mask)
    change = (there - here) / (case.param("temperature", 1.0) * case.param("probe_scale", 1.0))
    quantile, floor = case.param("quantile", 1.0), case.param("floor", 0.0)
    ratio = inverse_radius(spread(change)[mask], quantile=quantile, floor=floor)
    return {"r": ratio, "scale": scale(ratio, case.param("target_r", 1.0))}
