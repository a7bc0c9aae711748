"""Two Ray nodes, both on this machine: a training on them with a checkpoint, and its resumption."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from verl_plugins.cpu.demo import read_metrics

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600)]

BIN = Path(sys.executable).parent
READY, TIMEOUT = 300, 800
PLAIN = ("trainer.val_before_train=false", "trainer.test_freq=-1", "trainer.save_freq=1")
"""The preset cpu starts a node of its own; on a cluster it joins the one that is there."""
ACCESS = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
"""Said to every process, or Ray does what it finds in the home folder: its servers take a token there, clients none."""
ON_A_CLUSTER = ("num_cpus", "num_gpus", "include_dashboard")


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a cluster of two nodes with one logical GPU each; ended by the processes that were started here."""
    folder = Path(tempfile.mkdtemp(prefix="rc"))
    where = f"127.0.0.1:{free_port()}"
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-gpus=1", "--num-cpus=16"]
    start += ["--node-ip-address=127.0.0.1"]
    head = ["--head", f"--port={where.partition(':')[2]}", "--include-dashboard=false", f"--temp-dir={folder}"]
    nodes: list[subprocess.Popen] = []
    try:
        for options in (head, [f"--address={where}"]):
            with (folder / f"node_{len(nodes)}.log").open("w") as log:
                nodes.append(subprocess.Popen([*start, *options], stdout=log, stderr=log, env=os.environ | ACCESS))
            wait_for_nodes(where, folder, len(nodes))
        yield where
    finally:
        for node in reversed(nodes):
            node.terminate()
            node.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def told(command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Run it to its end with the cluster's token."""
    together = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(command, timeout=timeout, env=os.environ | ACCESS, **together)


def wait_for_nodes(address: str, folder: Path, count: int) -> None:
    code = (
        "import ray, sys, time; until = time.time() + float(sys.argv[3])\n"
        "while time.time() < until:\n"
        "    try:\n"
        "        ray.init(address=sys.argv[1], log_to_driver=False)\n"
        "        if sum(node['Alive'] for node in ray.nodes()) == int(sys.argv[2]): sys.exit(0)\n"
        "    except (ConnectionError, RuntimeError) as error: print(error)\n"
        "    ray.shutdown(); time.sleep(1)\n"
        "sys.exit('the nodes did not come up')"
    )
    command = [sys.executable, "-c", code, address, str(count), str(READY)]
    done = told(command, timeout=2 * READY)
    logs = "".join(log.read_text(errors="replace")[-2000:] for log in sorted(folder.glob("node_*.log")))
    assert done.returncode == 0, done.stdout + logs


def train(address: str, out: Path, steps: int) -> str:
    """What the terminal showed."""
    joined = [f"ray_kwargs.ray_init.{key}=null" for key in ON_A_CLUSTER]
    command = [str(BIN / "verl-plugins"), "run", "vade", "--preset", "cpu", "--out", str(out), *PLAIN, *joined]
    command += ["trainer.nnodes=2", f"+ray_kwargs.ray_init.address={address}", f"trainer.total_training_steps={steps}"]
    done = told(command, timeout=TIMEOUT)
    assert done.returncode == 0, done.stdout + (out / "verl.log").read_text(errors="replace")[-3000:]
    return done.stdout


def test_a_training_on_two_nodes_and_its_resumption(address: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(address, out, 2)
    steps = read_metrics(out / "metrics.jsonl")[0]
    assert [step["step"] for step in steps] == [1, 2]
    assert len({line for line in (out / "verl.log").read_text().splitlines() if "actor worker" in line}) >= 2
    assert (out / "latest_checkpointed_iteration.txt").read_text() == "2"
    for rank in (0, 1):
        assert (out / f"global_step_2/actor/model_world_size_2_rank_{rank}.pt").exists()
    assert "resuming after step 2" in train(address, out, 3)
    assert [step["step"] for step in read_metrics(out / "metrics.jsonl")[0]] == [1, 2, 3]
    assert not ray.is_initialized()
