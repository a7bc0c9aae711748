"""How a run is ended from outside (^C, SIGTERM, SIGHUP), and how a driver ends that cannot end in order."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from verl_plugins.bridge.intact import latest_step
from verl_plugins.composition.scratch import remove
from verl_plugins.cpu.head import KILLED_SECONDS, members

NAMES = {signal.SIGINT: "^C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to end at once."""

    def __init__(self, number: int) -> None:
        super().__init__(NAMES[number])
        self.code = 128 + number


class Signals:
    """What the signals do while a run is on; a context manager in the main thread.

    ^C ends the run at once. SIGTERM and SIGHUP, a scheduler's warning, end it after the step that is going on where
    checkpoints are saved, and at once elsewhere. A second signal does not wait for anything.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.asked: int | None = None
        self.saves = False
        """Whether a step is going on at whose end a checkpoint can be saved; the trainer says so."""
        self.scratch: Path | None = None
        self.node: int | None = None
        """The head process of the run's own Ray node."""
        self.over = threading.Event()
        """Set when everything of the run has ended."""
        self._say = say
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        ignored = signal.SIG_IGN  # of nohup and of shells for what they run in the background: stays so
        self._before = {number: old for number in NAMES if (old := signal.getsignal(number)) != ignored}
        self.install()
        return self

    def __exit__(self, *_: Any) -> None:
        self.over.set()
        for number, old in self._before.items():
            signal.signal(number, old if old is not None else signal.SIG_DFL)

    def install(self) -> None:
        """Also after `ray.init`, which puts a handler of its own in."""
        for number in self._before:
            signal.signal(number, self._arrived)

    def _arrived(self, number: int, _: FrameType | None) -> None:
        if self.asked is not None:
            self._say(f"{NAMES[number]} again: ended without waiting")
            self.end_now(128 + number)
        self.asked = number
        if number == signal.SIGINT or not self.saves:
            raise Interrupted(number)
        self._say(f"{NAMES[number]}: the run ends after this step and saves it; once more ends it now")

    def end_now(self, code: int) -> None:
        """Kill every process of the run, remove their temporary folder, exit."""
        self.over.set()  # nobody shall wonder at the deaths
        family: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            family = psutil.Process().children(recursive=True)
        family += members(self.node) if self.node else []
        for child in family:
            with contextlib.suppress(psutil.Error):
                child.kill()
        psutil.wait_procs(family, timeout=KILLED_SECONDS)  # one that lives may write to the folder while it is removed
        if self.scratch is not None:
            remove(self.scratch)
        os._exit(code)


def how_to_go_on(out: Path) -> str:
    """The sentence with the command that resumes what is saved in the run folder."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    if not any(word == "--out" or word.startswith("--out=") for word in words):
        words += ["--out", str(out)]
    words = [word for word in words if not word.startswith(("trainer.resume_mode=", "trainer.resume_from_path="))]
    step = latest_step(out)
    if step:
        return f"{step} steps are saved, go on with: {shlex.join(words)}"
    return "no checkpoint was saved; trainer.save_freq=N saves one every N steps"
