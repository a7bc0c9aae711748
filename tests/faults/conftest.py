"""Runs that something happens to; everything here is marked `faults` and run by `make test-faults`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from verl_plugins.composition import scratch

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))  # how a training is started and looked at
from running import Running  # noqa: E402

HERE = Path(__file__).parent
Start = Callable[..., Running]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.faults)


@pytest.fixture(scope="module")
def begin() -> Iterator[Start]:
    """Starts runs, and ends them after the last test of the file."""
    started: list[Running] = []

    def one(out: Path, *overrides: str, **options: object) -> Running:
        started.append(Running(out, *overrides, **options))
        return started[-1]

    yield one
    for run in started:
        run.end()
    scratch.clean()


@pytest.fixture
def start(begin: Start, tmp_path: Path) -> Iterator[Start]:
    """Starts runs in a folder of the test's own, and ends them after it."""
    started: list[Running] = []

    def one(*overrides: str, out: Path = tmp_path / "run", **options: object) -> Running:
        started.append(begin(out, *overrides, **options))
        return started[-1]

    yield one
    for run in started:
        run.end()
