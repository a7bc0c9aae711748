"""A run whose agent-loop worker is killed says so and ends; it is resumed as if nothing had happened. Recipe vade."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import TOLD_SECONDS, Running, listening
from training import COMMAND, SHORT, Training, train

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def run(out: Path) -> Iterator[Running]:
    """A run that is going on after its first checkpoint."""
    running = Running(out / "dies").until(1)
    yield running
    running.end()


@pytest.fixture(scope="module")
def resumed(run: Running) -> Training:
    """The killed run, two steps later."""
    steps = max(run.steps) + 2
    return train("vade", run.out, *SHORT, f"trainer.total_training_steps={steps}", "trainer.save_freq=1")


def test_on_one_machine_it_listens_on_loopback_only(run: Running) -> None:
    assert "127.0.0.1" in listening(run) <= {"127.0.0.1", "::1"}


def test_a_second_run_in_its_folder_is_refused(run: Running) -> None:
    words = [COMMAND, "run", "vade", "--preset", "cpu", "--out", run.out]
    second = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert second.returncode == 2 and f"pid {run.process.pid}" in second.stderr


def test_a_killed_worker_is_named_and_nothing_is_left(run: Running) -> None:
    victim = run.find("ray::PluginAgentLoopWorker")
    victim.kill()
    started = time.monotonic()
    assert run.ended() == 1 and time.monotonic() - started < TOLD_SECONDS
    errors = [line for line in run.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"the agent-loop worker (pid {victim.pid}) died" in errors[0]
    assert "go on with: verl-plugins run vade" in run.output and "Training Progress" not in run.output


def test_it_goes_on_and_every_step_counts_once(resumed: Training) -> None:
    numbers = [step["step"] for step in resumed.steps]
    assert numbers == list(range(1, numbers[-1] + 1))
    assert f"resuming after step {numbers[-1] - 2}" in resumed.output
