"""The local Ray node: a node that gave up is one sentence at once, not minutes of retries."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

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
