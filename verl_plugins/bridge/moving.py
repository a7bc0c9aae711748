"""Parameters at other values for as long as something is looked at there. Nothing here imports verl."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor


@contextmanager
def moved(parameters: Sequence[Tensor], at: Iterable[Tensor] | None) -> Iterator[None]:
    """The parameters have other values inside, and afterwards those they had, to the last bit."""
    if at is None:
        yield
        return
    kept = [parameter.clone() for parameter in parameters]
    try:
        for parameter, value in zip(parameters, at, strict=True):
            parameter.copy_(value)
        yield
    finally:
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
