"""What a conversion did to the rows, and how it is shown."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from verl_plugins.data.agreement import Disagreement
from verl_plugins.data.shapes import Columns, Problem

if TYPE_CHECKING:
    from rich.console import Console

NAMED_ROWS = 5
"""Rows without answer that a message names."""


@dataclass
class Report:
    """What happened to the rows."""

    file: Path
    to: Path
    val_to: Path | None
    columns: Columns
    not_kept: list[str]
    """Columns of the file that are not in the result."""
    read: int = 0
    train: int = 0
    val: int = 0
    solutions: int = 0
    unanswered: list[tuple[int, str]] = field(default_factory=list)
    """Row and reason of each row left out."""
    unlabelled: int = 0
    """Rows kept without an answer."""
    duplicates: int = 0
    """Rows that ask what an earlier row asks."""
    contradictions: int = 0
    """Duplicates with another answer than the first of their kind."""
    disagreements: list[Disagreement] = field(default_factory=list)
    """Rows whose worked solution ends with another answer."""
    longest_prompt: int = 0
    """Characters, all messages together."""
    longest_answer: int = 0
    first: Problem | None = None
    """The first row with an answer."""

    def numbers(self) -> Iterator[tuple[str, int]]:
        """Every count with what it counts."""
        yield "rows read", self.read
        yield f"rows written to {self.to.name}", self.train
        if self.val_to:
            yield f"rows held out in {self.val_to.name}", self.val
        yield "rows without question or answer, left out", len(self.unanswered)
        yield "rows without answer, kept", self.unlabelled
        yield "rows that ask what an earlier row asks", self.duplicates
        yield "… and give another answer", self.contradictions
        yield "rows with a worked solution", self.solutions
        yield "… that ends with another answer", len(self.disagreements)
        yield "longest prompt, characters", self.longest_prompt
        yield "longest answer, characters", self.longest_answer

    def overrides(self) -> str:
        """What to add to `verl-plugins run` to train on the files, quoted for Hydra and the shell."""
        words = [_override("data.train_files", self.to)]
        if self.val_to:
            words.append(_override("data.val_files", self.val_to))
        return " ".join(words)


def _override(key: str, path: Path) -> str:
    plain = re.fullmatch(r"[\w/.:+%@-]+", str(path), re.ASCII)
    return shlex.quote(f"{key}={path}" if plain else f"{key}={json.dumps(str(path), ensure_ascii=False)}")


def some(unanswered: Sequence[tuple[int, str]]) -> str:
    """The first of these rows, each with its reason."""
    shown = [f"row {number} ({reason})" for number, reason in unanswered[:NAMED_ROWS]]
    more = len(unanswered) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more else "")


def print_report(report: Report, console: Console) -> None:
    """The table of counts, the first row, what was left out, and how to train on the result."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{report.file.name}: {report.columns}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for what, number in report.numbers():
        table.add_row(Text(what), f"{number:,}")
    console.print(table)
    if report.first is not None:
        lines = [f"first row: {_cut(report.first.messages[-1][1])} → {_cut(report.first.answer)}"]
    if report.unanswered:
        lines.append(f"left out: {some(report.unanswered)}")
    if report.disagreements:
        more = len(report.disagreements) - NAMED_ROWS
        shown = ", ".join(map(str, report.disagreements[:NAMED_ROWS])) + (f" and {more:,} more" if more > 0 else "")
        lines.append(f"warning: solution and answer disagree, and the answer is what is scored against: {shown}")
    if report.not_kept:
        lines.append(f"columns not kept: {', '.join(report.not_kept)} (--keep keeps one)")
    lines.append(f"to train on it: verl-plugins run RECIPE {report.overrides()}")
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def _cut(text: str, width: int = 100) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 1]}…"
