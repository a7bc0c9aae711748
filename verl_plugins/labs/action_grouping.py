"""How coarse a grouping should be: the error of pooled scores against the noise, with the plugin's own functions.

Li, Ju, Shroff, arXiv 2306.12981. The paper's is the principle, that a finer grouping is not always better; the setting,
the numbers and the claims about `select` and `shrink` are ours.

The worth of a response is the mean of its answer, drawn from [0, 1], plus a deviation of its own; its score is that
plus noise. Measured is the mean squared error of a pooled score about the worth, at six sizes of the noise.

Degenerate cases: without deviations within an answer singletons are never best; responses of one have nothing to pool.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from verl_plugins import Groups
from verl_plugins.lab import Claim, Curve, Findings, Panel, Progress
from verl_plugins.plugin import setting
from verl_plugins.reward.action_grouping import select, shrink

VARIANCES = (0.0025, 0.01, 0.04, 0.16, 0.64, 2.5)
LEVELS = ("singletons", "by answer", "all")
COST, GAIN = 0.15, 0.05
"""Of `select`; it is at 0.10 and 0.10, too near to tell these from a tenth."""


@dataclass
class Settings:
    responses: int = setting(8, "responses to a prompt", ge=1)
    answers: int = setting(3, "different answers that a response may have", ge=1)
    deviation: float = setting(0.08, "standard deviation of worths of one answer", ge=0)
    prompts: int = setting(20000, "prompts at each size of the noise", ge=1)


def worths(settings: Settings, generator: torch.Generator) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """[B] worth, prompt and answer of responses, B = prompts * responses."""
    shape = settings.prompts, settings.responses
    answer = torch.randint(settings.answers, shape, generator=generator)
    means = torch.rand(settings.prompts, settings.answers, generator=generator, dtype=torch.float64)
    own = settings.deviation * torch.randn(shape, generator=generator, dtype=torch.float64)
    prompt = torch.arange(settings.prompts)[:, None].expand(shape)
    return (means.gather(1, answer) + own).flatten(), prompt.flatten().numpy(), answer.flatten().numpy()


def errors(settings: Settings, variance: float, generator: torch.Generator) -> dict[str, float]:
    """Mean squared error of the scores pooled in each way, the fixed levels first."""
    worth, prompt, answer = worths(settings, generator)
    scores = worth + variance**0.5 * torch.randn(worth.shape, generator=generator, dtype=torch.float64)
    levels = [Groups(np.arange(len(prompt))), Groups(prompt * settings.answers + answer), Groups(prompt)]
    found = {name: parts.mean(scores) for name, parts in zip(LEVELS, levels, strict=True)}
    found["select"] = select(scores, levels, levels[-1], variance)[0]
    found["shrink"] = shrink(scores, levels[1], variance)[0]
    return {name: float((pooled - worth).square().mean()) for name, pooled in found.items()}


def lab(settings: Settings, seed: int, progress: Progress) -> Findings:
    """Errors of singletons, answers, whole groups, `select` and `shrink` at each size of the noise."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[float]] = {}
    for number, variance in enumerate(VARIANCES):
        progress(number / len(VARIANCES), f"noise of variance {variance:g}")
        for name, error in errors(settings, variance, generator).items():
            found.setdefault(name, []).append(error)
    noise = [variance**0.5 for variance in VARIANCES]
    styles = {name: "dashed" for name in LEVELS}
    curves = [Curve(name, noise, values, styles.get(name, "line")) for name, values in found.items()]
    panel = Panel(
        "error of pooled scores", "sigma, standard deviation of the noise", "mean squared error", curves, "xy"
    )
    best = [min(found[level][number] for level in LEVELS) for number in range(len(VARIANCES))]
    behind = [one / other - 1 for one, other in zip(found["select"], best, strict=True)]
    return Findings(
        _claims(found),
        [panel],
        [
            f"{name}: {', '.join(f'{value:.4f}' for value in values)} at a variance of the noise of "
            f"{', '.join(f'{variance:g}' for variance in VARIANCES)}."
            for name, values in found.items()
        ]
        + [f"`select` is up to {100 * max(behind):.0f} % worse than the best fixed level: it chooses by noisy scores."],
    )


def _claims(found: dict[str, list[float]]) -> list[Claim]:
    table = torch.tensor([found[level] for level in LEVELS])
    best = [LEVELS[place] for place in table.min(0).indices.tolist()]
    places = [LEVELS.index(level) for level in best]
    shrunk, chosen = (
        [one / other for one, other in zip(found[mode], found["singletons"], strict=True)]
        for mode in ("shrink", "select")
    )
    return [
        Claim(
            "the best fixed grouping gets coarser as the noise grows",
            "singletons, then by answer, then all",
            ", ".join(best),
            places == sorted(places) and set(best) == set(LEVELS),
        ),
        Claim(
            "`shrink` is never worse than singletons",
            "error at most that of singletons at every size of the noise",
            f"{min(shrunk):.2f} to {max(shrunk):.2f} of it",
            max(shrunk) <= 1,
            "ours",
        ),
        Claim(
            "`select` costs little where there is next to no noise",
            "at a variance of 0.0025 at most 15 % more error than singletons",
            f"{100 * (chosen[0] - 1):.1f} % more",
            chosen[0] <= 1 + COST,
            "ours",
        ),
        Claim(
            "`select` gains from there on",
            "from a variance of 0.01 on at least 5 % less error than singletons",
            f"{100 * (1 - max(chosen[1:])):.1f} to {100 * (1 - min(chosen[1:])):.1f} % less",
            max(chosen[1:]) <= 1 - GAIN,
            "ours",
        ),
    ]
