"""Rows and fields of verl's TransferQueue as the source of a `Batch`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import transfer_queue as tq
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.workers.utils.padding import response_to_nested

LENGTH_OF = {"response_lengths": "responses", "prompt_lengths": "prompts"}
"""Fields read off another field's lengths."""


def is_padding(key: str) -> bool:
    """Whether verl made this row up to fill the batch."""
    return key.startswith("pad")


def prompt_uid(prompt_id: int, step: int, draw: int) -> str:
    """The uid of one draw of a prompt; unique over the run, the same in a resumed run, and it names the prompt."""
    return f"{prompt_id}-{step}-{draw}"


def prompt_id_of(key: str) -> int:
    """The dataset row behind a uid or row key."""
    return int(key.split("-", 1)[0])


class QueueSource:
    """Fields of some rows of the queue, fetched one by one; padded on the right with zeros."""

    def __init__(self, keys: Sequence[str], partition: str, known: Mapping[str, Any] | None = None) -> None:
        self.keys = list(keys)
        self._partition = partition
        self._known = dict(known or {})

    def fetch(self, name: str) -> Any:
        if name not in self._known:
            self.prefetch([name])
        return self._known[name]

    def prefetch(self, names: Iterable[str]) -> None:
        """Fetch several fields in one message; all of them exist, or KeyError."""
        stored = {LENGTH_OF.get(name, name) for name in names} - self._known.keys()
        if not stored:
            return
        data = tq.kv_batch_get(keys=self.keys, partition_id=self._partition, select_fields=sorted(stored))
        for name in stored:
            self._known[name] = _plain(data[name])
        for name in [name for name, field in LENGTH_OF.items() if field in stored]:
            value = data[LENGTH_OF[name]]
            lengths = value.offsets().diff() if value.is_nested else torch.full((len(value),), value.shape[1])
            self._known[name] = lengths


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to_padded_tensor(0) if value.is_nested else value
    return value.tolist() if hasattr(value, "tolist") else list(value)


def write_fields(meta: KVBatchMeta, rows: Tensor, fields: Mapping[str, Tensor], response_mask: Tensor) -> KVBatchMeta:
    """Store fields ([rows] or [rows,T] of the real rows) for all keys of `meta`; padding rows get zeros.

    Args:
        meta: the batch, padding rows included.
        rows: positions of the real rows in `meta.keys`.
        fields: new columns.
        response_mask: nested [all rows, response length], the layout of token-level fields.

    Returns:
        The meta data to pass on: with the old one the new fields do not reach the workers.
    """
    columns = {}
    for name, values in fields.items():
        whole = values.new_zeros((len(meta.keys), *values.shape[1:]))
        whole[rows] = values
        columns[name] = response_to_nested(whole, response_mask) if values.dim() == 2 else whole
    table = TensorDict(columns, batch_size=len(meta.keys))
    return tq.kv_batch_put(keys=meta.keys, partition_id=meta.partition_id, fields=table)
