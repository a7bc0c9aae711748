"""Runs and the curves they make: which belong together, what a curve is called, its mean, spread and end.

Runs that differ only in seeds, folders and what no method can change (loggers, how often is validated or saved,
workers) are one curve. A curve is named after its plugins, and where that is not enough after the settings in which
it differs from its namesakes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from verl_plugins.composition.look.words import short
from verl_plugins.errors import RunError

INFRASTRUCTURE = ("math_verify",)
"""Plugins that score and are no method: they do not name a curve."""
MACHINERY = ("trainer", "ray_kwargs", "transfer_queue", "global_profiler")
"""Sections of the configuration that no method changes, and keys of theirs that one can."""
METHOD_KEYS = ("trainer.critic_warmup", "trainer.v1.")
NO_METHOD = {"checkpoint", "profiler", "nsys", "trace", "agent", "logger", "prometheus", "server", "load_format"}
NO_METHOD |= {"num_workers", "workers", "dataloader_num_workers", "filter_overlong_prompts_workers", "cache_size"}
NO_METHOD |= {"disable_log_stats", "gpu_memory_utilization", "log_prob_micro_batch_size_per_gpu", "val_batch_size"}
NO_METHOD |= {"memory_mb", "save_contents", "load_contents", "use_shm", "local_cache_path", "validation_shuffle"}
"""Parts of keys in the other sections that change what is stored, shown or how fast it goes."""
TOKENS = "rollout/tokens"
LAST = 5
"""Steps at the end of a run over which its table's values are means."""
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Student's t, 97.5th percentile, for 1 to 15 degrees of freedom."""


@dataclass(frozen=True)
class Run:
    """One finished or running training."""

    folder: Path
    label: str | None
    """What the user calls it."""
    settings: Mapping[str, Any]
    """Flat configuration without seeds and folders."""
    steps: pd.DataFrame
    """One row per step, metrics as columns, `validation` the held-out accuracy where there was one."""
    seeds: Mapping[str, Any] = field(default_factory=dict)
    """Settings that are seeds, without those of plugins."""

    @property
    def last_step(self) -> int:
        """The last step that was trained."""
        return int(self.steps.index.max())

    def end(self, metric: str) -> float:
        """Mean over the run's last steps; its last value where it was not measured in them; NaN before any training."""
        values = self.steps[metric].dropna() if metric in self.steps else pd.Series(dtype=float)
        values = pd.to_numeric(values, errors="coerce").dropna()
        values = values[values.index > 0]
        late = values[values.index > self.last_step - LAST]
        if metric == "validation" or late.empty:
            late = values.tail(1)
        return float(late.mean()) if len(late) else math.nan


def read_run(argument: str) -> Run:
    """A run folder, or `LABEL=FOLDER`.

    Raises:
        RunError: the folder has no metrics or no configuration, or not one step.
    """
    label, separator, name = argument.partition("=")
    if not separator or os.path.isdir(argument):  # a long label is no path, which Path says with an OSError
        label, name = "", argument
    folder = Path(name)
    for file in ("metrics.jsonl", "config.yaml"):
        if not (folder / file).is_file():
            raise RunError(f"{folder} has no {file}; give folders of runs, as `verl-plugins run … --out FOLDER` makes")
    steps = _steps(folder / "metrics.jsonl")
    if steps.empty:
        raise RunError(f"{folder / 'metrics.jsonl'} has no step yet; leave this run out or wait for its first step")
    flat = _config(folder / "config.yaml")
    seeds = {key: value for key, value in flat.items() if key.endswith("seed") and not key.startswith("plugins.")}
    return Run(folder, label or None, _settings(flat, folder), steps, seeds)


def _config(file: Path) -> dict[str, str]:
    """Keys with their values as JSON."""
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        if isinstance(tree, dict):
            return {key: json.dumps(value, default=str) for key, value in _flat(tree)}
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise RunError(f"{file} cannot be read ({short(error)}): leave this run out") from error
    raise RunError(f"{file} is not a configuration: leave this run out")


def _flat(tree: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        inner = isinstance(value, Mapping) and value
        found += _flat(value, f"{above}{key}.") if inner else [(f"{above}{key}", value)]
    return found


def _steps(file: Path) -> pd.DataFrame:
    table: dict[int, dict[str, float]] = {}
    text = file.read_text(encoding="utf-8", errors="replace")
    whole, _, _ = text.rpartition("\n")  # a running training may be writing its next line
    for number, line in enumerate(whole.split("\n") if whole else (), 1):
        record = _record(line, f"{file}, line {number}")
        row = table.setdefault(record["step"], {})
        if "validation" in record:
            accuracy = [value for key, value in record["validation"].items() if "/acc/mean@" in key]
            row |= record["validation"] | ({"validation": sum(accuracy) / len(accuracy)} if accuracy else {})
        else:
            row |= record
    return pd.DataFrame.from_dict(table, orient="index").sort_index()


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        if isinstance(record["step"], int) and isinstance(record.get("validation", {}), dict):
            return record
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise RunError(f"{where} is not a step's record, as a run writes it: take the line out, or leave this run out")


def _settings(flat: Mapping[str, str], folder: Path) -> dict[str, str]:
    own = (str(folder), str(folder.absolute()))
    return {key: value for key, value in flat.items() if _is_method(key) and not any(path in value for path in own)}


def _is_method(key: str) -> bool:
    """Whether a method, or the task it is tried on, can be changed by this setting."""
    parts = key.split(".")
    if parts[0] in MACHINERY and not key.startswith(METHOD_KEYS):
        return False
    return not (NO_METHOD & {*parts} or key.endswith(("seed", "_dir")))


def curves(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Name of each curve -> its runs, in the order given; a folder that is named twice counts once."""
    grouped: dict[Any, list[Run]] = {}
    for run in {(run.label, run.folder.absolute()): run for run in runs}.values():
        grouped.setdefault(run.label or tuple(sorted(run.settings.items())), []).append(run)
    firsts = [same[0] for same in grouped.values()]
    names = [run.label or _methods(run) for run in firsts]
    found: dict[str, list[Run]] = {}
    for name, run, same in zip(names, firsts, grouped.values(), strict=True):
        namesakes = [other for other, twin in zip(firsts, names, strict=True) if twin == name and not other.label]
        if len(namesakes) > 1 and run.label is None:
            name = ", ".join([name, *_differences(run, namesakes)])
        found[name if name not in found else f"{name} ({run.folder.name})"] = same
    return {printable(name): same for name, same in found.items()}


def printable(text: str) -> str:
    """A name without control characters, which neither a picture nor a terminal should get."""
    shown = "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)
    return shown or "unnamed"


def _methods(run: Run) -> str:
    plugins = dict.fromkeys(key.split(".")[1] for key in run.settings if key.startswith("plugins."))
    return "+".join(name for name in plugins if name not in INFRASTRUCTURE)


def _differences(run: Run, others: Sequence[Run]) -> list[str]:
    keys = dict.fromkeys(key for other in others for key in other.settings)
    differing = [key for key in keys if len({other.settings.get(key) for other in others}) > 1]
    return [f"{_short(key, differing)}={run.settings.get(key, 'unset').strip(chr(34))}" for key in differing]


def _short(key: str, among: Sequence[str]) -> str:
    """The shortest end of a dotted key that no other key has."""
    parts = key.split(".")
    for count in range(1, len(parts)):
        end = ".".join(parts[-count:])
        if sum(other == end or other.endswith(f".{end}") for other in among) == 1:
            return end
    return key


def tokens_so_far(run: Run) -> pd.Series:
    """Tokens the policy has generated for training up to each step; 0 before the first.

    Raises:
        RunError: the run has steps in which they were not counted.
    """
    steps = run.steps.reindex(columns=["step", TOKENS])
    if steps.loc[steps["step"].notna(), TOKENS].isna().any():
        raise RunError(
            f"--by tokens adds up {TOKENS}, which {run.folder} does not have in every step; leave it out or train it "
            "again with this version"
        )
    return steps[TOKENS].where(steps.index > 0, 0.0).cumsum()


def _values(run: Run, metric: str, by: str) -> pd.Series:
    """The metric where the run has it, over steps or tokens."""
    values = run.steps[metric].dropna()
    if by == "steps":
        return values
    values = values.set_axis(tokens_so_far(run)[values.index])
    return values[values.index.notna()]  # a running training may have validated a step that is not written yet


def statistics(runs: Sequence[Run], metric: str, by: str = "steps") -> pd.DataFrame:
    """Mean and standard deviation over the runs at each step where any has the metric: columns `mean`, `std`.

    Where fewer than two runs have it there is no spread: NaN.

    By `tokens`, at each number of tokens where any has it; a run is interpolated between its own places.
    """
    columns = [_values(run, metric, by) for run in runs if metric in run.steps]
    if not columns:
        return pd.DataFrame(columns=["mean", "std"], dtype=float)
    table = pd.concat(columns, axis=1).sort_index()
    if by == "tokens":
        table = table.interpolate(method="index", limit_area="inside")
    return pd.DataFrame({"mean": table.mean(axis=1), "std": table.std(axis=1)})


def ends(runs: Sequence[Run], metric: str) -> dict[tuple[Any, ...], float]:
    """Seeds of a run -> the metric at its end; runs of the same seeds are averaged, runs without it left out."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for run in runs:
        if not math.isnan(value := run.end(metric)):
            found.setdefault(tuple(sorted(run.seeds.items())), []).append(value)
    return {seeds: sum(values) / len(values) for seeds, values in found.items()}


def verdict(first: Sequence[Run], other: Sequence[Run], metric: str) -> str:
    """Whether the metric at the end of `other` differs from `first` by more than seeds do, in a few words.

    Paired by seed where at least two seeds are in both; else between the means of two groups (Welch).
    """
    if len(steps := {run.last_step for run in (*first, *other)}) > 1:
        return f"not comparable: the runs end after different steps ({', '.join(map(str, sorted(steps)))})"
    a, b = ends(first, metric), ends(other, metric)
    if not a or not b:
        return "not measured in both"
    shared = [seeds for seeds in a if seeds in b]
    if len(shared) > 1:
        differences = pd.Series([b[seeds] - a[seeds] for seeds in shared])
        free, error = len(shared) - 1, differences.std() / math.sqrt(len(shared))
        return _judged(differences.mean(), error, free, f"{len(shared)} pairs of equal seeds")
    mean = sum(b.values()) / len(b) - sum(a.values()) / len(a)
    if min(len(a), len(b)) < 2:
        return f"{mean:+.3f}, one seed cannot tell: train both with at least two more seeds"
    left, right = (pd.Series(list(values.values())).var() / len(values) for values in (a, b))
    share = left**2 / (len(a) - 1) + right**2 / (len(b) - 1)
    free = math.floor((left + right) ** 2 / share) if share else len(a) + len(b) - 2
    return _judged(mean, math.sqrt(left + right), free, f"{len(a)} and {len(b)} seeds, not paired")


def _judged(mean: float, error: float, free: int, of: str) -> str:
    t = t_975(free)
    low, high = mean - t * error, mean + t * error
    says = "more than seeds explain" if low > 0 or high < 0 else "within what seeds do"
    return f"{mean:+.3f}, 95 % interval {low:+.3f} to {high:+.3f} ({of}): {says}"


def t_975(free: int) -> float:
    """Student's t, 97.5th percentile; from 16 degrees of freedom to three digits."""
    return T_975[max(free, 1) - 1] if free <= len(T_975) else 1.96 + 2.6 / free
