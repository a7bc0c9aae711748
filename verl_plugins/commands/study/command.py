"""From a study to its page: look at every variant, train what is missing, measure, compare, write."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from verl_plugins.commands.study import report, results, training
from verl_plugins.commands.study.design import Study
from verl_plugins.commands.study.summary import Summary, summarise
from verl_plugins.composition.look.words import short
from verl_plugins.errors import CompositionError, PluginError, RunError, printable

if TYPE_CHECKING:
    from omegaconf import DictConfig

RUNS, TASK = "runs", "task"
"""Folders of a study: its trainings, and the model and data that it makes for them."""


def study(what: Study, out: Path, jobs: int = 1, command: str | None = None) -> int:
    """Train, compare, write `study.json`, `study.md`, `study.png` and `index.html` into `out`; returns the exit code.

    Raises:
        PluginError: a variant cannot be trained, or a file of the study is damaged: nothing was started.
    """
    words = training.template(command) if command else None
    known = results.read(out)
    try:
        (out / RUNS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--out {out} cannot be written ({error.strerror}): name another folder") from error
    made = _made(what, out.absolute() / TASK)
    what = _with_steps(what, made)
    every = _jobs(what, made, out)
    keep = partial(_keep, known, what, out)
    for job in every:
        if job.finished:
            keep(job)
    todo = [job for job in every if job.folder.name not in known]
    variants = {job.variant: job for job in todo}
    if variants:
        Console(stderr=True).print(f"looking at {len(variants)} variants before the first is trained", highlight=False)
    for one in variants.values():
        _look(one.variant, what.arguments(one.variant, made, one.folder), what.preset, one.folder)
    failed = _train(todo, words, jobs, what.steps, keep, len(every))
    names = {job.folder.name: job.variant for job in every}
    found = [replace(one, variant=names[run]) for run, one in known.items() if run in names]
    _write(summarise(what, found), [*known.values()], out)
    return int(failed)


def _made(what: Study, folder: Path) -> list[str]:
    """The overrides that use the model and data of the study's own task."""
    try:
        return [*what.prepare(folder)] if what.prepare else []
    except Exception as error:
        raise CompositionError(f"prepare={what.task} failed ({type(error).__name__}: {short(error)})") from error


def _jobs(what: Study, made: Sequence[str], out: Path) -> list[training.Job]:
    """All trainings of the study, seed by seed, so that an early end leaves pairs."""
    found = []
    for seed in what.seeds:
        for name in what.variants:
            folder = out / RUNS / what.name(name, seed)
            found.append(training.job(what.arguments(name, made, folder), what.preset, folder, name, seed))
    return found


def _keep(known: dict[str, results.Result], what: Study, out: Path, job: training.Job) -> None:
    """Measure a run that has ended, and write down what is known so far."""
    found = results.measure(job.folder, job.variant, job.seed, what.columns)
    known[found.run] = found
    results.write(out, [*known.values()], {})


def _train(
    todo: Sequence[training.Job],
    words: Sequence[str] | None,
    parallel: int,
    steps: int | None,
    keep: Callable[[training.Job], None],
    of: int,
) -> bool:
    """Train or hand over what is not there; whether any failed, which is said."""
    say = Console(stderr=True)
    failed: Sequence[tuple[training.Job, str]] = ()
    if words and todo:
        given, failed = training.hand_over(todo, words)
        _tell_handed(say, given, len(todo) - len(given) - len(failed))
    elif todo:
        say.print(f"{of - len(todo)} of {of} runs are there; training {len(todo)}", highlight=False)
        failed = training.train(todo, parallel, steps, keep)
    for job, said in failed:
        say.print(f"failed: {job.folder.name}: {printable(said)}", markup=False, highlight=False, soft_wrap=True)
    return bool(failed)


def _with_steps(what: Study, made: Sequence[str]) -> Study:
    """The study with its number of steps, which is the preset's where it says none."""
    from verl_plugins.composition.compose import compose

    if what.steps is not None:
        return what
    recipe, *overrides = what.arguments(what.baseline, made, Path())
    steps = compose(recipe, what.preset, overrides).config.trainer.total_training_steps
    if steps is None:
        raise CompositionError("how long is each run? say --steps N, or set trainer.total_training_steps for all")
    return replace(what, steps=int(steps))


def _look(variant: str, arguments: Sequence[str], preset: str | None, folder: Path) -> None:
    """All that `run` looks at before it starts."""
    from verl_plugins.composition.compose import compose
    from verl_plugins.composition.look import look
    from verl_plugins.composition.needs import check

    recipe, *overrides = arguments
    try:
        composed = compose(recipe, preset, overrides)
        _validates(composed.config)
        look(composed, check(composed), folder)
    except PluginError as error:
        raise CompositionError(f"the variant {variant!r}: {error}") from error


def _validates(config: DictConfig) -> None:
    """Refuse trainings without a held-out accuracy, which cannot be compared."""
    from omegaconf import OmegaConf

    files = OmegaConf.is_missing(config.data, "val_files") or config.data.val_files
    if not files or config.trainer.test_freq < 1:
        raise CompositionError(
            "a study compares the accuracy of held-out prompts: set data.val_files, and a positive trainer.test_freq"
        )


def _tell_handed(say: Console, given: Sequence[training.Job], before: int) -> None:
    said = f"{len(given)} runs were handed over"
    if before:
        said += f"; {before} were before, unfinished (to do one again, delete {training.HANDED_OVER} in its folder)"
    say.print(f"{said}; call this study again when they have ended", highlight=False, soft_wrap=True)


def _write(summary: Summary, known: Sequence[results.Result], out: Path) -> None:
    results.write(out, known, report.plain(summary))
    console = Console()
    if not summary.rows:
        console.print("no run has finished yet")
        return
    with contextlib.suppress(FileNotFoundError):
        (out / "index.html").unlink()
    svg = report.draw(summary, known, out / "study.png")
    (out / "study.md").write_text(report.markdown(summary), encoding="utf-8")
    (out / "index.html").write_text(report.page(summary, svg), encoding="utf-8")
    console.print(_shown(summary))
    console.print(
        f"Means over seeds with 95 % intervals; {report.compared_at(summary)}; differences are paired by seed."
    )
    if note := report.missing(summary):
        console.print(printable(note), markup=False, highlight=False)
    for file in ("index.html", "study.md", results.FILE):
        console.print(str(out / file), highlight=False, soft_wrap=True)


def _shown(summary: Summary) -> Table:
    """The first columns, as wide as a terminal is; the page has all."""
    heads, *rows = report.table(summary)
    shown = Table(title=printable(summary.study.title) or None)
    for heading in heads[:5]:
        shown.add_column(heading)
    for row in rows:
        shown.add_row(*[Text(printable(text)) for text in row[:5]])
    return shown
