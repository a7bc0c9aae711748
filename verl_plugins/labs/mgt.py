"""What keeps tokens apart in a hundred layers: a gate on the update's direction, and a sign that can erase.

Su, You, Geometric and Dynamic Scaling in Deep Transformers, arXiv 2601.01014: a proposal without experiments or code.
Its block filters the update of a residual stack by a gate and scales it by a beta that may be negative:

    v = F(norm(x)) * sigmoid(LN(W_gate x)),    x' = x + beta * (v - alpha x),    beta = s tanh(W_beta x + b)

The two update equations are the paper's, as others quote them; the form of beta, and x itself as the projection that is
erased, are inferred. A lab of stacks with random weights: nothing is trained, no pretrained model can be converted.

It is compared with relatives. Deep delta learning (arXiv 2601.00417, code yifanzhang-pro/deep-delta-learning):
x' = x + beta (v - k.x) k along the unit vector k = F / sqrt(|F|^2 + eps^2), with scalars beta = 2 sigmoid(...) and v.
Hyper-connections (arXiv 2512.24880, code tokenbender/mHC-manifold-constrained-hyper-connections): several residual
streams x_r' = sum_s H_rs x_s + post_r F(sum_s pre_s x_s), with H made doubly stochastic by Sinkhorn's iterations.

Degenerate cases: a single token has rank 1 and, by convention, cosine 1; k = 0 makes the delta update the identity.
Padding is left out before a rank is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from verl_plugins.diagnostics.mgt import effective_rank, pairwise_cosine
from verl_plugins.lab import Claim, Curve, Findings, Panel, Progress
from verl_plugins.plugin import setting

TOKENS = WIDTH = 64
STREAMS = 4
SEEDS = 3
Sublayer = Callable[[Tensor], Tensor]


@dataclass
class Settings:
    layers: int = setting(100, "layers of a stack, an attention and an MLP each", ge=1, le=100)
    beta_scale: float = setting(1.0, "s, the largest size of beta", ge=0, le=2)
    alpha: float = setting(0.1, "share of x that is erased, in the last stack", ge=0, le=1)


def normed(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer norm over the last dimension, without weights."""
    return layer_norm(x, x.shape[-1:], eps=eps)


def gated(x: Tensor, raw: Tensor, weight: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """x [tokens, d], raw update [tokens, d], W_gate [d, d] -> gate and gated update."""
    gate = normed(x @ weight.T, eps).sigmoid()
    return gate, raw * gate


def signed_beta(x: Tensor, weight: Tensor, scale: float, bias: float | Tensor = 0.0) -> Tensor:
    """beta [tokens, d], between -scale and scale."""
    return scale * torch.tanh(x @ weight.T + bias)


def erasing_update(x: Tensor, update: Tensor, beta: float | Tensor, alpha: float) -> Tensor:
    """x + beta (v - alpha x)."""
    return x + beta * (update - alpha * x)


def delta_update(x: Tensor, k: Tensor, beta: Tensor, v: Tensor, eps: float = 1e-5) -> Tensor:
    """x + beta (v - k.x) k with k [tokens, d] made a unit vector; beta and v [tokens]."""
    k = k / (k.square().sum(1, keepdim=True) + eps**2).sqrt()
    return x + (beta * (v - (k * x).sum(1)))[:, None] * k


def doubly_stochastic(logits: Tensor, iterations: int = 10, tau: float = 0.05) -> Tensor:
    """Sinkhorn's iterations on logits [s, s] / tau: rows, then columns, in logarithms."""
    found = logits / tau
    for _ in range(iterations):
        found = found - found.logsumexp(1, keepdim=True)
        found = found - found.logsumexp(0, keepdim=True)
    return found.exp()


def sublayers(layers: int, generator: torch.Generator) -> Iterator[Sublayer]:
    """Attention and MLP of each layer, with random weights that keep the size of what comes in."""

    def weights(inputs: int, outputs: int) -> Tensor:
        return torch.randn(inputs, outputs, generator=generator).double() / inputs**0.5

    for _ in range(layers):
        query, key, value = (weights(WIDTH, WIDTH) for _ in range(3))
        inner, outer = weights(WIDTH, 2 * WIDTH), weights(2 * WIDTH, WIDTH)
        yield lambda h, q=query, k=key, v=value: ((h @ q) @ (h @ k).T / WIDTH**0.5).softmax(1) @ h @ v
        yield lambda h, i=inner, o=outer: (h @ i).relu() @ o


def stacks(settings: Settings) -> dict[str, Callable[[Tensor, Sublayer, Tensor, Tensor], Tensor]]:
    """Name -> what a stack makes of x [tokens, d], or of streams of it, a sublayer and two random matrices [d, d]."""

    def delta(x: Tensor, sublayer: Sublayer, one: Tensor, other: Tensor) -> Tensor:
        beta, v = 2 * (normed(x) @ one[0]).sigmoid(), 4 * (x @ other[0]).sigmoid()
        return delta_update(x, sublayer(normed(x)), beta, v)

    def streams(x: Tensor, sublayer: Sublayer, one: Tensor, other: Tensor) -> Tensor:
        x = x if x.dim() == 3 else x.expand(STREAMS, TOKENS, WIDTH)
        mixing = doubly_stochastic(one[:STREAMS, :STREAMS])
        read, write = (other[:2, :STREAMS] * WIDTH**0.5).softmax(1)
        update = sublayer(normed(torch.einsum("s,std->td", read, x)))
        return torch.einsum("rs,std->rtd", mixing, x) + write[:, None, None] * update

    def manifold(x: Tensor, sublayer: Sublayer, one: Tensor, other: Tensor, alpha: float | None) -> Tensor:
        _, update = gated(x, sublayer(normed(x)), one)
        beta = 1.0 if alpha is None else signed_beta(x, other, settings.beta_scale)
        return erasing_update(x, update, beta, alpha or 0.0)

    return {
        "no skip": lambda x, sublayer, one, other: sublayer(normed(x)),
        "post-norm": lambda x, sublayer, one, other: normed(x + sublayer(x)),
        "pre-norm residual": lambda x, sublayer, one, other: x + sublayer(normed(x)),
        "gate": lambda *given: manifold(*given, None),
        "four streams, mixed": streams,
        "delta learning": delta,
        "gate and signed beta": lambda *given: manifold(*given, 0.0),
        f"the same, alpha {settings.alpha:g}": lambda *given: manifold(*given, settings.alpha),
    }


def lab(settings: Settings, seed: int, progress: Progress) -> Findings:
    """Ranks of random tokens through stacks of random layers, the same layers for each kind of stack."""
    named = stacks(settings)
    runs: dict[str, list[Tensor]] = {name: [] for name in named}
    for number, name in enumerate(named):
        progress(number / len(named), name)
        for repeat in range(SEEDS):
            runs[name].append(_states(named[name], settings.layers, SEEDS * seed + repeat))
    ranks = {name: torch.stack([effective_rank(one) for one in states]) for name, states in runs.items()}
    ends = {name: rank[:, -1] for name, rank in ranks.items()}
    cosines = {name: float(pairwise_cosine(torch.stack(states)[:, -1]).mean()) for name, states in runs.items()}
    depth = list(range(settings.layers + 1))
    curves = [Curve(name, depth, rank.mean(0).tolist()) for name, rank in ranks.items()]
    panel = Panel("how different the tokens stay", "layer", f"effective rank of {TOKENS} tokens", curves)
    told = "; ".join(f"{name} {float(ends[name].mean()):.1f} / {cosines[name]:.2f}" for name in named)
    noise = float(ranks["no skip"][:, 0].mean())
    return Findings(
        _claims(ends, list(named)),
        [panel],
        [
            f"Effective rank / mean cosine at the end: {told}.",
            f"The random tokens at the start have rank {noise:.1f}: a high rank does not say that they are remembered.",
            "Of four streams each takes a share of every update, so that they move less.",
        ],
    )


def _states(update: Callable[..., Tensor], layers: int, seed: int) -> Tensor:
    """[layers + 1, tokens, d], after each attention and MLP."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, WIDTH, generator=generator).double()
    states = [x]
    for number, sublayer in enumerate(sublayers(layers, generator)):
        one, other = (torch.randn(WIDTH, WIDTH, generator=generator).double() / WIDTH**0.5 for _ in range(2))
        x = update(x, sublayer, one, other)
        if number % 2:
            states.append(x if x.dim() == 2 else x.mean(0))
    return torch.stack(states)


def _claims(ends: dict[str, Tensor], names: list[str]) -> list[Claim]:
    """Compared seed by seed."""
    none, post, residual, gate, _, delta, signed, erasing = names

    def more(name: str, high: str, low: str, source: Literal["paper", "ours"] = "paper", by: float = 1.0) -> Claim:
        above = f"by a factor of {by:g} " if by > 1 else ""
        ranks = [", ".join(f"{value:.1f}" for value in ends[one].tolist()) for one in (high, low)]
        holds = bool((ends[high] > by * ends[low]).all())
        return Claim(
            name, f"higher effective rank {above}in each of {SEEDS} seeds", " against ".join(ranks), holds, source
        )

    return [
        more("a residual stack keeps more than one without skips", residual, none, "ours", 2),
        more("and more than one with norms after the sum", residual, post, "ours", 2),
        more("a gate on the direction keeps more than the residual stack", gate, residual),
        more("a sign that can erase keeps more than the gate alone", signed, gate),
        more("it keeps more than delta learning", signed, delta, "ours"),
        more("so it does with a part of x erased", erasing, gate),
    ]
