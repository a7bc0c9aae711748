"""Processes that answer requests under a deadline and are killed and replaced when they pass it.

A pool has one server process, which imports what the work needs once, and workers forked from it (`verifier.py` is the
program of both). It may be used from any number of threads. Nothing starts before `start` or the first request. All
processes end with the pool, or with the process that owns it however that ends.
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from typing import Any

from verl_plugins.errors import PluginError
from verl_plugins.reward import verifier
from verl_plugins.reward.verifier import receive, send

START_SECONDS = 120.0
"""Until a worker must be ready: its server imports first."""
COMMAND_SECONDS = 10.0
"""Until the server must have taken a command or replied to it."""
STOP_SECONDS = 1.0
"""Until a server must have ended by itself."""
ENVIRONMENT = ("LD_LIBRARY_PATH", "PYTHONHOME")
"""Variables the processes inherit; they have no use for the others, keys and passwords among them."""


class DeadlinePassed(Exception):
    """A worker had no reply in time and was killed."""


class WorkerDied(Exception):
    """A worker ended instead of replying."""


class Pool:
    """`workers` processes that do `work`.

    Args:
        work: `module:function`, which gives the function that answers requests (`judging.py` has one).
        deadline: seconds a request may take, waiting for a free worker not counted.
        memory: the most address space of a worker, in bytes.
        readable: folders whose files a worker may read.
    """

    def __init__(self, work: str, workers: int, deadline: float, memory: int, readable: Sequence[str] = ()) -> None:
        self.work, self.workers, self.deadline, self.memory = work, workers, deadline, memory
        self.readable = list(readable)
        self._lock = threading.Lock()
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        self._server: _Server | None = None
        self._closed = False

    def start(self) -> None:
        """Start the processes, without waiting until they are ready."""
        with self._lock:
            if self._closed:
                raise PluginError(f"the pool of {self.work} is closed")
            if self._server is None:
                self._server = _Server(self.work, self.deadline, self.memory, self.readable)
                for _ in range(self.workers):
                    self._idle.put(self._server.fork())

    def ask(self, request: dict[str, Any]) -> Any:
        """Send a request to a free worker and wait for its reply.

        Raises:
            DeadlinePassed: no reply in time; the worker is killed and replaced.
            WorkerDied: the worker crashed; it is replaced.
            PluginError: no worker can be started, or the pool is closed.
        """
        if self._server is None:
            self.start()
        worker = self._idle.get()
        try:
            if not worker.is_alive():
                worker, _ = self._replace(worker)
            worker.wait_until_ready()
            try:
                return worker.ask(request, self.deadline)
            except TimeoutError:
                worker, _ = self._replace(worker, hung=True)
                raise DeadlinePassed(f"no reply within {self.deadline} s") from None
            except (OSError, EOFError):
                worker, cause = self._replace(worker)
                raise WorkerDied(f"its process ended: {cause}") from None
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End all processes. The pool cannot be used again."""
        with self._lock:
            self._closed = True
            if self._server is not None:
                self._server.stop()

    def _replace(self, worker: _Worker, hung: bool = False) -> tuple[_Worker, str]:
        """Fork another worker, from a new server if need be; and how the old one ended, if it was not killed here."""
        worker.connection.close()
        with self._lock:
            if self._closed:
                raise PluginError(f"the pool of {self.work} is closed")
            try:
                cause = "its server ended"
                if worker.server is self._server and hung:
                    self._server.kill(worker)
                elif worker.server is self._server:
                    cause = self._server.end(worker)
                return self._server.fork(), cause
            except OSError:
                self._server.stop()
                self._server = _Server(self.work, self.deadline, self.memory, self.readable)
                return self._server.fork(), "its server ended"


class _Worker:
    """This side of a worker."""

    def __init__(self, server: _Server, number: int, connection: socket.socket) -> None:
        self.server, self.number, self.connection = server, number, connection
        self._ready = False

    def is_alive(self) -> bool:
        """Whether the connection is open."""
        self.connection.settimeout(0)
        try:
            return bool(self.connection.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def wait_until_ready(self) -> None:
        if self._ready:
            return
        self.connection.settimeout(START_SECONDS)
        try:
            receive(self.connection)
        except (OSError, EOFError):
            raise PluginError(
                "a process that looks at answers ended while it started, or did not start within "
                f"{START_SECONDS:.0f} s; what it said is in the log"
            ) from None
        self._ready = True

    def ask(self, request: dict[str, Any], deadline: float) -> Any:
        self.connection.settimeout(deadline)
        send(self.connection, request)
        return receive(self.connection)


class _Server:
    """This side of the process that forks workers. It ends when the control socket closes or its parent ends."""

    def __init__(self, work: str, deadline: float, memory: int, readable: Sequence[str] = ()) -> None:
        self._control, other_side = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(COMMAND_SECONDS)
        self._numbers = itertools.count()
        path = [os.path.abspath(folder) for folder in sys.path if folder]
        given = {"path": path, "work": work, "memory": memory, "seconds": deadline, "readable": list(readable)}
        settings = json.dumps(given)
        # A fixed hash seed: the order of sympy's sets, and with it a verdict, must not differ from run to run.
        inherited = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-s", "-S", verifier.__file__, str(other_side.fileno()), settings],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            cwd="/",
            env={"PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1", **inherited},
            pass_fds=[other_side.fileno()],
            start_new_session=True,
        )
        other_side.close()
        self.stop = weakref.finalize(self, _stop, self._process, self._control)

    def fork(self) -> _Worker:
        """A new worker; it may take a moment until it is ready."""
        number = next(self._numbers)
        connection, other_side = socket.socketpair()
        with other_side:
            socket.send_fds(self._control, [b"fork %d" % number], [other_side.fileno()])
        return _Worker(self, number, connection)

    def kill(self, worker: _Worker) -> None:
        """Kill a worker, without waiting until it has ended."""
        self._control.send(b"kill %d" % worker.number)

    def end(self, worker: _Worker) -> str:
        """How a worker ended."""
        self._control.send(b"end %d" % worker.number)
        reply = self._control.recv(64)
        if not reply:
            raise BrokenPipeError("the server is gone")
        code = os.waitstatus_to_exitcode(int(reply))
        return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def _stop(process: subprocess.Popen, control: socket.socket) -> None:
    control.close()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:  # it is still importing
        process.kill()
        process.wait()
