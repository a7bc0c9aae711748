"""Says when a process of the run has been stopped (SIGSTOP, a debugger): it is not dead, and the run waits for it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import psutil

LOOK_SECONDS, SAID_SECONDS = 5.0, 30.0
"""How often is looked, and after how long a stopped process is said."""
STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)


class Stopped:
    """A context manager; looks at what this process has started, on this machine.

    Args:
        node: processes by id that have a name of their own.
        kinds: what a worker is called, by its class; Ray names a process `ray::CLASS`, of which 15 characters are kept.
        say: what prints a line.
    """

    def __init__(self, node: Mapping[int, str], kinds: Mapping[str, str], say: Callable[[str], None]) -> None:
        self._node, self._kinds, self._say = node, kinds, say
        self._since: dict[int, float] = {}
        self._said: set[int] = set()
        self._over = threading.Event()

    def __enter__(self) -> Stopped:
        threading.Thread(target=self._look, name="watch for stopped processes", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _look(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            with contextlib.suppress(psutil.Error):
                self._compare(dict(_stopped()), time.monotonic())

    def _compare(self, stopped: Mapping[int, str], now: float) -> None:
        self._since = {pid: self._since.get(pid, now) for pid in stopped}
        self._said &= stopped.keys()
        for pid, since in self._since.items():
            if now - since >= SAID_SECONDS and pid not in self._said:
                self._said.add(pid)
                self._say(
                    f"warning: {self._called(pid, stopped[pid])} (pid {pid}) is stopped and the run may wait for it: "
                    f"let it go on with kill -CONT {pid}, or end the run with ^C"
                )

    def _called(self, pid: int, name: str) -> str:
        title = name.removeprefix("ray::")
        kind = next((kind for cls, kind in self._kinds.items() if title and cls.startswith(title[:10])), None)
        return self._node.get(pid) or (f"the {kind}" if kind and name.startswith("ray::") else f"the process {name}")


def _stopped() -> Iterator[tuple[int, str]]:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.status() in STOPPED:
                yield process.pid, process.name()
