"""Runs that something happens to; everything here is marked `faults` and run by `make test-faults`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))  # how a training is started and looked at
from running import Running  # noqa: E402

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.faults)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts runs, and ends them after the test."""
    started: list[Running] = []

    def begin(*overrides: str, out: Path = tmp_path / "run", **options: object) -> Running:
        started.append(Running(out, *overrides, **options))
        return started[-1]

    yield begin
    for run in started:
        run.end()
