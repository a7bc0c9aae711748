"""A run that is going on: its processes, and what it has written so far."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from pathlib import Path

import psutil
from training import SHORT, command, read_metrics

START_SECONDS, TOLD_SECONDS = 600, 60
MANY = ("trainer.total_training_steps=1000", "trainer.save_freq=1")


class Running:
    """A run that is going on, with a checkpoint every step."""

    def __init__(self, out: Path, *overrides: str, **options: object) -> None:
        self.out, self.terminal = out, out.with_suffix(".terminal")
        with self.terminal.open("ab") as file:
            self.process = subprocess.Popen(
                command("vade", out, *SHORT, *MANY, *overrides),
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGHUP)],
                **options,
            )
        self.family: list[psutil.Process] = []

    @property
    def output(self) -> str:
        return self.terminal.read_text(errors="replace")

    @property
    def steps(self) -> list[int]:
        path = self.out / "metrics.jsonl"
        return [record["step"] for record in read_metrics(path)[0]] if path.exists() else []

    def until(self, step: int) -> Running:
        """Wait for a step to be saved; then all processes of the run are known."""
        marker, deadline = self.out / "latest_checkpointed_iteration.txt", time.monotonic() + START_SECONDS
        while not (marker.exists() and int(marker.read_text()) >= step):
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.1)
        return self.look()

    def until_there_is(self, name: str) -> Running:
        """Wait for a process of this name; then all processes of the run so far are known."""
        deadline = time.monotonic() + START_SECONDS
        while not self._named(name):
            assert self.process.poll() is None and time.monotonic() < deadline, self.output
            time.sleep(0.1)
            self.look()
        return self

    def look(self) -> Running:
        """Know all processes that the run has now."""
        self.family = psutil.Process(self.process.pid).children(recursive=True)
        return self

    def find(self, name: str) -> psutil.Process:
        """The run's process of this name: Ray's workers are named after their class, others by their command."""
        found = self._named(name)
        assert found, [f"{_name(process)} {_words(process)}" for process in self.family]
        return found[0]

    def _named(self, name: str) -> list[psutil.Process]:
        # The kernel keeps 15 characters of what Ray calls a process, and Ray renames it after the method that runs.
        if name.startswith("ray::"):
            return [process for process in self.family if _name(process)[:15] == name[:15]]
        return [process for process in self.family if name in f"{_name(process)} {_words(process)}"]

    def ended(self, within: float = TOLD_SECONDS) -> int:
        """The exit code; nothing of the run is left."""
        try:
            code = self.process.wait(timeout=within)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still going on after {within} s:\n{self.output}") from None
        _, alive = psutil.wait_procs(self.family, timeout=20)
        assert [_name(process) for process in alive] == []
        return code

    def end(self) -> None:
        if self.process.poll() is None:
            self.family = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            self.process.wait()
        for process in self.family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def _words(process: psutil.Process) -> str:
    try:
        return " ".join(Path(word).name for word in process.cmdline()[:4])
    except psutil.NoSuchProcess:
        return ""


def listening(run: Running) -> set[str]:
    """The addresses that the run's processes listen on, outside their machine or not."""
    found = set()
    for process in (psutil.Process(run.process.pid), *run.family):
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in process.net_connections("inet"):
                if one.status == psutil.CONN_LISTEN or not one.raddr:
                    found.add(one.laddr.ip.removeprefix("::ffff:"))
    return found
