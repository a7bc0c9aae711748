"""Recipe vade, mode sync; a run that was killed goes on as if it had not been."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import psutil
import pytest
from resuming import Resuming
from training import PROMPTS, ROWS_OF_DATASET, TIMEOUT, Training, command, four_steps, healthy, ours, train

pytestmark = pytest.mark.e2e

MARKER = "latest_checkpointed_iteration.txt"
ORPHAN_SECONDS = 20


def kill_after_checkpoint(folder: Path) -> list[psutil.Process]:
    """Start the four steps, `kill -9` the command when its first checkpoint is complete; all processes of the run."""
    with subprocess.Popen(command("vade", folder, *four_steps(folder)), stdout=subprocess.DEVNULL) as run:
        deadline = time.monotonic() + TIMEOUT
        while not (folder / MARKER).exists():
            assert run.poll() is None and time.monotonic() < deadline, "the run ended before its first checkpoint"
            time.sleep(0.02)
        family = psutil.Process(run.pid).children(recursive=True)
        run.kill()
    return family


@pytest.fixture(scope="module")
def vade(out: Path) -> Training:
    """Recipe vade, mode sync: four steps, checkpoints after the second and the fourth."""
    folder = out / "vade"
    return train("vade", folder, *four_steps(folder))


@pytest.fixture(scope="module")
def killed(out: Path) -> list[psutil.Process]:
    """A killed run in folder `resumed`, and a half-written checkpoint beside the complete one."""
    family = kill_after_checkpoint(out / "resumed")
    (out / "resumed" / "global_step_4" / ".plugins.123").mkdir(parents=True, exist_ok=True)
    return family


@pytest.fixture(scope="module")
def pair(vade: Training, killed: list[psutil.Process], out: Path) -> tuple[Training, Training]:
    """Recipe vade: four steps, and two, a kill and two more."""
    _, alive = psutil.wait_procs(killed, timeout=ORPHAN_SECONDS)
    assert not alive
    return vade, train("vade", out / "resumed", *four_steps(out / "resumed"))


def test_a_kill_leaves_no_process(killed: list[psutil.Process]) -> None:
    assert len(killed) > 5
    _, alive = psutil.wait_procs(killed, timeout=ORPHAN_SECONDS)
    assert [process.name() for process in alive] == []


class TestKilled(Resuming):
    """The two steps before are those up to the kill."""


class TestVade:
    """Recipe vade, mode sync: prompts are chosen by a belief that the rollouts of every step update."""

    def test_trains(self, vade: Training) -> None:
        healthy(vade, 4)
        for number, step in enumerate(vade.steps, 1):
            found = ours(step, "vade")
            assert found["effective_ratio"] == pytest.approx(step["health/mixed_groups"])
            assert found["solve_none"] == pytest.approx(step["health/all_wrong_groups"])
            assert PROMPTS / ROWS_OF_DATASET <= found["seen_fraction"] <= number * PROMPTS / ROWS_OF_DATASET
            assert 0 < found["theta_selected_mean"] < 1

    def test_the_plugin_chooses_the_prompts(self, vade: Training) -> None:
        draws = vade.draws()
        assert [sum(trained == step for _, _, trained in draws) for step in (1, 2, 3, 4)] == [PROMPTS] * 4
        assert all(drawn == trained for _, drawn, trained in draws)
        assert len({prompt_id for prompt_id, _, _ in draws}) > 2 * PROMPTS
