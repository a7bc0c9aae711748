"""Sessions that failed: counted where they fail, and told by the driver with their first cause.

verl logs such a failure and goes on; when no group is left it stops with a sentence about its buffers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import ray

from verl_plugins.composition.blame import told

SECONDS = 5
"""How long a worker may take to say what failed; one that is dead says nothing."""
LOG_SECONDS = 1.5
"""How long the last line of a process takes to be in the log, from where the watch reads it."""
OF_VERL = ("materializable", "empty list as keys")
"""Parts of what verl says when every group has failed."""


@dataclass
class Failures:
    """What failed since somebody last asked."""

    asked: int = 0
    """Sessions that were to be generated."""
    failed: int = 0
    finished: int = 0
    """Groups that came through."""
    causes: dict[str, str] = field(default_factory=dict)
    """What went wrong -> the prompt it first happened with, in the order it happened."""

    def note(self, error: BaseException, prompt: str, sessions: int = 1) -> None:
        """`sessions` sessions of the prompt failed."""
        self.failed += sessions
        self.causes.setdefault(told(error), prompt)

    def take(self) -> Failures:
        """All of it; the count begins anew."""
        taken = Failures(self.asked, self.failed, self.finished, self.causes)
        self.asked, self.failed, self.finished, self.causes = 0, 0, 0, {}
        return taken

    @classmethod
    def together(cls, parts: Iterable[Failures]) -> Failures:
        """Those of several workers."""
        whole = cls()
        for part in parts:
            whole.asked, whole.failed = whole.asked + part.asked, whole.failed + part.failed
            whole.finished += part.finished
            for cause, prompt in part.causes.items():
                whole.causes.setdefault(cause, prompt)
        return whole

    def sentence(self) -> str:
        """`37 of 128 sessions failed: ValueError: … (prompt 12)`."""
        cause, prompt = next(iter(self.causes.items()))
        others = len(self.causes) - 1
        more = f", and {others} other cause{'s' if others > 1 else ''}, see verl.log" if others else ""
        return f"{self.failed} of {self.asked} sessions failed: {cause} ({prompt}){more}"


def collect(workers: Sequence[Any]) -> Failures:
    """What failed in the agent-loop workers since they were last asked."""
    asked = [worker.take_failures.remote() for worker in workers]
    done, late = ray.wait(asked, num_returns=len(asked), timeout=SECONDS) if asked else ([], [])
    found = []
    for answer in done:
        try:
            found.append(ray.get(answer))
        except ray.exceptions.RayError:  # its process is gone, which the watch tells
            continue
    return Failures.together(found)


def explains(failures: Failures, error: BaseException) -> bool:
    """Whether the failed sessions are what verl's error is about."""
    nothing_left = failures.asked > 0 and failures.failed >= failures.asked
    return bool(failures.causes) and (nothing_left or any(part in str(error) for part in OF_VERL))


class Executor(ThreadPoolExecutor):
    """Threads for what an event loop waits for.

    A `StopIteration` (a `next()` that found nothing, in somebody's function) would never come back from a thread:
    Python's event loop cannot take it, and whoever awaits it waits for ever.
    """

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return super().submit(_without_stop_iteration, function, *args, **kwargs)


def _without_stop_iteration(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except StopIteration as error:
        raise RuntimeError(f"StopIteration: {error}" if error.args else "StopIteration") from error


def give_up(sentence: str) -> None:
    """End this worker, which the driver's watch tells with this sentence: nothing else would tell it anything."""
    print(sentence, flush=True)
    time.sleep(LOG_SECONDS)
    os._exit(1)
