"""When a conditional latent is ignored: a direction of y collapses iff what x leaves unexplained of it is too little.

Dang, Tran, Nguyen, Ho, Beyond Vanilla Variational Autoencoders: Detecting Posterior Collapse in Conditional and
Hierarchical VAEs, ICLR 2024, arXiv 2306.05023. A lab of the paper's linear conditional VAE; it trains no policy.

y | x, z ~ N(U z + T x, s2 I), prior z ~ N(0, I), posterior q(z | x, y) = N(A y + B x, diag S) with S learned:

    loss = E |y - U z - T x|^2 / (2 s2) + beta E KL(q || N(0, I))

Derived here, the paper's theorem was not read: let R = Cyy - Cyx Cxx^+ Cxy be the covariance of y that x does not
explain, l_1 >= l_2 >= ... its eigenvalues. Then the squared singular values of the best U are max(0, l_k - beta s2) for
k up to the number of latents, and latent k collapses to the prior iff l_k <= beta s2.

Degenerate cases: y a function of x gives R = 0 and collapses everything. Conditions that are linear in each other
(Cxx singular) count once. Latents beyond the dimension of y collapse. No condition leaves R = Cyy, the plain VAE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from verl_plugins.lab import Claim, Curve, Findings, Panel, Progress
from verl_plugins.plugin import setting

STARTS = 2
"""Random starts of each fit, of which the lowest loss counts."""
VARIANCES = 4.0, 2.0, 1.0, 0.6
"""Of the directions of y in the two sweeps; x has as many, each correlated with one of them."""
CORRELATIONS = 0.0, 0.5, 0.7, 0.8, 0.9, 0.95
BETAS = 0.1, 0.3, 1.0, 2.0, 4.0, 8.0
ACTIVE = 1e-3
"""KL to the prior, in nats, from which a latent counts as used."""


@dataclass
class Settings:
    beta: float = setting(1.0, "weight of the KL term in the problems that do not vary it", gt=0)
    decoder_variance: float = setting(0.5, "variance s2 of the decoder", gt=0)
    iterations: int = setting(1000, "of L-BFGS for each fit, at most", ge=1)


def regression(cov_x: Tensor, cov_xy: Tensor) -> Tensor:
    """The best prediction of y from x, Cyx Cxx^+ [dy, dx]; conditions that others give already count once."""
    return cov_xy.T @ torch.linalg.pinv(cov_x, rtol=1e-10, hermitian=True)


def residual_covariance(cov_x: Tensor, cov_xy: Tensor, cov_y: Tensor) -> Tensor:
    """R [dy, dy] of Cxx [dx, dx], Cxy [dx, dy] and Cyy [dy, dy]; dx may be 0."""
    return cov_y - regression(cov_x, cov_xy) @ cov_xy


def spectrum(cov: Tensor) -> Tensor:
    """Eigenvalues of a symmetric matrix, largest first."""
    return torch.linalg.eigvalsh(cov).flip(0)


def optimal_strengths(residual_eigenvalues: Tensor, latent_dim: int, threshold: float) -> Tensor:
    """Squared singular values [latents] of the best U, largest first; the threshold is beta s2."""
    strengths = residual_eigenvalues.new_zeros(latent_dim)
    kept = residual_eigenvalues[:latent_dim]
    strengths[: len(kept)] = (kept - threshold).clamp_min(0)
    return strengths


@dataclass(frozen=True)
class Problem:
    """Covariance of (x, y), [dx + dy, dx + dy], and what is fitted to it."""

    name: str
    cov: Tensor
    dx: int
    latents: int
    beta: float
    variance: float
    """Of the decoder."""

    @property
    def threshold(self) -> float:
        return self.beta * self.variance

    @property
    def blocks(self) -> tuple[Tensor, Tensor, Tensor]:
        """Cxx, Cxy, Cyy."""
        return self.cov[: self.dx, : self.dx], self.cov[: self.dx, self.dx :], self.cov[self.dx :, self.dx :]

    @property
    def strengths(self) -> Tensor:
        """Squared singular values [latents] that the theory predicts."""
        return optimal_strengths(spectrum(residual_covariance(*self.blocks)), self.latents, self.threshold)


@dataclass(frozen=True)
class Model:
    """U [dy, k], T [dy, dx], A [k, dy], B [k, dx] and log S [k]."""

    decoder: Tensor
    skip: Tensor
    from_y: Tensor
    from_x: Tensor
    log_variance: Tensor

    @classmethod
    def of(cls, flat: Tensor, dx: int, dy: int, latents: int) -> Model:
        """Views into one vector of all parameters."""
        shapes = (dy, latents), (dy, dx), (latents, dy), (latents, dx), (latents,)
        parts = flat.split([torch.Size(shape).numel() for shape in shapes])
        return cls(*(part.view(shape) for part, shape in zip(parts, shapes, strict=True)))

    def latent_kl(self, cov: Tensor) -> Tensor:
        """E KL(q || N(0, 1)) of each latent [k], in nats."""
        encoder = torch.cat([self.from_x, self.from_y], 1)
        second_moment = ((encoder @ cov) * encoder).sum(1)
        return (second_moment + self.log_variance.exp() - self.log_variance - 1) / 2


def expected_loss(model: Model, problem: Problem) -> Tensor:
    """The loss in expectation over the data, exactly: no sampling."""
    identity = torch.eye(len(model.decoder), dtype=problem.cov.dtype)
    error = torch.cat([-model.decoder @ model.from_x - model.skip, identity - model.decoder @ model.from_y], 1)
    squared = ((error @ problem.cov) * error).sum() + (model.decoder.square() @ model.log_variance.exp()).sum()
    return squared / (2 * problem.variance) + problem.beta * model.latent_kl(problem.cov).sum()


def optimal_model(problem: Problem) -> Model:
    """The model of the theory: U along the leading eigenvectors of R, the exact posterior that goes with it."""
    cov_x, cov_xy, cov_y = problem.blocks
    directions = torch.linalg.eigh(residual_covariance(cov_x, cov_xy, cov_y)).eigenvectors.flip(1)[:, : problem.latents]
    strengths = problem.strengths
    decoder = problem.cov.new_zeros(len(cov_y), problem.latents)
    kept = min(len(cov_y), problem.latents)
    decoder[:, :kept] = directions * strengths[:kept].sqrt()
    skip = regression(cov_x, cov_xy)
    whole = strengths + problem.threshold
    from_y = decoder.T / whole[:, None]
    return Model(decoder, skip, from_y, -from_y @ skip, (problem.threshold / whole).log())


def fit(problem: Problem, generator: torch.Generator, iterations: int) -> tuple[Model, float]:
    """The model that L-BFGS finds from random starts, and its loss."""
    dx, dy = problem.dx, len(problem.cov) - problem.dx
    size = 2 * dy * problem.latents + dx * (dy + problem.latents) + problem.latents
    found = [_descend(torch.randn(size, generator=generator).double(), problem, iterations) for _ in range(STARTS)]
    flat, loss = min(found, key=lambda pair: pair[1])
    return Model.of(flat, dx, dy, problem.latents), loss


def _descend(flat: Tensor, problem: Problem, iterations: int) -> tuple[Tensor, float]:
    flat = (0.5 * flat).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [flat],
        max_iter=iterations,
        max_eval=2 * iterations,
        tolerance_grad=1e-6,
        tolerance_change=1e-11,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        model = Model.of(flat, problem.dx, len(problem.cov) - problem.dx, problem.latents)
        loss = expected_loss(model, problem)
        loss.backward()
        return loss

    optimizer.step(closure)
    return flat.detach(), float(closure().detach())


def strengths_of(model: Model) -> Tensor:
    """Squared singular values of U [latents], largest first; beyond the dimension of y they are 0."""
    found = torch.linalg.svdvals(model.decoder).square()
    return torch.cat([found, found.new_zeros(len(model.log_variance) - len(found))])


def collapsed(model: Model, cov: Tensor) -> int:
    """How many latents carry nothing: their posterior is the prior."""
    return int((model.latent_kl(cov) < ACTIVE).sum())


def correlated(correlation: float, rotation: Tensor, settings: Settings, beta: float) -> Problem:
    """x and y of four directions each, pairwise correlated; y is turned by `rotation`."""
    deviations = torch.tensor(VARIANCES, dtype=torch.float64).sqrt()
    cross = correlation * torch.diag(deviations) @ rotation.T
    cov_y = rotation @ torch.diag(deviations.square()) @ rotation.T
    cov = torch.cat([torch.cat([torch.eye(len(VARIANCES)).double(), cross], 1), torch.cat([cross.T, cov_y], 1)])
    return Problem(f"correlation {correlation}", cov, len(VARIANCES), len(VARIANCES), beta, settings.decoder_variance)


def problems(settings: Settings, generator: torch.Generator) -> list[Problem]:
    """Random ones: usual, uncorrelated, of one dimension, with more latents than y has, and the degenerate ones."""

    def drawn(name: str, dx: int, dy: int, latents: int, cross: float = 1.0, beta: float = settings.beta) -> Problem:
        root = torch.randn(dx + dy, dx + dy, generator=generator).double()
        cov = root @ root.T / (dx + dy) ** 0.5
        cov[:dx, dx:] *= cross
        cov[dx:, :dx] *= cross
        return Problem(name, cov, dx, latents, beta, settings.decoder_variance)

    twice = drawn("a condition given twice", 1, 3, 2)
    order = [0, 0, 1, 2, 3]
    function = drawn("y a function of x", 3, 2, 2)
    mapped = torch.cat([torch.eye(3).double(), function.cov[3:, :3]])
    return [
        drawn("correlated", 2, 4, 3),
        drawn("uncorrelated", 2, 4, 3, cross=0.0),
        drawn("one-dimensional", 1, 1, 1, cross=0.5),
        drawn("more latents than y has directions", 2, 3, 5),
        drawn("beta 0.1", 2, 4, 3, beta=0.1),
        drawn("beta 10", 2, 4, 3, beta=10.0),
        drawn("no condition", 0, 4, 3),
        Problem(twice.name, twice.cov[order][:, order], 2, 2, twice.beta, twice.variance),
        Problem(function.name, mapped @ function.cov[:3, :3] @ mapped.T, 3, 2, function.beta, function.variance),
    ]


def lab(settings: Settings, seed: int, progress: Progress) -> Findings:
    """Fits of nine problems, and of one whose correlation and whose beta are varied."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(len(VARIANCES), len(VARIANCES), generator=generator).double()).Q
    single = problems(settings, generator)
    by_correlation = [correlated(one, rotation, settings, settings.beta) for one in CORRELATIONS]
    by_beta = [correlated(0.5, rotation, settings, beta) for beta in BETAS]
    every = [*single, *by_correlation, *by_beta]
    fits = []
    for number, problem in enumerate(every):
        progress(number / len(every), problem.name)
        fits.append(fit(problem, generator, settings.iterations))
    models = [model for model, _ in fits]
    counts = [collapsed(model, problem.cov) for model, problem in zip(models, every, strict=True)]
    first, second = len(single), len(single) + len(by_correlation)
    claims = [
        *_agreement(every, models, [loss for _, loss in fits], counts),
        _more("more correlation of x and y collapses more", "correlation", CORRELATIONS, counts[first:second], "paper"),
        _more("a larger beta collapses more", "beta", BETAS, counts[second:], "derived"),
    ]
    panels = [
        _panel("correlation of x and y", CORRELATIONS, by_correlation, models[first:second]),
        _panel("beta", BETAS, by_beta, models[second:], log="x"),
    ]
    notes = ["The decoder's variance acts as beta does: the loss over beta has only their product."]
    return Findings(claims, panels, notes)


def _agreement(
    every: Sequence[Problem], models: Sequence[Model], losses: Sequence[float], counts: Sequence[int]
) -> list[Claim]:
    """Of all fits with the theory."""
    pairs = list(zip(every, models, strict=True))
    far = max(float((problem.strengths - strengths_of(model)).abs().max()) for problem, model in pairs)
    best = [float(expected_loss(optimal_model(problem), problem)) for problem in every]
    gaps = [loss - least for loss, least in zip(losses, best, strict=True)]
    expected = [int((problem.strengths <= 0).sum()) for problem in every]
    right = sum(found == there for found, there in zip(counts, expected, strict=True))
    of = len(every)
    return [
        Claim(
            "squared singular values of U are max(0, l_k - beta s2)",
            f"within 0.002 in {of} problems",
            f"largest difference {far:.0e}",
            far < 2e-3,
            "derived",
        ),
        Claim(
            "no fit beats the formula's loss, and each reaches it",
            "loss of the fit above the formula's by 0 to 1e-6",
            f"by {min(gaps):.0e} to {max(gaps):.0e}",
            min(gaps) > -1e-9 and max(gaps) < 1e-6,
            "derived",
        ),
        Claim(
            "a latent collapses iff l_k <= beta s2",
            f"as many collapsed latents as the formula says in {of} problems",
            f"in {right}",
            right == of,
            "derived",
        ),
    ]


def _more(
    name: str, what: str, values: Sequence[float], counts: Sequence[int], source: Literal["paper", "derived"]
) -> Claim:
    rising = list(counts) == sorted(counts) and counts[-1] > counts[0]
    at = ", ".join(f"{value:g}" for value in values)
    expected = f"collapsed latents never fewer, at the end more, at {what} {at}"
    return Claim(name, expected, f"{', '.join(map(str, counts))} of {len(VARIANCES)}", rising, source)


def _panel(
    what: str, values: Sequence[float], swept: Sequence[Problem], models: Sequence[Model], log: Literal["", "x"] = ""
) -> Panel:
    """Squared singular values against what is varied, the theory as lines."""
    theory = torch.stack([problem.strengths for problem in swept])
    found = torch.stack([strengths_of(model) for model in models])
    curves = [
        curve
        for k in range(theory.shape[1])
        for curve in (
            Curve(f"latent {k + 1} (dots: the fit)", list(values), theory[:, k].tolist(), "dashed"),
            Curve("", list(values), found[:, k].tolist(), "points"),
        )
    ]
    return Panel("strength of each latent in the decoder", what, "squared singular value of U", curves, log)
