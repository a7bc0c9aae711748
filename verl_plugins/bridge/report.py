"""What a user sees of a run, and what stays of it: a line per step, metrics as JSON lines, verl's output in a file."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from verl_plugins.bridge.folder import mend_lines
from verl_plugins.errors import RunError, printable

LOG_FILE = "verl.log"
METRICS_FILE = "metrics.jsonl"
COMMANDS = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\xc2[\x80-\x9f]")
"""Bytes that a terminal obeys; others than tab, line feed and return."""


class Terminal:
    """The terminal, kept aside while everything that verl and Ray print goes to a file (and, verbose, here too)."""

    def __init__(self, log: Path, verbose: bool) -> None:
        self._path = log
        self._log: IO[bytes] | None = None
        self._verbose = verbose
        self._saved: list[int] = []
        self._pump: threading.Thread | None = None
        self.console = Console()

    def __enter__(self) -> Terminal:
        self._log = self._path.open("ab", buffering=0)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            if isinstance(stream, io.TextIOWrapper):  # a locale without umlauts is no reason to stop
                stream.reconfigure(errors="backslashreplace")
        self._saved = [os.dup(1), os.dup(2)]
        terminal = os.fdopen(os.dup(1), "w", buffering=1, errors="backslashreplace")
        self.console = Console(file=terminal, force_terminal=os.isatty(1) or None)
        target = self._tee() if self._verbose else self._log.fileno()
        os.dup2(target, 1)
        os.dup2(target, 2)
        if self._verbose:
            os.close(target)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, saved in zip((1, 2), self._saved, strict=True):
            os.dup2(saved, fd)
        if self._pump is not None:
            self._pump.join(timeout=5)
        for saved in self._saved:
            os.close(saved)
        self._log.close()

    def say(self, text: str, highlight: bool = False) -> None:
        """Print a line; a terminal that is gone (SIGHUP, a closed pipe) stops nothing."""
        with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: a signal arrived while a line was written
            self.console.print(printable(text), soft_wrap=True, highlight=highlight, markup=False)

    def _tee(self) -> int:
        """A pipe whose content goes both to the log file and to the terminal, there without escape sequences."""
        reader, writer = os.pipe()
        terminal = self._saved[0]

        def pump() -> None:
            while chunk := os.read(reader, 65536):
                with contextlib.suppress(OSError):
                    self._log.write(chunk)
                with contextlib.suppress(OSError):
                    os.write(terminal, COMMANDS.sub(b"?", chunk))

        self._pump = threading.Thread(target=pump, daemon=True)
        self._pump.start()
        return writer


class Reporter:
    """Prints the progress line of each step and appends its metrics to `metrics.jsonl`."""

    def __init__(self, say: Callable[..., None], folder: Path, started: float) -> None:
        self._say = say
        self._path = folder / METRICS_FILE
        self._file: IO[str] | None = None
        self._started = started

    def begin(self, step: int) -> None:
        """The run goes on after `step`: what the file has of later steps counts no more."""
        mend_lines(self._path, step)
        self._file = self._path.open("a", buffering=1)

    def step(self, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        """One finished training step; keys of verl's own use (`_…`), which it does not log either, are left out."""
        values = {key: _number(value) for key, value in metrics.items() if not key.startswith("_")}
        values |= {"seconds": values["timing_s/step"], "seconds_since_start": time.monotonic() - self._started}
        self._write({"step": step, **values})
        shown = {
            "reward": values.get("health/reward"),
            "accuracy": values.get("health/accuracy"),
            "entropy": values.get("actor/entropy"),
            "mixed groups": values.get("health/mixed_groups"),
        }
        parts = [f"{name} {value:.3f}" for name, value in shown.items() if isinstance(value, float)]
        line = f"step {step:>4}/{total}  " + "  ".join([*parts, f"{values['seconds']:.1f} s"])
        self._say(line, highlight=True)

    def validation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Metrics of a validation pass."""
        values = {key: _number(value) for key, value in metrics.items()}
        self._write({"step": step, "validation": values})
        core = [f"{key.removeprefix('val-core/')} {value:.3f}" for key, value in values.items() if _is_mean(key)]
        self._say(f"validation after step {step}  " + "  ".join(core), highlight=True)

    def end(self, step: int, metrics: Mapping[str, float]) -> None:
        """What plugins logged when training had ended."""
        if metrics:
            self._write({"step": step, "train_end": dict(metrics)})

    def note(self, text: str) -> None:
        """A sentence for the user."""
        self._say(text)

    def _write(self, record: Mapping[str, Any]) -> None:
        try:
            if self._path.stat().st_ino != os.fstat(self._file.fileno()).st_ino:
                raise FileNotFoundError(errno.ENOENT, "replaced by another file")
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise RunError(f"{self._path} cannot be written: {error.strerror}") from error


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value)


def _is_mean(key: str) -> bool:
    return key.startswith("val-core/") and "/mean@" in key
