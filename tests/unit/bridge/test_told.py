"""How a run ends is told in one line, with an exit code of its own."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from verl_plugins.bridge.ending import Interrupted, Signals
from verl_plugins.bridge.launch import _told
from verl_plugins.errors import RunError


class Terminal:
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (Interrupted(signal.SIGINT), 130, "^C: the run has ended"),
        (Interrupted(signal.SIGHUP), 129, "SIGHUP: the run has ended"),
        (KeyboardInterrupt(), 130, "interrupted: the run has ended"),
        (SystemExit(15), 143, "SIGTERM: the run has ended"),  # what Ray makes of SIGTERM while it starts
        (SystemExit(3), 1, "error: training stopped (SystemExit: 3)"),
        (RunError("no paper"), 1, "error: no paper"),
    ],
)
def test_exit_code_and_sentence(tmp_path: Path, error: BaseException, code: int, said: str) -> None:
    def run() -> None:
        raise error

    terminal = Terminal()
    assert _told(terminal, tmp_path, Signals(terminal.say), run) == code
    assert terminal.lines[0] == said and len(terminal.lines) == 2


def test_a_folder_that_is_gone_is_the_cause(tmp_path: Path) -> None:
    def run() -> None:
        raise ValueError("cannot write")

    terminal = Terminal()
    assert _told(terminal, tmp_path / "gone", Signals(terminal.say), run) == 1
    assert "was deleted or moved" in terminal.lines[0]
