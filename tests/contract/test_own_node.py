"""A run on this machine's GPUs: Ray's node is its own, on loopback, and leaves nothing in the temporary folder.

There is no GPU here; Ray does not need one to start.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

SCRIPT = """
import json, os, tempfile
from verl_plugins.bridge import launch
from verl_plugins.bridge.ending import Signals
from verl_plugins.composition.compose import compose

composed = compose("grpo", "cpu", ("trainer.device=cuda",))
os.environ.update({launch.RUN_VARIABLE: "1", **composed.env})
with Signals(print) as signals, launch._cluster(composed.config, signals) as node:
    import ray
    from ray._private.worker import _global_node

    where = ray.remote(lambda: (tempfile.gettempdir(), os.environ["TORCHINDUCTOR_CACHE_DIR"]))
    temporary, compiled = ray.get(where.options(num_cpus=1).remote())
    print(json.dumps({
        "node": sorted(node.values()),
        "scratch": str(signals.scratch),
        "worker": temporary,
        "compiled": compiled,
        "session": _global_node.get_session_dir_path(),
        "address": ray.util.get_node_ip_address(),
    }))
"""


@pytest.fixture(scope="module")
def place():
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def told(place) -> dict:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TORCHINDUCTOR"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=300,
        env={**kept, "TMPDIR": str(place)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_everything_temporary_is_in_one_folder_that_goes_with_the_run(told, place) -> None:
    scratch = Path(told["scratch"])
    assert scratch.parent == place
    assert Path(told["worker"]).is_relative_to(scratch) and Path(told["session"]).is_relative_to(scratch)
    assert set(place.iterdir()) <= {Path(told["compiled"])}


def test_what_torch_compiles_stays_for_the_next_run(told, place) -> None:
    assert Path(told["compiled"]).parent == place


def test_its_processes_are_watched_and_listen_on_loopback(told) -> None:
    assert told["node"] == ["Ray's gcs_server", "Ray's raylet"]
    assert told["address"] == "127.0.0.1"
