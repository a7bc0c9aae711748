"""A stopped process is said once, with what lets it go on, and is never taken for dead."""

from __future__ import annotations

import signal
import subprocess
import time

import pytest

from verl_plugins.bridge import stopped
from verl_plugins.bridge.stopped import Stopped

KINDS = {"PluginAgentLoopWorker": "agent-loop worker", "WorkerDict": "actor worker"}


@pytest.fixture
def process():
    with subprocess.Popen(["sleep", "60"]) as running:
        yield running
        running.kill()


@pytest.fixture
def said(monkeypatch, process):
    monkeypatch.setattr(stopped, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(stopped, "SAID_SECONDS", 0.3)
    lines: list[str] = []
    with Stopped({process.pid: "Ray's raylet"}, KINDS, lines.append):
        yield lines


def test_it_is_said_once_each_time(said, process, sentence) -> None:
    for times in (1, 2):
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        assert len(said) == times
        process.send_signal(signal.SIGCONT)
        time.sleep(0.5)
    sentence(said[0], f"Ray's raylet (pid {process.pid}) is stopped", f"kill -CONT {process.pid}", "^C")


def test_a_moment_is_not_said(said, process) -> None:
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.1)
    process.send_signal(signal.SIGCONT)
    time.sleep(0.6)
    assert said == []


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("ray::PluginAgen", "the agent-loop worker (pid 7)"),
        ("ray::PluginAgentLoopWorker", "the agent-loop worker (pid 7)"),
        ("ray::WorkerDict", "the actor worker (pid 7)"),
        ("ray::WorkerDict.actor_update", "the actor worker (pid 7)"),
        ("ray::IDLE", "the process ray::IDLE (pid 7)"),
        ("ray::", "the process ray:: (pid 7)"),
        ("WorkerDict", "the process WorkerDict (pid 7)"),
        ("python", "the process python (pid 7)"),
    ],
)
def test_workers_are_called_by_their_kind(name, called) -> None:
    lines: list[str] = []
    watch = Stopped({}, KINDS, lines.append)
    for now in (0.0, 10.0, 29.0, 31.0, 40.0):
        watch._compare({7: name}, now)
    assert len(lines) == 1 and called in lines[0]
