"""Says when a prompt's rollouts do not come back: a tool, a server or a plugin that never answers raises nothing.

A worker knows which prompts it is at and where it waits; a thread of the driver asks, and warns on the terminal. How
long is too long nobody can know, so nothing is ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import site
import sysconfig
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import ray

ASKED_SECONDS, LATE_SECONDS, ANSWER_SECONDS = 30.0, 600.0, 60.0
"""How often workers are asked, from when on a prompt is late, and how long an answer may take."""
INSTALLED = tuple(site.getsitepackages())
MACHINERY = (sysconfig.get_path("stdlib"), str(Path(__file__).parents[1]))
MACHINERY += tuple(str(Path(folder) / name) for folder in INSTALLED for name in ("verl", "ray", "pluggy"))
"""Code that waits for what somebody else does."""


class Begun:
    """The prompts a worker is at."""

    def __init__(self) -> None:
        self._since: dict[str, tuple[str, float]] = {}

    @contextlib.contextmanager
    def at(self, uid: str, name: str) -> Iterator[None]:
        """While this prompt is rolled out."""
        self._since[uid] = name, time.monotonic()
        try:
            yield
        finally:
            del self._since[uid]

    def late(self, seconds: float) -> tuple[int, str, float, str] | None:
        """How many prompts have taken longer, the first of them, for how long, and where the worker waits."""
        old = [one for one in self._since.values() if time.monotonic() - one[1] > seconds]
        if not old:
            return None
        name, since = min(old, key=lambda one: one[1])
        return len(old), name, time.monotonic() - since, waits_at()


def waits_at() -> str:
    """The line at which most tasks of this event loop wait, in a plugin's, tool's or agent loop's file if possible."""
    ends = []
    for task in asyncio.all_tasks():
        frames = [*_frames(task.get_coro())] if task is not asyncio.current_task() else []
        theirs = [frame for frame in frames if not frame.f_code.co_filename.startswith(MACHINERY)]
        written = [frame for frame in theirs if not frame.f_code.co_filename.startswith(INSTALLED)]
        if frames:
            last = written[-1] if written else theirs[0] if theirs else frames[-1]
            ends.append((bool(theirs), f"{last.f_code.co_filename}, line {last.f_lineno}"))
    if not ends:
        return "nowhere"
    return max(Counter(ends).items(), key=lambda end: (end[0][0], end[1]))[0][1]


def _frames(waiting: Any) -> Iterator[FrameType]:
    """From the outermost to the innermost coroutine that is awaited."""
    while waiting is not None:
        frame = getattr(waiting, "cr_frame", None) or getattr(waiting, "gi_frame", None)
        if frame is not None:
            yield frame
        waiting = getattr(waiting, "cr_await", None) or getattr(waiting, "gi_yieldfrom", None)


class Lookout:
    """A context manager: asks the agent-loop workers now and then; a prompt that is late is said once."""

    def __init__(self, workers: Sequence[Any], say: Callable[[str], None]) -> None:
        self._workers, self._say = workers, say
        self._over = threading.Event()
        self._said: set[str] = set()

    def __enter__(self) -> Lookout:
        threading.Thread(target=self._look, name="watch for late rollouts", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _look(self) -> None:
        while not self._over.wait(ASKED_SECONDS):
            with contextlib.suppress(ray.exceptions.RayError):  # a process that died is told by another watch
                self._ask()

    def _ask(self) -> None:
        asked = [worker.late.remote(LATE_SECONDS) for worker in self._workers]
        done, busy = ray.wait(asked, num_returns=len(asked), timeout=ANSWER_SECONDS) if asked else ([], [])
        for answer in ray.get(done):
            if answer is not None:
                count, name, seconds, where = answer
                others = f" and {count - 1} others" if count > 1 else ""
                self._once(
                    name,
                    f"warning: {name}{others} began {seconds / 60:.0f} min ago and did not come back; the agent-loop "
                    f"worker waits at {where}, and the run with it: end it with ^C, or give that wait a timeout",
                )
        if busy and not self._over.is_set():
            self._once(
                "busy",
                f"warning: {len(busy)} of {len(asked)} agent-loop workers do not answer since {ANSWER_SECONDS:.0f} s: "
                "something in a rollout blocks them (a function that is not async, as time.sleep or requests.get)",
            )

    def _once(self, key: str, text: str) -> None:
        if key not in self._said:
            self._said.add(key)
            self._say(text)
