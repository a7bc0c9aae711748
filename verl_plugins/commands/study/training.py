"""The runs of a study: those that are not finished are trained here, or handed to a scheduler."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from verl_plugins.errors import CompositionError, printable

FINISHED = "finished"
"""File that a run leaves in its folder when it came to its end."""
HANDED_OVER = "handed_over"
"""File with the command that a scheduler got."""
PLACEHOLDERS = ("{command}", "{name}", "{folder}")


@dataclass(frozen=True)
class Job:
    """One training."""

    variant: str
    seed: int
    folder: Path
    command: Sequence[str]

    @property
    def finished(self) -> bool:
        return (self.folder / FINISHED).is_file()


def job(arguments: Sequence[str], preset: str | None, folder: Path, variant: str, seed: int) -> Job:
    """`verl-plugins run` with a seed for the order of prompts and one for every sampled token."""
    recipe, *overrides = arguments
    words = [sys.executable, "-m", "verl_plugins", "run", recipe, *overrides]
    words += [f"data.seed={seed}", f"actor_rollout_ref.rollout.seed={seed}", "--out", str(folder.absolute())]
    return Job(variant, seed, folder, [*words, *(["--preset", preset] if preset else [])])


def train(jobs: Sequence[Job], parallel: int, steps: int | None, done: Callable[[Job], None]) -> list[tuple[Job, str]]:
    """Train the jobs, so many at a time, and call `done` after each; the failed ones with what they said."""
    failed: list[tuple[Job, str]] = []
    running: dict[Path, subprocess.Popen] = {}
    stop = threading.Event()

    def one(job: Job) -> str | None:
        return None if stop.is_set() else _run(job, running)

    signal.signal(signal.SIGTERM, _interrupt)
    with _bar(jobs, steps) as tell, ThreadPoolExecutor(parallel) as pool:
        waiting = {pool.submit(one, job): job for job in jobs}
        try:
            while waiting:
                ended, _ = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
                for future in ended:
                    job, said = waiting.pop(future), future.result()
                    failed += [(job, said)] if said else []
                    if not said:
                        done(job)
                    tell(f"{job.folder.name}: {printable(said) if said else 'trained'}")
                tell(None)
        except BaseException:
            stop.set()
            for process in [*running.values()]:
                process.terminate()
            raise
    return failed


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _run(job: Job, running: dict[Path, subprocess.Popen]) -> str | None:
    """None, or the sentence with which the run ended; all it printed is in its folder."""
    job.folder.mkdir(parents=True, exist_ok=True)
    log = job.folder / "terminal.log"
    with log.open("wb") as file:
        process = subprocess.Popen(job.command, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
        running[job.folder] = process
        code = process.wait()
        del running[job.folder]
    if code == 0:
        return None
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error: ")]
    return lines[-1].removeprefix("error: ") if lines else f"it ended with exit code {code}; see {log}"


@contextmanager
def _bar(jobs: Sequence[Job], steps: int | None) -> Iterator[Callable[[str | None], None]]:
    """A bar over all steps on a terminal, a line per run elsewhere."""
    console = Console(stderr=True)
    each = steps or 1
    columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f} steps")]
    columns += [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()]
    ended: list[str] = []
    begun = time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("training", total=len(jobs) * each)

        def tell(line: str | None) -> None:
            if line is not None:
                ended.append(line)
                left = (time.monotonic() - begun) / len(ended) * (len(jobs) - len(ended))
                text = f"{len(ended)}/{len(jobs)} {line}; about {left / 60:.0f} min left"
                progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
            elif console.is_terminal:
                progress.update(task, completed=sum(min(_steps_of(job.folder), each) for job in jobs))

        yield tell


def _steps_of(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b'"timing_s/step"') if file.is_file() else 0


def template(text: str) -> list[str]:
    """The words of `--command`.

    Raises:
        CompositionError: it does not say where the training command goes.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise CompositionError(f"--command {text}: it cannot be split into words ({error})") from error
    if not any("{command}" in word for word in words):
        raise CompositionError(
            f"--command {text}: write {{command}} where the training command goes, as in 'sbatch --wrap={{command}}'"
        )
    return words


def hand_over(jobs: Sequence[Job], words: Sequence[str]) -> tuple[list[Job], list[tuple[Job, str]]]:
    """Give each job to a scheduler, but for those that it has already; which were given, which it did not take."""
    given, failed = [], []
    for job in jobs:
        note = job.folder / HANDED_OVER
        if note.exists():
            continue
        job.folder.mkdir(parents=True, exist_ok=True)
        filled = [_fill(word, job) for word in words]
        try:
            done = subprocess.run(filled, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        except OSError as error:
            failed.append((job, f"{filled[0]} cannot be started: {error.strerror}"))
            continue
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
            failed.append((job, f"{filled[0]} ended with exit code {done.returncode}: {said[-1]}"))
            continue
        note.write_text(shlex.join(filled) + "\n" + done.stdout)
        given.append(job)
    return given, failed


def _fill(word: str, job: Job) -> str:
    values = (shlex.join(job.command), job.folder.name, str(job.folder.absolute()))
    for placeholder, value in zip(PLACEHOLDERS, values, strict=True):
        word = word.replace(placeholder, value)
    return word
