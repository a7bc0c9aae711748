"""Processes of a run that die or are stopped, and signals to the command itself.

Runs that end here go on with what the one before has saved, all in one folder: so each of these ends is resumed from.
(The agent-loop worker dies in tests/e2e/test_a_process_dies.py.)
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable

import pytest
from running import Running, listening
from training import COMMAND

from verl_plugins.bridge.intact import latest_step
from verl_plugins.composition import scratch

Start = Callable[..., Running]
STOP_SECONDS = int(os.environ.get("FAULTS_STOP_SECONDS", "60"))
SAVED_SECONDS = 180
"""For a step, its checkpoint and the end in order, on a busy machine."""
WORKERS = {
    "ray::SimpleStorageUnit": "queue's storage",
    "ray::TransferQueueController": "queue's controller",
    "ray::TransformersServer": "rollout server",
    "ray::WorkerDict": "actor worker",
    "ray::RewardLoopWorker": "reward worker",
    "ray::GlobalRequestLoadBalancer": "load balancer",
}
NODE = {
    "raylet": "Ray's raylet",
    "gcs_server": "Ray's gcs_server",
    "ray.scripts.scripts": "Ray's head process",
    "verl-plugins": "the server that starts workers",
}
FIRST = "ray::TransferQueueController"
"""The first worker that a run starts."""


def errors(run: Running) -> list[str]:
    return [line for line in run.output.splitlines() if line.startswith("error: ")]


def each_step_once(run: Running) -> bool:
    return run.steps == list(range(1, len(run.steps) + 1))


def left_by(run: Running) -> list[str]:
    """Its temporary folders."""
    owners = [(folder, json.loads((folder / scratch.OWNER).read_text())["pid"]) for folder in scratch.leftovers()]
    return [folder.name for folder, pid in owners if pid == run.process.pid]


@pytest.fixture(scope="module")
def chain(begin: Start, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Starts the next run in the one folder; each has a terminal of its own."""
    folder = tmp_path_factory.mktemp("chain")

    def following() -> Running:
        terminal = folder / "run.terminal"
        terminal.unlink(missing_ok=True)
        return begin(folder / "run", f"trainer.rollout_data_dir={folder / 'rollouts'}")

    return following


def next_step(run: Running) -> Running:
    return run.until(latest_step(run.out) + 1)


@pytest.mark.parametrize("name", WORKERS)
def test_a_killed_worker_is_named_and_nothing_is_left(chain, name) -> None:
    run = next_step(chain())
    victim = run.find(name)
    victim.kill()
    assert run.ended() == 1
    assert len(errors(run)) == 1 and f"{WORKERS[name]}" in errors(run)[0] and f"pid {victim.pid}" in errors(run)[0]
    assert "go on with: verl-plugins run vade" in run.output
    assert each_step_once(run) and left_by(run) == []


@pytest.mark.parametrize("name", NODE)
def test_a_part_of_the_node_that_dies_while_the_run_starts(chain, name) -> None:
    run = chain().until_there_is(FIRST)
    victim = run.find(name)
    victim.kill()
    assert run.ended() == 1
    assert len(errors(run)) == 1 and f"{NODE[name]} (pid {victim.pid}) died" in errors(run)[0]
    assert left_by(run) == []


@pytest.mark.parametrize(
    ("numbers", "code"),
    [([signal.SIGINT], 130), ([signal.SIGINT] * 2, 130), ([signal.SIGTERM], 143), ([signal.SIGHUP], 129)],
)
def test_signals(chain, numbers, code) -> None:
    run = next_step(chain())
    for number in numbers:
        run.process.send_signal(number)
        time.sleep(0.5)
    assert run.ended(SAVED_SECONDS) == code
    assert "Training Progress" not in run.output and "Traceback" not in run.output
    if len(numbers) == 1:
        assert "go on with: verl-plugins run vade" in run.output.splitlines()[-1]
    assert each_step_once(run) and left_by(run) == []


def test_kills_of_the_command_lose_no_line_and_leave_nothing(chain) -> None:
    """While it starts, and at two moments of a step."""
    killed = [chain().until_there_is(FIRST)]
    killed[0].process.kill()
    killed[0].ended()
    for seconds in (0.1, 0.9):
        killed.append(next_step(chain()))
        time.sleep(seconds)
        killed[-1].look().process.kill()
        killed[-1].ended()
    run = next_step(chain())
    assert [left_by(one) for one in killed] == [[], [], []]
    run.process.terminate()
    assert run.ended(SAVED_SECONDS) == 143
    assert each_step_once(run)
    dumps = run.out.with_name("rollouts").glob("*.jsonl")
    assert {int(file.stem) for file in dumps} >= set(run.steps)


class TestTwoRunsAtOnce:
    """In two folders of one machine."""

    @pytest.fixture(scope="class")
    def runs(self, begin: Start, tmp_path_factory: pytest.TempPathFactory) -> list[Running]:
        folder = tmp_path_factory.mktemp("pair")
        started = [begin(folder / "one"), begin(folder / "zwei mit Ümläuten")]
        return [run.until(1) for run in started]

    def test_they_listen_on_loopback_only(self, runs) -> None:
        assert listening(runs[0]) | listening(runs[1]) <= {"127.0.0.1", "::1"}

    def test_a_third_in_the_folder_of_one_is_refused(self, runs) -> None:
        words = [COMMAND, "run", "vade", "--preset", "cpu", "--out", runs[1].out]
        third = subprocess.run(words, capture_output=True, text=True, timeout=300)
        assert third.returncode == 2 and f"pid {runs[1].process.pid}" in third.stderr

    @pytest.mark.parametrize(
        "names", [(tuple(WORKERS), ("raylet",)), (("gcs_server",), ("ray.scripts.scripts", "verl-plugins"))]
    )
    def test_processes_that_are_stopped_for_a_minute_go_on(self, runs, names) -> None:
        """Some kinds in one run, some in the other."""
        before = [latest_step(run.out) for run in runs]
        stopped = [run.look().find(name) for run, some in zip(runs, names, strict=True) for name in some]
        for process in stopped:
            process.suspend()
        time.sleep(STOP_SECONDS)
        for process in stopped:
            process.resume()
        for run, step in zip(runs, before, strict=True):
            run.until(step + 3)

    def test_they_end_without_a_trace_of_each_other(self, runs) -> None:
        for run in runs:
            run.look().process.terminate()
        assert [run.ended(SAVED_SECONDS) for run in runs] == [143, 143]
        assert [each_step_once(run) for run in runs] == [True, True]
        assert [left_by(run) for run in runs] == [[], []]
