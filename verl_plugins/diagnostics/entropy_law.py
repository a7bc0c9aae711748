"""The entropy law: left alone, the validation score is a function of the policy's entropy, and so has a ceiling.

arXiv:2505.22617 (the paper of Clip-Cov and KL-Cov), fitted while training, which it does not touch:

    R = -a exp(H) + b,   a > 0          least squares on exp(H)
    ceiling = b - a                     the score when the entropy is used up (H = 0)

R is a validation score, H the entropy of the policy that was validated: the mean over responses of the mean over their
tokens. That policy writes the next step's batch, so R is paired with the entropy of that batch: the validation before
training with that of step 1, the one after step k with that of step k + 1. The last one has no such batch.

The authors published no fitting code: least squares is inferred. Degenerate cases. Entropies that are all alike: no
fit. a <= 0, usual in the first steps and under entropy intervention: the law does not apply, and there is no ceiling.
Scores that are all alike: a is 0 and r2 undefined. A ceiling above 1 is an artefact of extrapolation.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from torch import Tensor

from verl_plugins import Batch, CompositionError, DataError, Plugin, Run, hookimpl, setting

NARROW = 1e-6
"""Entropies within a range smaller than this, in nats, give no fit."""
ROUNDING = 1e-12
"""Scores that differ by less, in relation to their size, are all alike: a mean's last digit is no law."""
PICTURE = "entropy_law.png"


@dataclass(frozen=True)
class Law:
    """R = -a exp(H) + b, fitted to n points."""

    a: float
    b: float
    rmse: float
    r2: float | None
    """Share of the scores' variance that is explained; None where they do not vary."""
    n: int

    @property
    def ceiling(self) -> float | None:
        """The score at H = 0; None where the law does not apply, because the score does not rise as entropy falls."""
        return self.b - self.a if self.a > 0 else None

    def predicted(self, entropy: float | np.ndarray) -> Any:
        """The score at an entropy, in nats."""
        return self.b - self.a * np.exp(entropy)


def fit(entropy: Sequence[float], score: Sequence[float]) -> Law | None:
    """Least squares of finite scores on exp(entropy); None for less than 2 points or entropies that are all alike."""
    if len(entropy) < 2 or np.ptp(entropy) < NARROW:
        return None
    x, y = np.exp(np.asarray(entropy, dtype=np.float64)), np.asarray(score, dtype=np.float64)
    if np.ptp(y) <= ROUNDING * np.abs(y).max():
        return Law(0.0, float(y[0]), 0.0, None, len(y))
    from_mean = x - x.mean()
    a = -float(from_mean @ (y - y.mean())) / float(from_mean @ from_mean)
    b = float(y.mean() + a * x.mean())
    unexplained, variance = float(np.mean((y - b + a * x) ** 2)), float(np.var(y))
    return Law(a, b, math.sqrt(unexplained), 1 - unexplained / variance if variance > 0 else None, len(y))


def response_entropy(entropy: Tensor, mask: Tensor) -> float:
    """Mean over responses of the mean over their tokens; [rows,T] both, responses without tokens left out."""
    count = mask.sum(1)
    means = (entropy.double() * mask).sum(1) / count.clamp(min=1)
    return float(means[count > 0].mean())


class EntropyLaw(Plugin):
    """Fits the law to the validations so far, logs its ceiling and prediction, and draws it at the end."""

    name = "entropy_law"
    paper = "arXiv:2505.22617"
    needs = frozenset({"entropy"})

    @dataclass
    class Config:
        performance: str | None = setting(None, "the score's metric; none: the only one called val-core/…/mean@…")
        fit_points: int | None = setting(None, "fit the first so many points only; none: all", ge=2)
        min_points: int = setting(5, "no fit before so many points", ge=2)
        warn_headroom: float = setting(0.01, "say once that the ceiling is this near; 0: never", ge=0)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._entropy: list[float] = []
        self._score: list[float] = []
        self._waiting: float | None = None
        self._warned = False

    def check(self, config: DictConfig) -> None:
        every, last = config.trainer.test_freq, config.trainer.total_training_steps
        if every <= 0 or (last and every >= last):
            raise CompositionError(
                f"plugins.entropy_law fits validation scores, and trainer.test_freq={every} gives none during the "
                f"training (trainer.total_training_steps={last}): set it to a few steps"
            )
        if self.config.fit_points is not None and self.config.fit_points < self.config.min_points:
            raise CompositionError(
                f"plugins.entropy_law.fit_points={self.config.fit_points} is less than "
                f"min_points={self.config.min_points}: there would never be a fit, set a smaller min_points"
            )

    @hookimpl
    def on_validation_end(self, metrics: Mapping[str, float]) -> None:
        key = self.config.performance or _only_score(metrics)
        if key not in metrics:
            raise DataError(
                f"plugins.entropy_law.performance={key} is not a metric of the validation, which has "
                f"{', '.join(sorted(metrics))}"
            )
        self._waiting = float(metrics[key])

    @hookimpl
    def observe(self, run: Run, batch: Batch) -> None:
        entropy = response_entropy(batch.entropy, batch.response_mask)
        if self._waiting is not None and math.isfinite(self._waiting) and math.isfinite(entropy):
            self._entropy.append(entropy)
            self._score.append(self._waiting)
        self._waiting = None
        run.log({"entropy": entropy, "n": len(self._score)})
        if law := self.law():
            self._log(run, law, entropy)

    def law(self) -> Law | None:
        """The fit to the points so far."""
        if len(self._score) < self.config.min_points:
            return None
        first = slice(self.config.fit_points)
        return fit(self._entropy[first], self._score[first])

    def _log(self, run: Run, law: Law, entropy: float) -> None:
        run.log({"a": law.a, "b": law.b, "rmse": law.rmse, "predicted": law.predicted(entropy)})
        run.log({"residual": self._score[-1] - law.predicted(self._entropy[-1])})
        if law.r2 is not None:
            run.log({"r2": law.r2})
        if law.ceiling is None:
            return
        headroom = law.ceiling - self._score[-1]
        run.log({"ceiling": law.ceiling, "headroom": headroom})
        if max(headroom, 0) < self.config.warn_headroom and not self._warned:
            self._warned = True
            logging.getLogger(__name__).warning(
                f"the entropy law leaves a headroom of {headroom:.4f}: as long as entropy only falls, the validation "
                "score will hardly rise further"
            )

    @hookimpl
    def on_train_end(self, run: Run) -> None:
        if law := self.law():
            draw(law, self._entropy, self._score, Path(run.config.trainer.default_local_dir) / PICTURE)

    def state_dict(self) -> dict[str, Any]:
        return {
            "entropy": np.array(self._entropy, dtype=np.float64),
            "score": np.array(self._score, dtype=np.float64),
            "waiting": self._waiting,
            "warned": self._warned,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._entropy, self._score = state["entropy"].tolist(), state["score"].tolist()
        self._waiting, self._warned = state["waiting"], state["warned"]


def _only_score(metrics: Mapping[str, float]) -> str:
    found = sorted(key for key in metrics if key.startswith("val-core/") and "/mean@" in key)
    if len(found) != 1:
        raise DataError(
            f"the validation has {len(found)} metrics called val-core/…/mean@… ({', '.join(found) or 'none'}): name "
            "one with plugins.entropy_law.performance"
        )
    return found[0]


def draw(law: Law, entropy: Sequence[float], score: Sequence[float], path: Path) -> None:
    """The points, in the order of training from light to dark, the law, and its ceiling, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.scatter(entropy, score, c=range(len(score)), cmap="Blues", vmin=-len(score) / 2, edgecolors="none")
    line = np.linspace(0, max(entropy), 100)
    axes.plot(line, law.predicted(line), color="tab:orange", label=f"{law.b:.3f} − {law.a:.3f} exp(H), {law.n} points")
    if law.ceiling is not None:
        axes.axhline(law.ceiling, linestyle=":", color="gray", label=f"ceiling {law.ceiling:.3f}")
    axes.set(xlabel="entropy H (nats, mean over responses)", ylabel="validation score")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
