"""`verl-plugins data convert`: a file of questions with answers becomes parquet in verl's schema.

A row is named by its content (`extra_info.prompt_id`, a hash of the question, or the user's own id): the name means the
same prompt after rows were added and the file was converted again. Which rows are held out depends on the same hash:
a row stays on its side, and equal questions are never on both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_plugins.data.agreement import disagreements
from verl_plugins.data.report import Report, some
from verl_plugins.data.rows import Chunk, read
from verl_plugins.data.shapes import Messages, Unusable, columns_of, problem, recognise, value
from verl_plugins.data.table import EXTRA, ParquetFile, Row, array
from verl_plugins.errors import DataError, nearest

if TYPE_CHECKING:
    import pyarrow
    from rich.console import Console

CODE_SOURCES = ("codecontests", "apps", "codeforces", "taco")


@dataclass(frozen=True)
class Options:
    """What the user chose; see `verl-plugins data convert --help`."""

    shape: str | None = None
    question: str | None = None
    answer: str | None = None
    solution: str | None = None
    id: str | None = None
    keep: Sequence[str] = ()
    data_source: str | None = None
    system: str | None = None
    suffix: str | None = None
    val_to: Path | None = None
    val_fraction: float = 0.1
    skip_unanswered: bool = False
    unlabelled: bool = False
    drop_duplicates: bool = False


def convert(file: Path, to: Path, options: Options = Options(), console: Console | None = None) -> Report:
    """Convert `file` and write `to`, and `options.val_to` where it is given; each appears complete or not at all.

    `console` None shows no progress.

    Raises:
        DataError: if the file cannot be read, a column is not there, rows have no answer and are not to be left out,
            two prompts share an id, or nothing is left to write.
    """
    _check(file, to, options)
    chunks = read(file)
    first = next(chunks, None)
    if first is None:
        raise DataError(f"{file} has no rows")
    converter = _Converter(file, to, first, options)
    report = converter.report
    with ExitStack() as stack:
        train = stack.enter_context(ParquetFile(to, converter.kept))
        val = stack.enter_context(ParquetFile(options.val_to, converter.kept)) if options.val_to else None
        show = stack.enter_context(_progress(console, file))
        for chunk in (first, *chunks):
            rows, held_out = converter.convert(chunk)
            train.write(rows)
            if val is not None:
                val.write(held_out)
            show(chunk.done)
        report.train, report.val = train.count, val.count if val is not None else 0
        _check_report(report, options)
        train.keep()
        if val is not None:
            val.keep()
    return report


def _check(file: Path, to: Path, options: Options) -> None:
    outputs = {"--to": to, **({"--val-to": options.val_to} if options.val_to else {})}
    for flag, path in outputs.items():
        if path.suffix != ".parquet":
            raise DataError(f"{flag} {path}: the name must end in .parquet")
        if path.resolve() == file.resolve():
            raise DataError(f"{flag} {path} is the file that is read; give another name")
    if len({path.resolve() for path in outputs.values()}) < len(outputs):
        raise DataError(f"--val-to {options.val_to} is the file of --to as well; give another name")
    if not 0 < options.val_fraction < 1:
        raise DataError(f"--val-fraction is {options.val_fraction}: it must be between 0 and 1")
    if options.unlabelled and options.skip_unanswered:
        raise DataError("--unlabelled keeps the rows that --skip-unanswered leaves out: give one of the two")
    if options.data_source is not None:
        _check_source(options.data_source, "--data-source")


def _check_source(name: str, where: str) -> None:
    if name.startswith("numina_") or name in CODE_SOURCES:
        raise DataError(
            f"{where}: in a run where no plugin scores, verl executes what the model answers to data of the source "
            f"{name!r}; name another with --data-source"
        )


def _check_report(report: Report, options: Options) -> None:
    count = len(report.unanswered)
    if count == report.read:
        raise DataError(f"no row of {report.file} has question and answer: {some(report.unanswered)}")
    if count and not options.skip_unanswered:
        raise DataError(
            f"{count:,} of {report.read:,} rows of {report.file} have no question or answer: "
            f"{some(report.unanswered)}; correct them, leave them out with --skip-unanswered, or keep the questions "
            f"with --unlabelled"
        )
    if options.val_to and not (report.train and report.val):
        raise DataError(
            f"--val-fraction {options.val_fraction} holds out {report.val} of {report.train + report.val} rows; choose "
            "one that leaves rows on both sides"
        )


class _Converter:
    """Turns chunks of one file into rows, and remembers what must be unique over all of them."""

    def __init__(self, file: Path, to: Path, first: Chunk, options: Options) -> None:
        there = columns_of(first.rows)
        for flag, column in (("--id", options.id), *(("--keep", column) for column in options.keep)):
            if column is not None and column not in there:
                raise DataError(f"{flag} {column}: {file} has no such column{nearest(column, there)}")
        flags = {name: getattr(options, name) for name in ("shape", "question", "answer", "solution")}
        self.file, self.options = file, options
        self.columns = recognise(first.rows, file, **flags, unlabelled=options.unlabelled)
        self.kept = self._kept(first)
        """Name in `extra_info` and type of each column that is kept."""
        self.report = Report(file, to, options.val_to, self.columns, self._not_kept(there))
        self._threshold = options.val_fraction * 2**64 if options.val_to else 0
        self._answers: dict[bytes, str] = {}  # the first answer to each question
        self._taken: dict[str, tuple[int, bytes]] = {}  # row and question of each id of the user's
        self._asked: dict[str, int] = {}  # how often the prompts that were asked again were asked

    def _kept(self, first: Chunk) -> list[tuple[str, pyarrow.DataType]]:
        kept: dict[str, pyarrow.DataType] = {}
        for column in self.options.keep:
            name = column.rpartition(".")[2]
            if name in kept or name in dict(EXTRA):
                raise DataError(f"--keep {column}: extra_info has a {name!r} already; rename the column")
            kept[name] = array(column, [value(row, column) for row in first.rows]).type
        return list(kept.items())

    def _not_kept(self, there: list[str]) -> list[str]:
        used = {*self.options.keep, self.options.id, "data_source", "ability", "reward_model.style"}
        used |= {self.columns.question, self.columns.answer, self.columns.solution}
        opened = {name.partition(".")[0] for name in there if "." in name}
        return [name for name in there if name not in used | opened]

    def convert(self, chunk: Chunk) -> tuple[list[Row], list[Row]]:
        """Rows to train on and rows held out."""
        sides: tuple[list[Row], list[Row]] = ([], [])
        solved: list[tuple[int, str, str]] = []
        for number, row in zip(chunk.numbers, chunk.rows, strict=True):
            try:
                found = problem(row, self.columns, self.options.unlabelled)
            except Unusable as reason:
                self.report.unanswered.append((number, str(reason)))
                continue
            asked = "".join(f"{role}:{len(content)}:{content}" for role, content in found.messages)
            digest = hashlib.blake2b(asked.encode(), digest_size=12).digest()
            duplicate = self._is_duplicate(digest, found.answer)
            if duplicate and self.options.drop_duplicates:
                continue
            converted = Row(
                self._prompt(found.messages, number),
                found.answer,
                found.solution,
                self._prompt_id(row, number, digest, duplicate),
                self._data_source(row, number),
                str(row.get("ability") or "math"),
                [value(row, column) for column in self.options.keep],
            )
            sides[int.from_bytes(digest[:8], "big") < self._threshold].append(converted)
            self.report.first = self.report.first or found
            self.report.unlabelled += not found.answer
            if found.solution:
                solved.append((number, found.solution, found.answer))
        self.report.disagreements += disagreements(solved)
        self.report.read += len(chunk.rows)
        for side in sides:
            self._count(side)
        return sides

    def _is_duplicate(self, digest: bytes, answer: str) -> bool:
        first = self._answers.get(digest)
        if first is None:
            self._answers[digest] = answer
            return False
        self.report.duplicates += 1
        self.report.contradictions += first != answer
        return True

    def _prompt_id(self, row: dict[str, Any], number: int, digest: bytes, duplicate: bool) -> str:
        """The user's id, or the hash of the question; a question that is asked again under one id is numbered."""
        if self.options.id is None:
            return self._numbered(digest.hex()) if duplicate else digest.hex()
        given = value(row, self.options.id)
        if given is None or given == "":
            raise DataError(f"row {number} of {self.file} has no id in column {self.options.id}")
        name = str(given)
        if self._taken.get(name, (0, b""))[1] == digest:
            name = self._numbered(name)
        other, _ = self._taken.setdefault(name, (number, digest))
        if other != number:
            raise DataError(
                f"rows {other} and {number} of {self.file} have the id {name!r} but are not the same prompt; name a "
                "column of unique ids with --id, or leave --id out to name prompts by their content"
            )
        return name

    def _numbered(self, name: str) -> str:
        self._asked[name] = self._asked.get(name, 1) + 1
        return f"{name}-{self._asked[name]}"

    def _data_source(self, row: dict[str, Any], number: int) -> str:
        if self.options.data_source is not None:
            return self.options.data_source
        name = row.get("data_source")
        if not isinstance(name, str) or not name:
            return f"own/{self.columns.shape}"
        _check_source(name, f"row {number} of {self.file}")
        return name

    def _prompt(self, messages: Messages, number: int) -> Messages:
        """The messages with the texts of --system and --suffix."""
        if self.options.system is not None:
            if any(role == "system" for role, _ in messages):
                raise DataError(f"--system: row {number} of {self.file} has a system message of its own")
            messages = [("system", self.options.system), *messages]
        if self.options.suffix is not None:
            last = max(place for place, (role, _) in enumerate(messages) if role == "user")
            asked = ("user", f"{messages[last][1]}\n{self.options.suffix}")
            messages = [*messages[:last], asked, *messages[last + 1 :]]
        return messages

    def _count(self, rows: Sequence[Row]) -> None:
        report = self.report
        report.solutions += sum(row.solution is not None for row in rows)
        lengths = (sum(len(content) for _, content in row.messages) for row in rows)
        report.longest_prompt = max(report.longest_prompt, *lengths, 0)
        report.longest_answer = max(report.longest_answer, *(len(row.answer) for row in rows), 0)


@contextmanager
def _progress(console: Console | None, file: Path) -> Iterator[Callable[[float], None]]:
    """A bar that the share of the file that is done moves; on a terminal only."""
    if console is None or not console.is_terminal:
        yield lambda done: None
        return
    from rich.progress import Progress

    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"converting {file.name}", total=1.0)
        yield lambda done: progress.update(task, completed=done)
