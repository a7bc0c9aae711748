"""What geometry imbalanced classes have: orthogonal means, long ones for rare classes, and classes that vanish.

Dang, Tran, Osher, Tran-The, Ho, Nguyen, Neural Collapse in Deep Linear Networks: From Balanced to Imbalanced Data, ICML
2023, arXiv 2301.00437. A lab of the bias-free squared error with M linear layers W_m and free features H [d, N]:

    1/(2N) |W_M ... W_1 H - Y|^2 + sum_m lw_m/2 |W_m|^2 + lh/2 |H|^2,    n_k samples of class k, N = sum n_k

Derived here, the paper's theorems were not read: the optimum decouples by class. With the cost
C_k = (lw_1 ... lw_M lh n_k)^(1/(M+1)) the fitted response p_k in [0, 1] of class k minimises

    n_k/(2N) (p - 1)^2 + (M+1)/2 C_k p^(2/(M+1))

For M = 1, p_k = max(0, 1 - N sqrt(lw lh / n_k)). For M >= 2 it is the larger root of
n_k/N (p - 1) + C_k p^((1-M)/(1+M)) = 0 where that is better than p = 0, which is always a local minimum: from small
weights a descent may lose a class that the optimum keeps. Each regularised term of class k equals
t_k = C_k p_k^(2/(M+1)): features have length sqrt(t_k / (lh n_k)), layer m the singular value sqrt(t_k / lw_m). Means
of classes are orthogonal, and there is no variance within a class.

Degenerate cases: p_k = 0 makes all lengths of the class 0; a class without samples has p_k = 0. The paper's results on
cross-entropy are not covered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from verl_plugins.diagnostics.nc_deep_linear import Optimum, Problem, optimum
from verl_plugins.lab import Claim, Curve, Findings, Panel, Progress
from verl_plugins.plugin import setting

WIDTH = 7
"""Of hidden layers and features."""
USUAL, SMALL, NEAR = 0.5, 0.05, 0.05
"""Size of random parameters: of a usual start, of a small one, and of what is added to the formula's optimum."""


@dataclass
class Settings:
    iterations: int = setting(3000, "of L-BFGS for each fit, at most", ge=1)
    starts: int = setting(1, "random starts of each fit, beside one near the formula's optimum", ge=1)


PROBLEMS = {
    "one layer": Problem((20, 8, 3), (2e-3,), 5e-4),
    "two layers": Problem((20, 8, 4), (0.01, 0.01), 0.01),
    "three layers": Problem((20, 8, 4), (0.01, 0.01, 0.01), 0.01),
    "equal classes": Problem((6, 6, 6, 6), (0.01, 0.02), 0.01),
    "one layer, a class vanishes": Problem((20, 8, 3), (0.06,), 0.06),
    "two layers, a class vanishes": Problem((20, 8, 3), (0.03, 0.03), 0.03),
}
SLOPES, VANISHING, LOST = "one layer", "one layer, a class vanishes", "three layers"


@dataclass(frozen=True)
class Weights:
    """Layers, the first one first, and features [d, samples]."""

    layers: Sequence[Tensor]
    features: Tensor

    @classmethod
    def of(cls, flat: Tensor, problem: Problem) -> Weights:
        """Views into one vector of all parameters."""
        outputs = [WIDTH] * (len(problem.decays) - 1) + [len(problem.counts)]
        shapes = [(size, WIDTH) for size in outputs] + [(WIDTH, sum(problem.counts))]
        *layers, features = (
            part.view(shape)
            for part, shape in zip(flat.split([rows * columns for rows, columns in shapes]), shapes, strict=True)
        )
        return cls(layers, features)


def labels(problem: Problem) -> Tensor:
    """Y [classes, samples], sorted by class."""
    classes = torch.arange(len(problem.counts)).repeat_interleave(torch.tensor(problem.counts))
    return one_hot(classes, len(problem.counts)).double().T


def objective(weights: Weights, problem: Problem) -> Tensor:
    """The loss as it stands in the paper's setting."""
    fitted_labels = weights.features
    for layer in weights.layers:
        fitted_labels = layer @ fitted_labels
    loss = (fitted_labels - labels(problem)).square().sum() / (2 * sum(problem.counts))
    for layer, decay in zip(weights.layers, problem.decays, strict=True):
        loss = loss + decay / 2 * layer.square().sum()
    return loss + problem.feature_decay / 2 * weights.features.square().sum()


def optimal_weights(problem: Problem) -> Tensor:
    """All parameters of the optimum in one vector; class k has direction k in every layer."""
    found = optimum(problem)
    classes = len(problem.counts)
    layers = []
    for number in range(len(problem.decays)):
        layer = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
        layer[range(classes), range(classes)] = found.singular_values[:, number]
        layers.append(layer)
    layers[-1] = layers[-1][:classes]
    features = torch.zeros(WIDTH, sum(problem.counts), dtype=torch.float64)
    features[:classes] = found.feature_norm[:, None] * labels(problem)
    return torch.cat([part.flatten() for part in (*layers, features)])


def descended(flat: Tensor, problem: Problem, iterations: int) -> tuple[Weights, float]:
    """Where L-BFGS ends from these parameters, and the objective there."""
    flat = flat.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [flat],
        max_iter=iterations,
        max_eval=2 * iterations,
        tolerance_grad=1e-10,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(Weights.of(flat, problem), problem)
        loss.backward()
        return loss

    optimizer.step(closure)
    flat = flat.detach()
    weights = Weights.of(flat, problem)
    return weights, float(objective(weights, problem))


@dataclass(frozen=True)
class Ends:
    """Where the descents of a problem end."""

    problem: Problem
    theory: Optimum
    best: Weights
    """With the lowest objective."""
    gap: float
    """Its objective above the formula's."""
    small_gap: float
    """That of the descent from small weights."""

    @property
    def means(self) -> Tensor:
        """Of the features of each class [d, classes]."""
        y = labels(self.problem)
        return self.best.features @ y.T / y.sum(1)

    @property
    def cosine(self) -> float:
        """Largest between the means of two classes that do not vanish."""
        kept = self.means[:, self.theory.fit > 0]
        unit = kept / kept.norm(dim=0)
        return float((unit.T @ unit - torch.eye(kept.shape[1])).abs().max())

    @property
    def within(self) -> float:
        """Spread of features around the mean of their class, as a share of all."""
        features = self.best.features
        return float((features - self.means @ labels(self.problem)).norm() / features.norm())


def lab(settings: Settings, seed: int, progress: Progress) -> Findings:
    """The formula against L-BFGS in six problems, from usual starts, from small ones and from near the optimum."""
    generator = torch.Generator().manual_seed(seed)
    ends = {}
    for number, (name, problem) in enumerate(PROBLEMS.items()):
        progress(number / len(PROBLEMS), name)
        ends[name] = _ends(problem, settings, generator)
    return Findings([*_agreement(list(ends.values())), *_sizes(ends)], [_panel(ends[SLOPES])])


def _ends(problem: Problem, settings: Settings, generator: torch.Generator) -> Ends:
    theory, optimal = optimum(problem), optimal_weights(problem)

    def noise(size: float) -> Tensor:
        return size * torch.randn(len(optimal), generator=generator).double()

    starts = [noise(USUAL) for _ in range(settings.starts)] + [optimal + noise(NEAR)]
    found = [descended(start, problem, settings.iterations) for start in starts]
    best, least = min(found, key=lambda pair: pair[1])
    _, small = descended(noise(SMALL), problem, settings.iterations)
    return Ends(problem, theory, best, least - float(theory.objective), small - float(theory.objective))


def _agreement(every: list[Ends]) -> list[Claim]:
    gaps = [ends.gap for ends in every]
    cosine, within = (max(getattr(ends, what) for ends in every) for what in ("cosine", "within"))
    return [
        Claim(
            "no descent ends below the formula's objective, and the best reaches it",
            f"above it by 0 to 1e-7 in {len(every)} problems",
            f"by {min(gaps):.0e} to {max(gaps):.0e}",
            min(gaps) > -1e-12 and max(gaps) < 1e-7,
            "derived",
        ),
        Claim(
            "means of classes are orthogonal, whatever the class sizes",
            "cosines below 1e-6",
            f"largest {cosine:.0e}",
            cosine < 1e-6,
        ),
        Claim("features of a class are one point", "spread below 1e-4 of their length", f"{within:.0e}", within < 1e-4),
    ]


def _sizes(ends: dict[str, Ends]) -> list[Claim]:
    """How lengths depend on class sizes, and which classes vanish."""
    feature, head = _slopes(ends[SLOPES])
    vanishing, lost = ends[VANISHING], ends[LOST]
    limit = sum(vanishing.problem.counts) ** 2 * vanishing.problem.decays[0] * vanishing.problem.feature_decay
    lengths = vanishing.means.norm(dim=0).tolist()
    gone = [length < 1e-3 for length in lengths]
    return [
        Claim(
            "frequent classes have short features and long rows in the last layer",
            "lengths go as n^(-1/4) and n^(1/4)",
            f"exponents {feature:.3f} and {head:.3f}",
            abs(feature + 0.25) < 0.01 and abs(head - 0.25) < 0.01,
            "derived",
        ),
        Claim(
            "with one layer a class vanishes iff it has at most N^2 lw lh samples",
            f"of {', '.join(map(str, vanishing.problem.counts))} samples those with at most {limit:.1f}",
            f"lengths {', '.join(f'{length:.2f}' for length in lengths)}",
            gone == [count <= limit for count in vanishing.problem.counts],
            "derived",
        ),
        Claim(
            "with several layers a descent from small weights loses classes that the optimum keeps",
            "ends above the optimum by more than 0.001",
            f"by {lost.small_gap:.3f}",
            lost.small_gap > 1e-3 and bool((lost.theory.fit > 0).all()),
            "derived",
        ),
    ]


def _slopes(ends: Ends) -> tuple[float, float]:
    """Exponents of the lengths of features and of rows of the last layer, by least squares over classes."""
    size = torch.tensor(ends.problem.counts).double().log()
    centred = size - size.mean()
    lengths = ends.means.norm(dim=0), ends.best.layers[-1].norm(dim=1)
    first, second = (float((centred * length.log()).sum() / centred.square().sum()) for length in lengths)
    return first, second


def _panel(ends: Ends) -> Panel:
    counts = list(ends.problem.counts)
    theory = ends.theory.feature_norm, ends.theory.singular_values[:, -1]
    found = ends.means.norm(dim=0), ends.best.layers[-1].norm(dim=1)
    names = "features (dots: the fit)", "rows of the last layer (dots: the fit)"
    curves = [
        curve
        for name, line, dots in zip(names, theory, found, strict=True)
        for curve in (Curve(name, counts, line.tolist(), "dashed"), Curve("", counts, dots.tolist(), "points"))
    ]
    return Panel("lengths by class size, one layer", "samples of the class", "length", curves, "xy")
