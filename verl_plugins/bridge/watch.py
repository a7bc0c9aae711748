"""Watches the processes of a run: one that dies ends the run with a sentence, whatever the driver is waiting for.

Ray tells a caller whose actor died, but not one that waits for a message from it (the queue), and what it tells is a
paragraph. Here two threads in the driver look once a second: one at the processes of the local node, one at Ray's table
of actors, which also knows those of other machines. A process that is merely stopped is not dead.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private.state import state as ray_state
from ray.core.generated import common_pb2

from verl_plugins.errors import RunError

KINDS = {
    "TransformersServer": "rollout server",
    "vLLMHttpServer": "rollout server",
    "SGLangHttpServer": "rollout server",
    "PluginAgentLoopWorker": "agent-loop worker",
    "AgentLoopWorkerTQ": "agent-loop worker",
    "RewardLoopWorker": "reward worker",
    "WorkerDict": "actor worker",
    "PluginActorWorker": "actor worker",
    "ActorRolloutRefWorker": "actor worker",
    "TransferQueueController": "queue's controller (TransferQueue)",
    "SimpleStorageUnit": "queue's storage (TransferQueue)",
    "GlobalRequestLoadBalancer": "rollout servers' load balancer",
}
"""How a process is called in the sentence, by the class of the actor in it."""
NODE = {"gcs_server": "Ray's gcs_server", "raylet": "Ray's raylet"}
REASON = common_pb2.ActorDiedErrorContext.Reason
UNEXPECTED = {REASON.WORKER_DIED, REASON.NODE_DIED}
LOOK_SECONDS, NODE_SECONDS, GRACE_SECONDS = 1.0, 0.05, 15.0
"""How often is looked at actors and at the node, and how long the driver has to end in order once an actor is dead.

Ray ends a driver in silence soon after its raylet died: then the sentence must be out.
"""
TAIL_BYTES, LONGEST_WORDS = 1 << 18, 200
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class ProcessDied(RunError):
    """A process of the run died; the message says which."""


class _Wake(BaseException):
    """Raised in the main thread wherever it waits."""


class Watch:
    """A context manager in the main thread around what the run does while all its processes are needed.

    Whatever exception leaves the block, a `ProcessDied` is raised in its place when a process has died.
    """

    def __init__(
        self, node: Mapping[int, str], log: Path, over: threading.Event, give_up: Callable[[str], None]
    ) -> None:
        self._node = node
        self._log = log
        self._over, self._give_up = over, give_up
        self._job = ray.get_runtime_context().get_job_id()
        self._done = threading.Event()
        self._dead = threading.Event()
        self._sentence = ""
        self._kills = killed_for_memory()
        self._main = threading.get_ident()

    def __enter__(self) -> Watch:
        self._handler = signal.signal(signal.SIGUSR1, self._wake)
        for look in (self._look_at_node, self._look_at_actors):
            threading.Thread(target=look, name=f"watch {look.__name__}", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        wait = error is not None and not isinstance(error, KeyboardInterrupt)
        died = self._dead.wait(3 * LOOK_SECONDS if wait else 0)
        self._done.set()
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        if died and error is not None:
            raise ProcessDied(self._sentence) from error

    def _wake(self, *_: Any) -> None:
        if not self._done.is_set():
            raise _Wake

    def _look_at_node(self) -> None:
        while not self._done.wait(NODE_SECONDS) and not self._dead.is_set():
            if (found := self._node_died()) and not self._done.is_set() and not self._over.is_set():
                self._sentence = f"{found[0]} (pid {found[1]}) died{self._circumstances(found[1])}"
                self._dead.set()
                self._give_up(self._sentence)

    def _look_at_actors(self) -> None:
        while not self._done.wait(LOOK_SECONDS) and not self._dead.is_set():
            found = None
            with contextlib.suppress(Exception):  # Ray is starting, ending, or itself what died
                found = self._actor_died()
            if found and not self._done.is_set() and not self._node_died():
                self._sentence = f"the {found[0]} (pid {found[1]}) died{self._circumstances(found[1])}"
                self._end()

    def _end(self) -> None:
        """Wake the main thread; if the run has not ended after a while, end it from here."""
        self._dead.set()
        time.sleep(2 * LOOK_SECONDS)  # what the main thread is told by Ray itself may be on its way
        if not self._done.is_set():
            signal.pthread_kill(self._main, signal.SIGUSR1)
        if not self._over.wait(GRACE_SECONDS):
            self._give_up(self._sentence)

    def _node_died(self) -> tuple[str, int] | None:
        """The first that is dead; those that take others with them stand before these."""
        for pid, who in self._node.items():
            if not _runs(pid):
                return who, pid
        return None

    def _actor_died(self) -> tuple[str, int] | None:
        for actor in ray_state.actor_table(None, None, "DEAD").values():
            if actor["JobID"] == self._job and _unexpected(actor["DeathCause"]):
                name = actor["ActorClassName"].rpartition(".")[2]  # verl's actor worker is made inside a function
                return KINDS.get(name, name), actor["Pid"]
        return None

    def _circumstances(self, pid: int) -> str:
        words = last_words(self._log, pid)
        parts = [f"; its last line in {self._log.name} is {words!r}" if words else ""]
        if killed_for_memory() > self._kills:
            parts.append("; the machine ran out of memory meanwhile, and the kernel killed a process for it")
        return "".join(parts)


def _unexpected(cause: Any) -> bool:
    if cause.WhichOneof("context") == "oom_context":
        return True
    context = cause.actor_died_error_context
    return context.reason in UNEXPECTED and "INTENDED" not in context.error_message


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def of_node(parent: int) -> dict[int, str]:
    """The processes of a Ray node on this machine that a run cannot do without, by who started them."""
    children = [(child.pid, child.name()) for child in psutil.Process(parent).children()]
    return {pid: kind for pid, name in children for start, kind in NODE.items() if name.startswith(start)}


def last_words(log: Path, pid: int) -> str:
    """The last line that a process of Ray wrote to the log, without Ray's prefix and colours."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
        return _of_process(file.read().decode(errors="replace").splitlines(), pid)
    return ""


def _of_process(lines: Iterable[str], pid: int) -> str:
    said = re.compile(rf"\([^()]*\bpid={pid}\b[^()]*\) *(.*\S)")
    found = [match[1] for line in lines if (match := said.search(COLOURS.sub("", line)))]
    return found[-1][-LONGEST_WORDS:] if found else ""


def killed_for_memory() -> int:
    """How many processes the kernel has killed for lack of memory, as far as it tells."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/vmstat").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("oom_kill ")).split()[1])
    return 0
