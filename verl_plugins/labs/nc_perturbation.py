"""Features that stay near those of the layer before: their variability within classes falls all along the way.

Tirer, Huang, Niles-Weed, Perturbation Analysis of Neural Collapse, ICML 2023, arXiv 2210.16658. K classes with n
samples each, features H [d, Kn] that start at H0, targets Y = I_K (x) 1_n^T, a linear classifier W:

    f(W, H) = 1/(2Kn) |WH - Y|^2 + lw/(2K) |W|^2 + lh/(2Kn) |H|^2 + beta/(2Kn) |H - H0|^2
    central path: W*(H) = Y H^T (H H^T + n lw I)^-1
    flow from H0: dH/dt = -[W*^T (W* H - Y) + lh H + beta (H - H0)] / (Kn)

The paper's is that NC1(H) (`verl_plugins.diagnostics.nc_perturbation`) never rises along the flow, and that it depends
more on the features' regularisation than on the classifier's. The normalisation of f is inferred, the proofs were not
read; steps are Euler's, the problems and the figures of "little" are ours.

Degenerate cases: features of one point per class have NC1 = 0 from the start; all class means in one point have none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from verl_plugins.diagnostics.nc_perturbation import depth_nc1
from verl_plugins.lab import Claim, Curve, Findings, Panel, Progress
from verl_plugins.plugin import setting

CLASSES, SAMPLES, WIDTH = 4, 10, 8
PROBLEMS = 5
LARGE = 10.0
"""beta that holds features where they were."""


@dataclass
class Settings:
    steps: int = setting(60, "Euler steps of a flow", ge=1)
    dt: float = setting(2.0, "their size", gt=0, le=20)
    noise: float = setting(0.6, "spread of the first features around their class", gt=0)
    feature_decay: float = setting(0.05, "lh", ge=0)
    classifier_decay: float = setting(0.05, "lw", gt=0)


@dataclass(frozen=True)
class Flow:
    """Regularisation of classifier and features, how strongly features stay near H0, and the step."""

    classifier: float
    features: float
    beta: float
    dt: float


def best_classifier(features: Tensor, targets: Tensor, decay: float) -> Tensor:
    """W*(H) [K,d] for features [d, Kn] and targets [K, Kn]."""
    per_class = targets.shape[1] / targets.shape[0]
    gram = features @ features.T + per_class * decay * torch.eye(len(features), dtype=features.dtype)
    return torch.linalg.solve(gram, features @ targets.T).T


def central_path(start: Tensor, labels: Tensor, flow: Flow, steps: int) -> list[Tensor]:
    """H [d, Kn] at the start and after each step, labels [Kn]."""
    targets = one_hot(labels).to(start.dtype).T
    path = [start]
    for _ in range(steps):
        here = path[-1]
        weights = best_classifier(here, targets, flow.classifier)
        slope = weights.T @ (weights @ here - targets) + flow.features * here + flow.beta * (here - start)
        path.append(here - flow.dt * slope / len(labels))
    return path


def variability(path: list[Tensor], labels: Tensor) -> Tensor:
    """NC1 of each place of the path."""
    return depth_nc1(torch.stack([features.T for features in path], 1), labels).quotient


def problem(seed: int, noise: float) -> tuple[Tensor, Tensor]:
    """Features [d, Kn] around random means, and their classes [Kn]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(CLASSES).repeat_interleave(SAMPLES)
    means, apart = (torch.randn(WIDTH, size, generator=generator).double() for size in (CLASSES, len(labels)))
    return means[:, labels] + noise * apart, labels


def lab(settings: Settings, seed: int, progress: Progress) -> Findings:
    """Flows from several random starts: free, held a little, held strongly, and with more of either regularisation."""
    free = Flow(settings.classifier_decay, settings.feature_decay, 0.0, settings.dt)
    flows = {
        "free, beta 0": free,
        "beta 0.1": replace(free, beta=0.1),
        f"beta {LARGE:g}": replace(free, beta=LARGE),
        "lh three times": replace(free, features=3 * free.features),
        "lw three times": replace(free, classifier=3 * free.classifier),
    }
    runs: dict[str, Tensor] = {}
    for number, (name, flow) in enumerate(flows.items()):
        progress(number / len(flows), name)
        starts = [problem(PROBLEMS * seed + repeat, settings.noise) for repeat in range(PROBLEMS)]
        paths = [variability(central_path(*start, flow, settings.steps), start[1]) for start in starts]
        runs[name] = torch.stack(paths)
    shown = list(range(settings.steps + 1))
    curves = [Curve(name, shown, (path / path[:, :1]).mean(0).tolist()) for name, path in runs.items()]
    return Findings(_claims(runs), [Panel("variability within classes", "step", "NC1 over that of H0", curves)])


def _claims(runs: dict[str, Tensor]) -> list[Claim]:
    free, held, tight, features, classifier = runs.values()
    left: Callable[[Tensor], Tensor] = lambda path: path[:, -1] / path[:, 0]  # noqa: E731
    told: Callable[[Tensor], str] = lambda path: ", ".join(f"{value:.2f}" for value in left(path).tolist())  # noqa: E731

    def falls(name: str, path: Tensor) -> Claim:
        worst = float((path[:, 1:] / path[:, :-1]).max())
        return Claim(
            name,
            f"each step's NC1 below the one before in {PROBLEMS} problems",
            f"largest ratio {worst:.6f}",
            worst < 1,
        )

    moved = [(left(path) - left(free)).abs() for path in (features, classifier)]
    return [
        falls("variability falls all along the central path", free),
        falls("and where features are held near those of the layer before", held),
        Claim(
            "held strongly, they hardly collapse",
            "0.9 to 1 of NC1 is left, and more than without",
            f"{told(tight)} against {told(free)}",
            bool(((left(tight) > 0.9) & (left(tight) <= 1) & (left(tight) > left(free))).all()),
            "derived",
        ),
        Claim(
            "the features' regularisation moves variability more than the classifier's",
            f"three times lh changes what is left by more than three times lw, in {PROBLEMS} problems",
            f"by {float(moved[0].mean()):.4f} against {float(moved[1].mean()):.4f}",
            bool((moved[0] > moved[1]).all()),
        ),
    ]
