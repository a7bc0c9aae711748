"""What the workers of a `Comparer` do: compare an answer with the truth, by our rules or as plain Math-Verify would."""

from __future__ import annotations

from typing import Any

from verl_plugins.reward.compare import judge
from verl_plugins.reward.plain import judge_plainly
from verl_plugins.reward.verifier import Answer

WARM_UP = (("12.5", "13"), (r"\frac{1}{2}", "0.4"), (r"\sqrt{3}x+1", r"x^2"), (r"\{1,2\}", r"(2,3)"), ("x>2", "x<y"))
WARM_UP += ((r"\sum_{k=1}^n k", r"\ln 2"), ("5 km", "3"), (r"\sin x", r"\pi"), ("5-2i", "2+i"), ("|x|>3", "x^2<4"))
"""Answers and truths compared before the first fork: regular expressions and parser tables are built on first use."""


def load() -> Answer:
    """The function that answers requests, with what it builds on first use."""
    for answer, truth in WARM_UP:
        judge(answer, truth)
        judge_plainly(f"${answer}$", truth)
    judge_plainly(r"\boxed{(x-1)(x+1)}", "x^2-1")
    return _judge


def _judge(request: dict[str, Any]) -> dict[str, Any]:
    return judge_plainly(**request) if "text" in request else judge(**request)
