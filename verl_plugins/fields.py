"""Where the fields of a batch come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol


class Source(Protocol):
    """Where a batch's fields come from: the queue in training, plain tensors in tests."""

    keys: list[str]
    """`<uid>_<session>_<turn>` of each row."""

    def fetch(self, name: str) -> Any:
        """Field `name`: a tensor [B,…] or a list [B]; KeyError when there is no such field."""

    def prefetch(self, names: Iterable[str]) -> None:
        """Make ready what `fetch` will be asked for."""


class TensorSource:
    """Fields held in memory."""

    def __init__(self, keys: Sequence[str], fields: Mapping[str, Any]) -> None:
        self.keys = list(keys)
        self.fields = dict(fields)

    def fetch(self, name: str) -> Any:
        return self.fields[name]

    def prefetch(self, names: Iterable[str]) -> None:
        """Nothing to do."""
