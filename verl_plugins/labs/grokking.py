"""Grokking without weight decay: a network that has learnt its sums by heart comes to know all others.

Prieto, Barsbey, Mediano, Birdal, Grokking at the Edge of Numerical Stability, arXiv 2501.04697 (ICLR 2025). The labs of
`perp_grad` and of `stablemax`, with the projection and the transform that training uses. The setting is the paper's and
its script's: a + b modulo 113 as two one-hot vectors, a network 226-200-200-113 without biases, 40 % of all pairs in
one batch, no weight decay; AdamW at 0.01, or SGD at 10 with momentum 0.8 and StableMax. Ours: single precision
throughout, the thresholds in the tables, and that a training with nothing left to learn ends.

Degenerate cases: a share that leaves no pair to train on, or none held out, is refused; a network that is too small
stays at chance, 1 in p.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from verl_plugins.errors import CompositionError
from verl_plugins.lab import Claim, Curve, Findings, Panel, Progress
from verl_plugins.optim.perp_grad import project
from verl_plugins.optim.stablemax import symlog
from verl_plugins.plugin import setting

EVERY = 10
"""Epochs between two looks at the held-out pairs, after that of the first."""
MARGINS = (*range(1, 101), 1_000_000)
"""How far the right logit is above the others, in the claim about saturation."""
Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]
Shape = Callable[[Tensor], Tensor]


@dataclass
class PerpGradSettings:
    modulus: int = setting(113, "p: sums are taken modulo it", ge=2)
    width: int = setting(200, "units of each of the two hidden layers", ge=1)
    train_share: float = setting(0.4, "of all pairs, the share that is trained on", gt=0, lt=1)
    learning_rate: float = setting(0.01, "of AdamW", gt=0)
    epochs: int = setting(300, "steps, each on all training pairs", ge=1)


@dataclass
class StableMaxSettings:
    modulus: int = setting(113, "p: sums are taken modulo it", ge=2)
    width: int = setting(200, "units of each of the two hidden layers", ge=1)
    train_share: float = setting(0.4, "of all pairs, the share that is trained on", gt=0, lt=1)
    learning_rate: float = setting(10.0, "of SGD", gt=0)
    momentum: float = setting(0.8, "of SGD", ge=0, lt=1)
    epochs: int = setting(500, "steps, each on all training pairs", ge=1)
    enough: float = setting(0.01, "a loss below which a training ends: nothing is left to learn from", ge=0)


class Task(NamedTuple):
    """Pairs [n,2] and their sums [n]; those that are trained on, and the others."""

    pairs: Tensor
    sums: Tensor
    other_pairs: Tensor
    other_sums: Tensor


class Course(NamedTuple):
    """One training, looked at every few epochs."""

    epochs: list[int]
    known: list[float]
    """Accuracy on the pairs that are trained on."""
    held_out: list[float]
    along: list[float]
    """Mean over tensors: the share of the gradient's norm that lies along the weights."""
    largest: list[float]
    """Size of the largest logit."""


def all_sums(modulus: int, share: float, seed: int) -> Task:
    """All pairs of numbers below the modulus, shuffled and divided.

    Raises:
        CompositionError: the share is so small or large that one of the parts is empty.
    """
    numbers = torch.arange(modulus)
    pairs = torch.cartesian_prod(numbers, numbers)
    pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))]
    sums, count = pairs.sum(1) % modulus, round(share * len(pairs))
    if not 0 < count < len(pairs):
        raise CompositionError(
            f"train_share={share} of the {len(pairs)} pairs of modulus={modulus} leaves none to train on, or none held "
            "out: set it nearer to 0.4"
        )
    return Task(pairs[:count], sums[:count], pairs[count:], sums[count:])


def network(modulus: int, width: int, seed: int) -> list[Tensor]:
    """Weights of three layers without biases, uniform within 1 / sqrt(inputs); the first is [2p, width]."""
    generator, sizes = torch.Generator().manual_seed(seed), (2 * modulus, width, width, modulus)
    layers = []
    for inputs, outputs in zip(sizes, sizes[1:], strict=False):
        drawn = torch.rand(inputs, outputs, generator=generator)
        layers.append(((2 * drawn - 1) / inputs**0.5).requires_grad_())
    return layers


def logits(layers: list[Tensor], pairs: Tensor) -> Tensor:
    """[n,2] pairs -> [n,p]; two one-hot vectors pick a row each of the first layer."""
    first, second, third = layers
    places = pairs + torch.tensor([0, len(first) // 2])
    return (embedding_bag(places, first, mode="sum").relu() @ second).relu() @ third


def losses(shaped: Tensor, sums: Tensor) -> Tensor:
    """[n] cross-entropy of each pair."""
    return -shaped.log_softmax(1).gather(1, sums[:, None])[:, 0]


def trained(
    task: Task,
    layers: list[Tensor],
    optimizer: Optimizer,
    epochs: int,
    *,
    perp: bool,
    shape: Shape,
    enough: float = 0.0,
) -> Iterator[Course]:
    """Train in place, until the mean loss is below `enough`; yields the course so far, after each look."""
    steps, course = optimizer(layers), Course([], [], [], [], [])
    for epoch in range(1, epochs + 1):
        z = logits(layers, task.pairs)
        steps.zero_grad()
        loss = losses(shape(z), task.sums).mean()
        loss.backward()
        gradients = [layer.grad for layer in layers]
        found = project([layer.detach() for layer in layers], gradients)
        if perp:
            for layer, gradient in zip(layers, found.gradients, strict=True):
                layer.grad = gradient
        steps.step()
        last = epoch == epochs or float(loss.detach()) < enough
        if epoch == 1 or last or epoch % EVERY == 0:
            with torch.no_grad():
                held_out = _right(logits(layers, task.other_pairs), task.other_sums)
            seen = (epoch, _right(z, task.sums), held_out, float(found.removed.mean()), float(z.detach().abs().max()))
            for values, value in zip(course, seen, strict=True):
                values.append(value)
            yield course
        if last:
            return


def _right(z: Tensor, sums: Tensor) -> float:
    return float((z.argmax(1) == sums).double().mean())


def _followed(courses: Iterator[Course], epochs: int, progress: Progress, what: str, half: int) -> Course:
    """The whole course of one of two trainings."""
    for course in courses:
        progress((half + course.epochs[-1] / epochs) / 2, what)
    return course


def perp_grad(settings: PerpGradSettings, seed: int, progress: Progress) -> Findings:
    """AdamW with its gradients made orthogonal to the weights, and as it is."""
    task = all_sums(settings.modulus, settings.train_share, seed)
    courses, names = [], ("⊥AdamW", "AdamW")
    for half, name in enumerate(names):
        adamw = lambda layers: torch.optim.AdamW(layers, settings.learning_rate, weight_decay=0.0)  # noqa: E731
        layers = network(settings.modulus, settings.width, seed)
        course = trained(task, layers, adamw, settings.epochs, perp=name == "⊥AdamW", shape=_same)
        courses.append(_followed(course, settings.epochs, progress, name, half))
    orthogonal, plain = courses
    claims = [
        _groks("⊥AdamW comes to know the sums that it was not shown", orthogonal, 0.99),
        _memorises("AdamW knows those that it was shown, and no others", plain, "paper"),
        Claim(
            "the gradients that AdamW sees come to lie along the weights",
            "a larger part of them at the end than at the start",
            f"{_percent(plain.along[-1])} against {_percent(plain.along[0])}",
            plain.along[-1] > plain.along[0],
        ),
        Claim(
            "without that part logits grow less",
            "the largest logit of ⊥AdamW is below AdamW's",
            f"{orthogonal.largest[-1]:.0f} against {plain.largest[-1]:.0f}",
            orthogonal.largest[-1] < plain.largest[-1],
            "ours",
        ),
    ]
    return Findings(
        claims, _panels(dict(zip(names, courses, strict=True)), "along", "gradient along the weights", "share")
    )


def stablemax(settings: StableMaxSettings, seed: int, progress: Progress) -> Findings:
    """SGD on orthogonal gradients, with StableMax and with softmax."""
    task = all_sums(settings.modulus, settings.train_share, seed)
    courses, shapes = [], {"StableMax": symlog, "softmax": _same}
    for half, (name, shape) in enumerate(shapes.items()):
        sgd = lambda layers: torch.optim.SGD(layers, settings.learning_rate, settings.momentum)  # noqa: E731
        layers = network(settings.modulus, settings.width, seed)
        course = trained(task, layers, sgd, settings.epochs, perp=True, shape=shape, enough=settings.enough)
        courses.append(_followed(course, settings.epochs, progress, name, half))
    stable, plain = courses
    apart = _apart(seed)
    margins = {name: _saturated(settings.modulus, shape) for name, shape in shapes.items()}
    claims = [
        _groks("StableMax with ⊥SGD comes to know the sums that it was not shown", stable, 0.9),
        _memorises("softmax in its place does not", plain, "ours", below=0.5),
        Claim(
            "the softmax of symlog is the paper's quotient",
            "probabilities differ by less than 1e-12 in double precision",
            f"by {apart:.0e}",
            apart < 1e-12,
            "derived",
        ),
        Claim(
            "softmax has a loss of exactly 0 once a logit is far enough above the others, StableMax has not",
            "in single precision, from a margin below 100 on; at no margin up to 1e6",
            f"from {margins['softmax']} on; {'none' if margins['StableMax'] is None else margins['StableMax']}",
            margins["softmax"] in MARGINS[:-1] and margins["StableMax"] is None,
            "derived",
        ),
    ]
    notes = [
        "The paper also trains with StableMax and plain AdamW, for 80,000 epochs and more: that takes hours here, "
        "and was not tried."
    ]
    return Findings(claims, _panels(dict(zip(shapes, courses, strict=True)), "largest", "largest logit", "size"), notes)


def _same(z: Tensor) -> Tensor:
    return z


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _groks(name: str, course: Course, least: float) -> Claim:
    held_out = course.held_out[-1]
    return Claim(
        name, f"over {_percent(least)} of the held-out sums at the end", _percent(held_out), held_out > least, "paper"
    )


def _memorises(name: str, course: Course, source: str, below: float = 0.05) -> Claim:
    known, held_out = course.known[-1], course.held_out[-1]
    return Claim(
        name,
        f"over 99 % of the shown ones, less than {_percent(below)} of the held-out ones",
        f"{_percent(known)} and {_percent(held_out)}",
        known > 0.99 and held_out < below,
        source,
    )


def _apart(seed: int) -> float:
    """Largest difference of probabilities between the softmax of symlog and s(z) over its sum."""
    z = 20 * torch.randn(100, 113, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    s = torch.where(z >= 0, z + 1, 1 / (1 - z))
    return float((symlog(z).softmax(1) - s / s.sum(1, keepdim=True)).abs().max())


def _saturated(modulus: int, shape: Shape) -> int | None:
    """The first of `MARGINS` at which the loss of the right answer is exactly 0, in single precision."""
    margins = torch.tensor(MARGINS, dtype=torch.float32)
    z = torch.zeros(len(margins), modulus)
    z[:, 0] = margins
    exact = (losses(shape(z), torch.zeros(len(margins), dtype=torch.long)) == 0).nonzero()[:, 0].tolist()
    return MARGINS[exact[0]] if exact else None


def _panels(courses: dict[str, Course], other: str, title: str, unit: str) -> list[Panel]:
    accuracy = []
    for name, course in courses.items():
        accuracy.append(Curve(f"{name}, held out", course.epochs, course.held_out))
        accuracy.append(Curve("", course.epochs, course.known, "dashed"))
    more = [Curve(name, course.epochs, getattr(course, other)) for name, course in courses.items()]
    return [Panel("accuracy (dashed: of sums shown)", "epoch", "share", accuracy), Panel(title, "epoch", unit, more)]
