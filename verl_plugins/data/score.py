"""`verl-plugins score`: the verdicts on a file of answers, with their reasons, and where plain Math-Verify differs."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_plugins.data.rows import read
from verl_plugins.data.shapes import columns_of, value
from verl_plugins.errors import DataError, nearest
from verl_plugins.reward.comparer import REASONS, Comparer, Scored

if TYPE_CHECKING:
    from rich.console import Console

TEXTS = ("text", "output", "response", "completion", "prediction", "generation")
TRUTHS = ("truth", "gts", "ground_truth", "reward_model.ground_truth", "gold", "target", "answer")
"""Columns that are taken where none is named; `output` and `gts` are those of verl's dumps."""
REWARDED = "rewarded by Math-Verify only"
LOST = "lost by Math-Verify only"
WIDTH = 48


@dataclass(frozen=True)
class Row:
    """One answer."""

    number: int
    """Line of the file, or place in it, from 1."""
    text: str
    truth: Any
    verdict: Scored
    math_verify: bool

    @property
    def disagreement(self) -> str:
        """How plain Math-Verify differs, "" if it does not."""
        if self.math_verify == self.verdict.correct:
            return ""
        return REWARDED if self.math_verify else LOST

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        verdict = {"score": self.verdict.score, "correct": self.verdict.correct, "reason": self.verdict.reason}
        said = {"answer": self.verdict.answer, "truth": self.truth, "what": self.verdict.what}
        return {"row": self.number, **verdict, **said, "math_verify": self.math_verify, "label": self.disagreement}


@dataclass(frozen=True)
class Scores:
    """The verdicts on a file."""

    file: Path
    rows: Sequence[Row]

    def shares(self) -> dict[str, int]:
        """How many have each reason."""
        count = collections.Counter(row.verdict.reason for row in self.rows)
        return {reason: count[reason] for reason in REASONS}

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        right = sum(row.verdict.correct for row in self.rows)
        labels = collections.Counter(row.disagreement for row in self.rows)
        return {
            "file": str(self.file),
            "answers": len(self.rows),
            "accuracy": right / len(self.rows),
            "reasons": self.shares(),
            "disagreement": {label: labels[label] for label in (REWARDED, LOST)},
            "rows": [row.plain() for row in self.rows],
        }


def score(
    file: Path, text: str | None = None, truth: str | None = None, workers: int = 4, deadline: float = 5.0
) -> Scores:
    """Score every row of a file, or of all .jsonl files of a folder, as verl dumps them.

    Raises:
        DataError: if the file cannot be read, a column is not there, a text is no text, or no row has a ground truth.
        PluginError: if the processes that compare cannot be started.
    """
    rows = list(_rows(file))
    if not rows:
        raise DataError(f"{file} has no rows")
    there = columns_of(row for _, row in rows)
    text = _column(file, there, "--text", text, TEXTS)
    truth = _column(file, there, "--truth", truth, tuple(name for name in TRUTHS if name != text))
    pairs = [(number, value(row, text), value(row, truth)) for number, row in rows]
    for number, response, _ in pairs:
        if not isinstance(response, str):
            raise DataError(f"row {number} of {file}: column {text} holds a {type(response).__name__}, not text")
    comparer = Comparer(workers, deadline)
    try:
        with ThreadPoolExecutor(workers) as threads:
            scored = list(threads.map(lambda pair: _scored(comparer, *pair), pairs))
    finally:
        comparer.pool.close()
    if all(row.verdict.reason == "no ground truth" for row in scored):
        raise DataError(f"no row of {file} has a ground truth in column {truth}: name the one that has with --truth")
    return Scores(file, scored)


def _scored(comparer: Comparer, number: int, text: str, truth: Any) -> Row:
    return Row(number, text, truth, comparer.verify(text, truth), truth is not None and comparer.plainly(text, truth))


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    files = sorted(file.glob("*.jsonl"), key=lambda path: (len(path.name), path.name)) if file.is_dir() else [file]
    if not files:
        raise DataError(f"{file} is a folder without .jsonl files; a run writes some with trainer.rollout_data_dir")
    for path in files:
        for chunk in read(path):
            yield from zip(chunk.numbers, chunk.rows, strict=True)


def _column(file: Path, there: list[str], flag: str, name: str | None, usual: Sequence[str]) -> str:
    if name is not None:
        if name not in there:
            raise DataError(f"{flag} {name}: {file} has no such column{nearest(name, there)}")
        return name
    found = next((usually for usually in usual if usually in there), None)
    if found is None:
        raise DataError(f"{file} has columns {', '.join(there)}, none of them {', '.join(usual)}: name one with {flag}")
    return found


def print_scores(scores: Scores, console: Console, shown: int) -> None:
    """The reasons with their shares, and the rows to look at: disagreements first, then what was not understood."""
    from rich.table import Table
    from rich.text import Text

    data, total = scores.plain(), len(scores.rows)
    table = Table(title=f"{total:,} answers, {data['accuracy']:.1%} right", title_justify="left")
    table.add_column("reason")
    for head in ("answers", "share"):
        table.add_column(head, justify="right")
    for reason, count in {**data["reasons"], **data["disagreement"]}.items():
        table.add_row(reason, f"{count:,}", f"{count / total:.1%}")
    console.print(table)
    odd = [row for row in scores.rows if row.disagreement]
    odd += [row for row in scores.rows if not row.disagreement and row.verdict.what]
    if not odd or not shown:
        return
    table = Table(title=f"rows to look at, {min(shown, len(odd))} of {len(odd)}", title_justify="left")
    for head in ("row", "answer", "truth", "reason", "Math-Verify"):
        table.add_column(head)
    for row in odd[:shown]:
        reason = row.verdict.reason + (f": {row.verdict.what}" if row.verdict.what else "")
        cells = (str(row.number), row.verdict.answer, str(row.truth), reason, "right" if row.math_verify else "wrong")
        table.add_row(*(Text(_shown(cell)) for cell in cells))
    console.print(table)


def _shown(text: str) -> str:
    """Text of a model on one line, without signs that a terminal obeys."""
    line = "".join(sign if sign.isprintable() else "�" for sign in " ".join(text.split()))
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"
