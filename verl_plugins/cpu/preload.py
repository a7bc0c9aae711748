"""Ray workers that start with everything already imported.

Importing verl takes some ten seconds of CPU, and a run has half a dozen worker processes. Here the driver imports once
and forks a server; Ray starts its workers through a small client (the documented `py_executable` of its runtime
environment), which asks the server to fork a worker and then lives as long as it does. Only for one machine, and only
for a driver that has neither started threads nor connected to Ray yet, and that was told before it imported Ray which
job and node its workers belong to (`head.Head.announced`).

Ray names objects by random numbers of a generator that a fork copies once it was used, and that nothing seeds anew:
two processes would give different objects one name, and a third would read the wrong one. So nothing may draw from it
before the fork (`unused_ids`), which is looked at there.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import runpy
import select
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import ray.actor
import torch
from ray._raylet import ActorClassID, Config, NodeID

from verl_plugins.errors import RunError

CLIENT = Path(__file__).with_name("preload_client.py")
MODULES = (
    "verl.trainer.main_ppo",
    "verl.trainer.ppo.v1",
    "verl.workers.engine_workers",
    "verl.experimental.reward_loop",
    "verl.workers.rollout.router",
    "transformers.models.qwen2.modeling_qwen2",
    "verl_plugins.bridge.runner",
    "verl_plugins.bridge.reward",
    "verl_plugins.cpu.rollout",
)
"""What the worker processes of a run import."""
OF_ROLLOUT = {"vllm": ("verl.workers.rollout.vllm_rollout.vllm_async_server",)}
"""And what they import more with one of verl's own rollouts."""

PR_SET_PDEATHSIG = 1


class _OwnId(ActorClassID):
    """What Ray gives each class of actors as it is defined, from the system's random numbers."""

    @classmethod
    def from_random(cls) -> ActorClassID:
        return ActorClassID(os.urandom(ActorClassID.size()))


@contextlib.contextmanager
def unused_ids() -> Iterator[None]:
    """While modules that define actors are imported: Ray's generator of names stays unused."""
    with patch.object(ray.actor, "ActorClassID", _OwnId):
        yield


def shares_ids() -> bool:
    """Whether two processes forked from this one would give the same names."""
    return _name_in_a_fork() == _name_in_a_fork()


def _name_in_a_fork() -> bytes:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writing, NodeID.from_random().binary())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        name = file.read()
    os.waitpid(pid, 0)
    return name


class Preload:
    """The forking server of one run; a context manager in the driver."""

    def __init__(self, folder: Path) -> None:
        self._address = str(folder / "s")
        self.pid = 0

    @property
    def py_executable(self) -> str:
        """For Ray's runtime environment."""
        return f"{sys.executable} -I -S {CLIENT} {self._address}"

    def __enter__(self) -> Preload:
        """Fork it.

        Raises:
            RunError: what was imported has drawn names from Ray.
        """
        if shares_ids():
            raise RunError(
                "a module that this run imports has drawn random names from Ray, so that its workers would give "
                "different objects one name; leave out what makes actors, tasks or objects of Ray as it is imported"
            )
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(self._address)
        listener.listen(64)
        sys.stdout.flush()
        sys.stderr.flush()
        driver = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            _serve(listener, driver)
        listener.close()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def _serve(listener: socket.socket, driver: int) -> None:
    """Fork a worker per request until the driver ends; never returns."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != driver:
        os._exit(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # finished workers leave no zombies
    while True:
        select.select([listener], [], [])
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _become_worker(connection)
        connection.close()


def _become_worker(connection: socket.socket) -> None:
    """Take over the client's arguments, environment, folder and standard streams, then run what it would have run."""
    try:
        request, descriptors = _receive(connection)
        for target, source in enumerate(descriptors):
            os.dup2(source, target)
            os.close(source)
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        _fresh_state()
        connection.set_inheritable(False)
        sys.argv = request["arguments"]
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        os._exit(stop.code if isinstance(stop.code, int) else int(stop.code is not None))
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def _fresh_state() -> None:
    """What a new interpreter would have: Ray's settings of this environment, random numbers, threads."""
    Config.initialize("")  # read the environment again: authentication is switched on by ray.init, after the fork
    random.seed()
    np.random.seed()
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))


def _receive(connection: socket.socket) -> tuple[dict, list[int]]:
    head, descriptors, _, _ = socket.recv_fds(connection, 8, 3)
    (length,) = struct.unpack("!Q", head)
    body = b""
    while len(body) < length:
        body += connection.recv(length - len(body))
    return json.loads(body), list(descriptors)
