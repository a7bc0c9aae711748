"""The local Ray node: a node that gave up is one sentence at once, not minutes of retries."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator

import psutil
import pytest

from verl_plugins.cpu import head
from verl_plugins.cpu.head import Head
from verl_plugins.errors import PluginError


@pytest.fixture
def gave_up() -> Head:
    process = subprocess.Popen(["false"])
    process.wait()
    return Head("127.0.0.1:1", process)


@pytest.fixture
def running() -> Iterator[Head]:
    process = subprocess.Popen(["sleep", "60"])
    yield Head("127.0.0.1:1", process)
    process.kill()
    process.wait()


@pytest.mark.parametrize("question", [Head.raylet_pid, Head.check])
def test_a_node_that_gave_up(question, gave_up, sentence):
    with pytest.raises(PluginError) as error:
        question(gave_up)
    sentence(error.value, "Ray node did not start", "verl.log")


def test_a_running_node(running):
    running.check()


def test_what_a_dead_head_process_has_started_is_still_found_and_ended() -> None:
    words = ["bash", "-c", "sleep 60 & bash -c 'sleep 60 & wait' & echo; wait"]
    process = subprocess.Popen(words, start_new_session=True, stdout=subprocess.PIPE)
    process.stdout.readline()
    time.sleep(0.5)
    process.kill()
    process.wait()
    left = head.members(process.pid)
    assert sorted(one.name() for one in left) == ["bash", "sleep", "sleep"]
    head._stop(process)
    _, alive = psutil.wait_procs(left, timeout=5)
    assert alive == [] and head.members(process.pid) == []


def test_ports_are_free_and_not_those_the_system_hands_out():
    """One that anybody may be given before Ray binds it ends a run that starts beside another."""
    low = int(head.EPHEMERAL.read_text().split()[0])
    found = [head._free_ports(3) for _ in range(20)]
    assert all(len(set(ports)) == 3 and head.LOWEST <= min(ports) <= max(ports) < low for ports in found)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", found[0][0]))
        assert all(found[0][0] not in head._free_ports(3) for _ in range(20))
