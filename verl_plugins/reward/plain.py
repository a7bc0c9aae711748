"""Plain Math-Verify, to compare with: runs in the confined worker, as its parsers evaluate text in places."""

from __future__ import annotations

from functools import lru_cache
from typing import Any


def judge_plainly(text: str, expected: str) -> dict[str, Any]:
    """What Math-Verify says of a response and a ground truth, which may be LaTeX without dollar signs."""
    from math_verify import verify

    try:
        # Its own time-outs are signals and would stop Python code only; the pool kills.
        found = _parsed(text)
        return {"correct": bool(verify(_expected(expected), found, timeout_seconds=None))}
    except Exception as error:
        return {"correct": False, "what": f"{type(error).__name__}: {error}"[:200]}


def _parsed(text: str) -> list:
    from math_verify import parse

    return parse(text, parsing_timeout=None)


@lru_cache(maxsize=1024)
def _expected(truth: str) -> list:
    return _parsed(f"${truth}$")  # without the dollars LaTeX is read up to its first command: 2\sqrt{3} would be 2
