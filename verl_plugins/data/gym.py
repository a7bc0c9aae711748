"""`verl-plugins data gym`: tasks of reasoning-gym become parquet in verl's schema, for the plugin `reasoning_gym`.

A row keeps its task and the library's whole entry (`extra_info.task`, `extra_info.entry`), since its scorer needs them.
Each task is a `data_source` of its own. Questions are different from each other, those held out from all others too.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_plugins.data.table import ParquetFile, Row
from verl_plugins.errors import DataError, nearest
from verl_plugins.reward.gym_entries import to_text

if TYPE_CHECKING:
    from rich.console import Console

SOURCE = "reasoning_gym/"
SUFFIX = "Put the final answer between <answer> and </answer>."
TRIES = 20
"""Entries looked at for each different question that is asked for."""


@dataclass(frozen=True)
class Options:
    """What the user chose; see `verl-plugins data gym --help`."""

    rows: int = 1000
    val_to: Path | None = None
    val_rows: int | None = None
    """Rows that are held out; an eighth of `rows` where it is None."""
    seed: int = 0
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Settings of each task, "" for those of all."""
    system: str | None = None
    suffix: str = SUFFIX


@dataclass(frozen=True)
class Written:
    """What was written for a task."""

    task: str
    train: int
    val: int
    longest_question: int
    """Characters."""
    example: str
    answer: str


def write(
    tasks: Mapping[str, float], to: Path, options: Options = Options(), console: Console | None = None
) -> list[Written]:
    """Write `to`, and `options.val_to` where it is given, with rows of `tasks` in shares of their weights.

    `console` None shows no progress.

    Raises:
        DataError: an unknown task or setting, one the task refuses, or fewer different questions than rows.
    """
    _check(tasks, to, options)
    val_rows = 0 if options.val_to is None else options.val_rows or max(1, options.rows // 8)
    train, val = _shares(tasks, options.rows), _shares(tasks, val_rows)
    written, rows, held_out = [], [], []
    for task in tasks:
        questions = _questions(task, train[task] + val[task], options, console)
        held_out += questions[: val[task]]
        rows += questions[val[task] :]
        written.append(_written(task, train[task], val[task], questions))
    with ExitStack() as stack:
        for path, content in ((to, rows), (options.val_to, held_out)):
            if path is not None:
                random.Random(options.seed).shuffle(content)
                file = stack.enter_context(ParquetFile(path, _kept_columns()))
                file.write(content)
                file.keep()
    return written


def parse_tasks(text: str) -> dict[str, float]:
    """`chain_sum,countdown=2` -> weight of each task.

    Raises:
        DataError: if a name comes twice or a weight is no positive number.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = (piece.strip() for piece in part.partition("="))
        try:
            value = float(weight or 1)
        except ValueError:
            value = math.nan
        if not name or not (0 < value < math.inf):
            raise DataError(f"task {part.strip()!r}: write NAME or NAME=WEIGHT, the weight a number above 0")
        if name in weights:
            raise DataError(f"task {name!r} is named twice; give it a weight, as in {name}=2")
        weights[name] = value
    return weights


def parse_settings(given: Sequence[str], tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`key=value` or `task.key=value`, values as in YAML -> settings of each task, "" for those of all.

    Raises:
        DataError: if one is not of that form, or names a task that is not asked for.
    """
    import yaml

    found: dict[str, dict[str, Any]] = {}
    for one in given:
        name, equals, value = one.partition("=")
        task, dot, key = name.strip().rpartition(".")
        if not equals or not key or (dot and task not in tasks):
            raise DataError(f"--set {one}: write key=value, or task.key=value with one of {', '.join(tasks)}")
        try:
            found.setdefault(task, {})[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise DataError(f"--set {one}: the value is not YAML ({str(error).splitlines()[0]})") from error
    return found


def _check(tasks: Mapping[str, float], to: Path, options: Options) -> None:
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise DataError("`data gym` needs the package reasoning-gym: pip install 'verl-plugins[gym]'") from error
    for task in tasks:
        if task not in DATASETS or task == "composite":
            raise DataError(f"reasoning-gym has no task {task!r}{nearest(task, DATASETS)}")
        known = {item.name for item in fields(DATASETS[task][1])} - {"size", "seed"}
        for key in (*options.settings.get("", {}), *options.settings.get(task, {})):
            if key not in known:
                raise DataError(f"--set {key}: the task {task} has no such setting, it has {', '.join(sorted(known))}")
    for flag, path in {"--to": to, **({"--val-to": options.val_to} if options.val_to else {})}.items():
        if path.suffix != ".parquet":
            raise DataError(f"{flag} {path}: the name must end in .parquet")
    if options.val_to and options.val_to.resolve() == to.resolve():
        raise DataError(f"--val-to {options.val_to} is the file of --to as well; give another name")
    if options.rows < len(tasks):
        raise DataError(f"--rows {options.rows} is less than a row for each of {len(tasks)} tasks")
    if options.val_rows is not None and (options.val_to is None or options.val_rows < 1):
        raise DataError(f"--val-rows {options.val_rows} must be 1 or more, and needs --val-to")


def _shares(tasks: Mapping[str, float], rows: int) -> dict[str, int]:
    """Rows of each task: by weight, the largest remainders rounded up."""
    total = sum(tasks.values())
    exact = {task: rows * weight / total for task, weight in tasks.items()}
    share = {task: math.floor(value) for task, value in exact.items()}
    for task in sorted(tasks, key=lambda task: share[task] - exact[task])[: rows - sum(share.values())]:
        share[task] += 1
    return share


def _questions(task: str, count: int, options: Options, console: Console | None) -> list[Row]:
    """`count` different questions."""
    rows: dict[str, Row] = {}
    with _progress(console, task, count) as advance:
        for entry in itertools.islice(_entries(task, count * TRIES, options), count * TRIES):
            row = _row(task, entry, options)
            if rows.setdefault(row.prompt_id, row) is row:
                advance()
            if len(rows) == count:
                return list(rows.values())
    raise DataError(
        f"task {task} gave {len(rows)} different questions in {count * TRIES} tries, and {count} are asked for: ask "
        "for fewer, or make its range larger with --set"
    )


def _entries(task: str, size: int, options: Options) -> Iterator[dict[str, Any]]:
    from reasoning_gym.factory import create_dataset

    settings = {**options.settings.get("", {}), **options.settings.get(task, {})}
    try:
        dataset = create_dataset(task, size=size, seed=options.seed, **settings)
        for place in range(size):
            yield dataset[place]
    except (AssertionError, ValueError, TypeError) as error:
        said = f"{type(error).__name__}: {error}".rstrip(". ")
        raise DataError(f"task {task} refuses its settings {settings or 'by default'} ({said})") from error


def _row(task: str, entry: dict[str, Any], options: Options) -> Row:
    question = entry["question"] + (f"\n{options.suffix}" if options.suffix else "")
    system = [("system", options.system)] if options.system else []
    answer = entry.get("answer")
    return Row(
        messages=[*system, ("user", question)],
        answer="" if answer is None else str(answer),  # of some tasks only the scorer knows what is right
        solution=None,
        prompt_id=hashlib.sha256(f"{task}\n{entry['question']}".encode()).hexdigest()[:16],
        data_source=SOURCE + task,
        ability=task,
        kept=[task, to_text(entry)],
    )


def _kept_columns() -> list[tuple[str, Any]]:
    import pyarrow as pa

    return [("task", pa.string()), ("entry", pa.string())]


def _written(task: str, train: int, val: int, rows: Sequence[Row]) -> Written:
    longest = max(len(row.messages[-1][1]) for row in rows)
    return Written(task, train, val, longest, rows[0].messages[-1][1], rows[0].answer)


@contextmanager
def _progress(console: Console | None, task: str, count: int) -> Iterator[Callable[[], None]]:
    """A bar that each new question moves; on a terminal only."""
    if console is None or not console.is_terminal:
        yield lambda: None
        return
    from rich.progress import Progress

    with Progress(console=console, transient=True) as progress:
        number = progress.add_task(task, total=count)
        yield lambda: progress.advance(number)
