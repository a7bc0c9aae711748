"""Rows in verl's schema, and a parquet file that appears only when it is complete."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from verl_plugins.data.shapes import Messages
from verl_plugins.errors import DataError

EXTRA = (("index", pa.int64()), ("prompt_id", pa.string()), ("solution", pa.string()))
"""`extra_info` of every file, so that several can be trained on together."""
_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
_TRUTH = pa.struct([("style", pa.string()), ("ground_truth", pa.string())])


@dataclass
class Row:
    """One row to be written."""

    messages: Messages
    answer: str
    solution: str | None
    prompt_id: str
    data_source: str
    ability: str
    kept: list[Any]
    """Values of the columns that are kept."""


class ParquetFile:
    """A parquet file of verl's schema, written under another name until `keep`; leaving the context removes that one.

    `kept` names the further keys of `extra_info`, with their types.
    """

    def __init__(self, path: Path, kept: Sequence[tuple[str, pa.DataType]] = ()) -> None:
        self.path, self.count = path, 0
        self._kept = [name for name, _ in kept]
        self._extra = pa.struct([*EXTRA, *kept])
        self._unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        self._schema = pa.schema(
            [
                ("data_source", pa.string()),
                ("prompt", pa.list_(_MESSAGE)),
                ("ability", pa.string()),
                ("reward_model", _TRUTH),
                ("extra_info", self._extra),
            ]
        )

    def __enter__(self) -> ParquetFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = pyarrow.parquet.ParquetWriter(self._unfinished, self._schema)
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()
        self._unfinished.unlink(missing_ok=True)

    def write(self, rows: Sequence[Row]) -> None:
        """Append rows, numbered on from the last."""
        messages = [message for row in rows for message in row.messages]
        ends = [0]
        for row in rows:
            ends.append(ends[-1] + len(row.messages))
        parts = [pa.array([message[place] for message in messages], pa.string()) for place in (0, 1)]
        prompts = pa.StructArray.from_arrays(parts, fields=list(_MESSAGE))
        truths = [pa.repeat("rule", len(rows)), pa.array([row.answer for row in rows], pa.string())]
        extras = [
            pa.array(range(self.count, self.count + len(rows)), pa.int64()),
            pa.array([row.prompt_id for row in rows], pa.string()),
            pa.array([row.solution for row in rows], pa.string()),
            *(self._kept_values(place, [row.kept[place] for row in rows]) for place in range(len(self._kept))),
        ]
        columns = [
            pa.array([row.data_source for row in rows], pa.string()),
            pa.ListArray.from_arrays(pa.array(ends, pa.int32()), prompts),
            pa.array([row.ability for row in rows], pa.string()),
            pa.StructArray.from_arrays(truths, fields=list(_TRUTH)),
            pa.StructArray.from_arrays(extras, fields=list(self._extra)),
        ]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema))
        self.count += len(rows)

    def _kept_values(self, place: int, values: list[Any]) -> pa.Array:
        return array(self._kept[place], values, self._extra.field(len(EXTRA) + place).type)

    def keep(self) -> None:
        """The file is complete: give it its name."""
        self._writer.close()
        os.replace(self._unfinished, self.path)


def array(name: str, values: list[Any], kind: pa.DataType | None = None) -> pa.Array:
    """Values of a kept column as Arrow has them, of type `kind` or of the one they share; nothing but None is text.

    Raises:
        DataError: if they share no type.
    """
    try:
        found = pa.array(values, kind)
    except (pa.ArrowException, UnicodeEncodeError) as error:
        reason = str(error).splitlines()[0].rstrip(". ")
        raise DataError(f"--keep {name}: the values are not all of one type that parquet has ({reason})") from error
    return found.cast(pa.string()) if pa.types.is_null(found.type) else found
