"""How a look puts things: errors of others as a part of a sentence, rows by their numbers."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 5
"""Rows that are named; the others are counted."""


def short(error: object) -> str:
    """An error of a library as a part of a sentence: its first line, without full stops."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text.rstrip(". ").replace(". ", "; ")[:200]


def rows(numbers: Sequence[int]) -> str:
    """`row 3`, `rows 3, 4`, `rows 3, 4, 7, 8, 9 and 12 others`."""
    shown = ", ".join(map(str, numbers[:SHOWN]))
    more = f" and {len(numbers) - SHOWN} others" if len(numbers) > SHOWN else ""
    return f"row{'s' if len(numbers) > 1 else ''} {shown}{more}"
