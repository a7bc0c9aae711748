"""The Ray head node of one local run, started beside the imports of the driver and ended with it.

It is started through `ray start --head --block`, on ports and in a folder of its own, with a random token, so that
several runs on one machine keep out of each other's way.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from verl_plugins.errors import PluginError

FIRST_JOB = "01000000"
"""The id a new cluster gives its first driver."""
START_SECONDS = 300
"""On a busy machine; a node that gives up is noticed at once."""
KILLED_SECONDS = 3
"""How long is waited for killed processes to be gone, which they are at once unless the system is stuck."""
PR_SET_PDEATHSIG = 1
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
LOWEST = 20000
"""Ray keeps 10002 to 19999 for its workers."""
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "GLOO_SOCKET_IFNAME": "lo"}
"""Keeps Ray's node address, and with it every socket of a run, at 127.0.0.1; else Ray takes the network's for it.

The variable's name is Ray's: it tells whether this kind of machine may be part of a cluster. Read when Ray is imported.
"""
PATIENCE = {"RAY_health_check_failure_threshold": "100", "RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
"""A process that is stopped for minutes (a suspended laptop) is not dead; the watch looks at those that are."""


@dataclass
class Head:
    """A starting or running head node."""

    address: str
    process: subprocess.Popen

    def raylet_pid(self) -> int:
        """Wait until the raylet runs."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(self.process.pid).children(recursive=True):
                    if child.name().startswith("raylet"):
                        return child.pid
            time.sleep(0.05)
        raise _not_started()

    def check(self) -> None:
        """PluginError if the node has given up since; Ray would go on trying to reach it for minutes."""
        if self.process.poll() is not None:
            raise _not_started()

    @contextmanager
    def announced(self) -> Iterator[None]:
        """While Ray is imported: whose worker this process may become, which the library reads only when it loads."""
        os.environ.update({"RAY_JOB_ID": FIRST_JOB, "RAY_RAYLET_PID": str(self.raylet_pid())})
        try:
            yield
        finally:
            del os.environ["RAY_JOB_ID"], os.environ["RAY_RAYLET_PID"]


@contextmanager
def started(folder: Path, num_cpus: int, num_gpus: int) -> Iterator[Head]:
    """Start a head node with its files in `folder`; it is stopped at the end."""
    os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), **LOOPBACK, **PATIENCE})
    port, client_port, agent_port = _free_ports(3)
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        *("--node-ip-address", "127.0.0.1", "--port", str(port), "--ray-client-server-port", str(client_port)),
        *("--dashboard-agent-listen-port", str(agent_port), "--include-dashboard", "false", "--no-monitor"),
        *("--num-cpus", str(num_cpus), "--num-gpus", str(num_gpus), "--temp-dir", str(folder)),
    ]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_end_with_parent)
    try:
        yield Head(f"127.0.0.1:{port}", process)
    finally:
        _stop(process)


def _not_started() -> PluginError:
    return PluginError("the local Ray node did not start; see verl.log in the run folder")


def _stop(process: subprocess.Popen) -> None:
    """Ask the node to end its processes, and make sure of it: none writes to its folder any more."""
    family = members(process.pid)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)
    process.kill()
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family, timeout=KILLED_SECONDS)


def members(pid: int) -> list[psutil.Process]:
    """The processes of a node, by its head process: nobody's children once that is dead, but still of its session."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != pid and os.getsid(process.pid) == pid:
                found |= {one.pid: one for one in (process, *process.children(recursive=True))}
    return list(found.values())


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_ports(count: int) -> list[int]:
    """Free ones below those that the system hands out: Ray takes them seconds later, and others come and go until then.

    Two runs that start at once draw different ones, but for one in thousands.
    """
    low, high = EPHEMERAL.read_text().split() if EPHEMERAL.is_file() else ("32768", "60999")
    draw, last = random.SystemRandom(), int(low) if int(low) > LOWEST + 1000 else int(high)
    found: set[int] = set()
    while len(found) < count:
        port = draw.randrange(LOWEST, last)
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            found.add(port)
    return list(found)
