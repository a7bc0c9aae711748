"""Rows of a data file, a chunk at a time: JSON Lines, a JSON list or parquet, the first two also gzipped."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from verl_plugins.errors import DataError

LONGEST_LINE, LONGEST_LIST = 16 << 20, 1 << 30
"""Bytes of one row, and of a list that is read as a whole: small gzipped files can hold far more."""
CHUNK = 10_000
FORMATS = ".jsonl, .json, .parquet, .jsonl.gz or .json.gz"


class Chunk(NamedTuple):
    """Some consecutive rows."""

    numbers: list[int]
    """Line of each row in a .jsonl file, else its place in the file, from 1."""
    rows: list[dict[str, Any]]
    done: float
    """Share of the file that is read by now."""


def read(path: Path) -> Iterator[Chunk]:
    """The rows of the file, never an empty chunk.

    Raises:
        DataError: if there is no such file, its name has another ending, or a part of it cannot be read.
    """
    formats = {".jsonl": _json_lines, ".json": _json_list, ".parquet": _parquet}
    ending = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if ending not in formats or (path.suffix == ".gz" and ending == ".parquet"):
        raise DataError(f"{path}: the name of a data file must end in {FORMATS}")
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    try:
        yield from formats[ending](path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({_short(error)})") from error


def _json_lines(path: Path) -> Iterator[Chunk]:
    size, numbers, rows = max(1, path.stat().st_size), [], []
    with path.open("rb") as file, gzip.open(file) if path.suffix == ".gz" else file as lines:
        for number, line in enumerate(iter(lambda: lines.readline(LONGEST_LINE + 1), b""), 1):
            if len(line) > LONGEST_LINE:
                raise DataError(f"{path}, line {number} has more than {LONGEST_LINE >> 20} MiB: leave it out")
            if line.isspace():
                continue
            numbers.append(number)
            rows.append(_object(line, path, number))
            if len(rows) == CHUNK:
                yield Chunk(numbers, rows, file.tell() / size)
                numbers, rows = [], []
    if rows:
        yield Chunk(numbers, rows, 1.0)


def _object(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number} is not a JSON object ({_short(error)})") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number} is not a JSON object but a {type(row).__name__}")
    return row


def _json_list(path: Path) -> Iterator[Chunk]:
    with path.open("rb") as file, gzip.open(file) if path.suffix == ".gz" else file as content:
        try:
            text = content.read(LONGEST_LIST + 1)
            if len(text) > LONGEST_LIST:
                raise DataError(f"{path} has more than {LONGEST_LIST >> 30} GiB: write it as .jsonl, an object a line")
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            hint = "a file with one object a line must be named .jsonl"
            raise DataError(f"{path} is not a JSON list ({_short(error)}); {hint}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path} is not a JSON list of objects but a {type(rows).__name__}")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, element {number} is not a JSON object but a {type(row).__name__}")
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        yield Chunk(list(range(start + 1, start + 1 + len(part))), part, (start + len(part)) / len(rows))


def _parquet(path: Path) -> Iterator[Chunk]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            start, total = 0, file.metadata.num_rows
            for batch in file.iter_batches(CHUNK):
                rows = batch.to_pylist()
                yield Chunk(list(range(start + 1, start + 1 + len(rows))), rows, (start + len(rows)) / total)
                start += len(rows)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} cannot be read as parquet ({_short(error)})") from error


def _short(error: BaseException) -> str:
    """The first line of an error, as a part of a sentence."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
