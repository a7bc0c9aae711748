"""Worked solutions that end with another answer than the one beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from verl_plugins.reward.comparer import verify_all
from verl_plugins.reward.final_answer import marked_answer


class Disagreement(NamedTuple):
    """A row whose solution marks another answer as final."""

    row: int
    solution: str
    """What the solution says."""
    answer: str
    """What the row says."""

    def __str__(self) -> str:
        return f"row {self.row} (solution {self.solution[:40]!r}, answer {self.answer[:40]!r})"


def disagreements(rows: Sequence[tuple[int, str, str]]) -> list[Disagreement]:
    """The rows, as (number, solution, answer), whose solution marks an answer that is not the row's.

    A solution that marks nothing says nothing, and what cannot be compared is no disagreement.

    Raises:
        PluginError: the processes that compare cannot be started.
    """
    marked = [(number, *marked_answer(solution), answer) for number, solution, answer in rows]
    said = [(number, given, answer) for number, found, given, answer in marked if found and given and given != answer]
    verdicts = verify_all((rf"\boxed{{{given}}}", answer) for _, given, answer in said) if said else []
    return [Disagreement(*row) for row, verdict in zip(said, verdicts, strict=True) if verdict.reason == "not equal"]
