"""Processes of a run that die or are stopped, and signals to the command itself."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from running import listening
from training import COMMAND, read_metrics

from verl_plugins.composition import scratch

STOP_SECONDS = int(os.environ.get("FAULTS_STOP_SECONDS", "60"))
KINDS = {
    "ray::PluginAgentLoopWorker": "agent-loop worker",
    "ray::SimpleStorageUnit": "queue's storage",
    "ray::TransferQueueController": "queue's controller",
    "ray::TransformersServer": "rollout server",
    "ray::WorkerDict": "actor worker",
    "ray::RewardLoopWorker": "reward worker",
    "ray::GlobalRequestLoadBalancer": "load balancer",
    "raylet": "raylet",
    "gcs_server": "gcs_server",
    "ray.scripts.scripts": "head process",
    "verl-plugins": "server that starts workers",
}


@pytest.mark.parametrize("name", KINDS)
def test_a_killed_process_is_named_and_nothing_is_left(start, name) -> None:
    run = start().until(2)
    victim = run.find(name)
    victim.kill()
    assert run.ended() == 1
    errors = [line for line in run.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert KINDS[name] in errors[0] and f"pid {victim.pid}" in errors[0]
    assert "go on with: verl-plugins run vade" in run.output
    assert run.steps == list(range(1, len(run.steps) + 1))


def test_stopped_processes_go_on(start) -> None:
    """One kind after the other, for a minute each."""
    run = start().until(1)
    for name in KINDS:
        process, before = run.find(name), run.steps
        process.suspend()
        time.sleep(STOP_SECONDS)
        process.resume()
        run.until(len(before) + 3)
    run.process.terminate()
    assert run.ended() == 143
    assert run.steps == list(range(1, len(run.steps) + 1))


def test_kills_of_the_command_lose_no_line_and_leave_nothing(start, tmp_path) -> None:
    dump = f"trainer.rollout_data_dir={tmp_path / 'rollouts'}"
    for _ in range(3):
        run = start(dump)
        step = len(run.steps) + 2
        run.until(step)
        time.sleep(0.3)
        run.process.kill()
        run.ended()
    run = start(dump).until(len(run.steps) + 2)
    assert scratch.leftovers() == []
    run.process.terminate()
    assert run.ended() == 143
    assert run.steps == list(range(1, len(run.steps) + 1))
    assert {int(file.stem) for file in (tmp_path / "rollouts").glob("*.jsonl")} >= set(run.steps)


@pytest.mark.parametrize(
    ("numbers", "code"),
    [([signal.SIGINT], 130), ([signal.SIGINT] * 2, 130), ([signal.SIGTERM], 143), ([signal.SIGHUP], 129)],
)
def test_signals(start, numbers, code) -> None:
    run = start().until(1)
    for number in numbers:
        run.process.send_signal(number)
        time.sleep(0.5)
    assert run.ended() == code
    assert "Training Progress" not in run.output and "Traceback" not in run.output
    if len(numbers) == 1:
        assert "go on with: verl-plugins run vade" in run.output.splitlines()[-1]


def test_a_run_on_one_machine_listens_on_loopback_only_and_alone_in_its_folder(start) -> None:
    run = start().until(1)
    assert listening(run) <= {"127.0.0.1", "::1"}
    second = subprocess.run(
        [COMMAND, "run", "vade", "--preset", "cpu", "--out", run.out], capture_output=True, text=True, timeout=60
    )
    assert second.returncode == 2 and f"pid {run.process.pid}" in second.stderr
    other = start(out=Path(f"{run.out}-zwei mit Ümläuten")).until(1)  # two runs at once
    for one in (run, other):
        one.process.terminate()
        assert one.ended(120) == 143
        assert read_metrics(one.out / "metrics.jsonl")[0]
