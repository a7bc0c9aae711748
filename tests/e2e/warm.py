"""Runs the command in a fork of a process that has imported what every run imports first, to save a fifth of a run.

Runs that are killed or signalled are started as a user starts them (`running.Running`), and so are those of the tests
of faults. Nothing of this project is imported before the fork, and nothing that reads a run's variables: not Ray.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from functools import cache
from importlib import import_module
from multiprocessing.context import ForkServerContext
from pathlib import Path

IMPORTED = ("torch", "transformers.models.auto.modeling_auto", "datasets", "pandas", "hydra", "rich.console", "typer")
TESTS = Path(__file__).parents[1]


@cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    return context


def run(words: list[str], environment: dict[str, str], terminal: Path, timeout: float) -> int:
    """The exit code of `verl-plugins WORDS`; what it would show is written to `terminal`.

    Raises:
        TimeoutError: it was still running after `timeout` seconds, and was killed.
    """
    process = _server().Process(target=_become, args=(words, environment, Path.cwd(), terminal))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"{words} after {timeout} s:\n{terminal.read_text()}")
    return process.exitcode


def _become(words: list[str], environment: dict[str, str], folder: Path, terminal: Path) -> None:
    """In the fork: what an interpreter started with this environment would have."""
    assert "ray" not in sys.modules and "verl_plugins" not in sys.modules
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    without = [place for place in sys.path if not Path(place).is_relative_to(TESTS)]
    sys.path[:] = [*filter(None, environment["PYTHONPATH"].split(os.pathsep)), *without]
    with terminal.open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    sys.argv = ["verl-plugins", *words]
    import_module("verl_plugins.commands.cli").main()
