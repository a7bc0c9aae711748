"""What the stages of an episode did, watched while they did it, and how two records differ."""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from verl_plugins.batch import Batch
from verl_plugins.composition.blame import whose
from verl_plugins.composition.manager import Plugins
from verl_plugins.errors import ResultError


@dataclass(frozen=True)
class Fault:
    """A law that does not hold for a plugin."""

    law: str
    stage: str
    """Empty where the law is about the plugin as a whole."""
    text: str
    error: BaseException | None = field(default=None, compare=False)
    """What was raised, if that is what is wrong."""

    @property
    def name(self) -> str:
        """As `except_for` calls it: `row_order.select_rows`."""
        return f"{self.law}.{self.stage}" if self.stage else self.law


class StageFailed(Exception):
    """A stage raised, or gave what training cannot go on with (the law is then `result`)."""

    def __init__(self, stage: str, text: str, error: Exception | None = None) -> None:
        super().__init__(text)
        self.stage, self.error = stage, error
        self.law = "result" if isinstance(error, ResultError) else "runs"


class Recorder:
    """Faults of single calls, and what each stage gave: plain values, and values by row key.

    Args:
        watch: also look for uses of global generators and for inputs changed in place.
    """

    def __init__(self, *, watch: bool) -> None:
        self._watch = watch
        self.faults: list[Fault] = []
        self.values: dict[tuple[int, str, str], Any] = {}
        """(step, stage, what) -> plain data, or {row key: array}."""
        self.metrics: dict[tuple[int, str, str], dict[str, Any]] = {}

    def call(self, plugins: Plugins, stage: str, inputs: Mapping[str, Any], **arguments: Any) -> Any:
        """Call the stage, asynchronous or not; an error becomes StageFailed."""
        inputs = inputs if self._watch else {}
        kept, generators = copy.deepcopy(dict(inputs)), generator_states() if self._watch else {}
        try:
            result = getattr(plugins.hook, stage)(**arguments)
            if asyncio.iscoroutine(result):
                result = asyncio.run(result)
        except StageFailed:
            raise
        except Exception as error:
            place = (whose(error) or "").rpartition(", ")[2]
            text = str(error) if isinstance(error, ResultError) else f"raises {type(error).__name__}: {error}"
            raise StageFailed(stage, " ".join(f"{text} ({place})".split()), error) from error
        now = generator_states() if self._watch else {}
        for name, state in generators.items():
            if state != now[name]:
                self.fault("global_rng", stage, f"uses the global generator of {name}, not run.rng or tokens.rng")
        for name, value in inputs.items():
            if not same(value, kept[name]):
                self.fault("in_place", stage, f"changes {name} in place; make a new tensor")
        return result

    def fault(self, law: str, stage: str, text: str) -> None:
        self.faults.append(Fault(law, stage, text))

    def note(self, step: int, stage: str, what: str, value: Any) -> None:
        """Record plain data."""
        self.values[step, stage, what] = value

    def note_rows(self, step: int, stage: str, what: str, keys: Sequence[str], values: Tensor) -> None:
        """Record values [B] or [B,T] of the real rows."""
        rows = values.detach().double().numpy()
        found = {key: np.asarray(row) for key, row in zip(keys, rows, strict=True) if not key.startswith("pad")}
        self.values.setdefault((step, stage, what), {}).update(found)

    def note_metrics(self, step: int, stage: str, metrics: Mapping[str, Any], what: str = "") -> None:
        """Record what was logged, `what` saying where; it must be finite numbers."""
        for key, value in metrics.items():
            try:
                sound = isinstance(key, str) and np.isfinite(float(value))
            except (TypeError, ValueError):
                sound = False
            if not sound:
                self.fault("metrics", stage, f"logs {key!r} as {value!r}; a metric is a finite number")
        self.metrics[step, stage, f"metrics of {what}:" if what else "metric"] = dict(metrics)


def differences(
    one: Recorder, other: Recorder, *, exact: bool = False, stages: Sequence[str] = (), since: int = 0
) -> dict[str, str]:
    """Stage -> its first difference, in the words "… is b, not a"; `exact` also compares metrics.

    Args:
        stages: only these; empty means all.
        since: only steps from this one on.
    """
    found: dict[str, str] = {}
    records = [(one.values, other.values), *([(one.metrics, other.metrics)] if exact else [])]
    for ours, theirs in records:
        for key in sorted({*ours, *theirs}):
            step, stage, what = key
            if stage in found or (stages and stage not in stages) or 0 < step < since:
                continue
            if not step and (key not in ours or key not in theirs):
                continue  # not of a step: an answer that only one of the two was asked to score
            if (text := _difference(ours.get(key, {}), theirs.get(key, {}), what, exact)) is not None:
                found[stage] = f"in step {step}, {text}" if step else text
    return found


def _difference(one: Any, other: Any, what: str, exact: bool) -> str | None:
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return None if same(one, other, exact) else f"{what} is {_short(other)}, not {_short(one)}"
    for key in [*one, *(key for key in other if key not in one)]:
        if key not in one or key not in other:
            return f"{what} {key} is {'missing' if key not in other else 'there'}"
        if not same(one[key], other[key], exact):
            return f"{what} {key} is {_where(one[key], other[key], exact)}"
    return None


def _where(one: Any, other: Any, exact: bool) -> str:
    if not isinstance(one, np.ndarray) or np.shape(one) != np.shape(other) or one.ndim > 1:
        return f"{_short(other)}, not {_short(one)}"
    if one.ndim == 0:
        return f"{other:.6g}, not {one:.6g}"
    token = next(i for i in range(len(one)) if not same(one[i], other[i], exact))
    return f"{other[token]:.6g} at token {token}, not {one[token]:.6g}"


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 120 else f"{text[:117]}…"


def same(one: Any, other: Any, exact: bool = True) -> bool:
    """Equality through containers, tensors and arrays, NaN equal to NaN; inexact: up to the rounding of float32."""
    if isinstance(one, (Tensor, np.ndarray)) or isinstance(other, (Tensor, np.ndarray)):
        return type(one) is type(other) and one.dtype == other.dtype and _same_values(one, other, exact)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key], exact) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(same(a, b, exact) for a, b in zip(one, other, strict=True))
    if isinstance(one, (float, np.floating)) and isinstance(other, (float, np.floating)):
        return _same_values(np.asarray(one), np.asarray(other), exact)
    return type(one) is type(other) and one == other


def _same_values(one: Any, other: Any, exact: bool) -> bool:
    if one.shape != other.shape:
        return False
    if isinstance(one, np.ndarray) and one.dtype == object:
        return same(one.tolist(), other.tolist(), exact)
    arrays = [value.detach().double().numpy() if isinstance(value, Tensor) else value for value in (one, other)]
    if exact or arrays[0].dtype.kind != "f":
        return np.array_equal(*arrays, equal_nan=arrays[0].dtype.kind == "f")
    return np.allclose(*arrays, rtol=1e-4, atol=1e-5, equal_nan=True)


def batch_inputs(batch: Batch) -> dict[str, Any]:
    """What a hook may read of a batch and must leave as it is, by name, the objects themselves."""
    batch.response_mask, batch.correct, batch.scores  # noqa: B018  computed when first read
    found = {}
    for part in (batch._source.fields, batch._fields, vars(batch)):
        data = {name: value for name, value in part.items() if isinstance(value, (Tensor, np.ndarray, list))}
        found |= {f"batch.{_SHOWN.get(name, name)}": value for name, value in data.items()}
    return found


_SHOWN = {"_row_sums": "scores", "rm_scores": "rewards", "raw_scores": "correct"}


def generator_states() -> dict[str, Any]:
    """States of the global generators, comparable."""
    name, keys, *rest = np.random.get_state()
    return {"torch": torch.get_rng_state().tolist(), "numpy": (name, keys.tolist(), *rest), "random": random.getstate()}


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """The global generators seeded, and left as they were found."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.random.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
