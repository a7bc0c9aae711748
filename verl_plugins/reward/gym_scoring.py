"""What the workers of the plugin `reasoning_gym` do: ask the scorer of a task what it says of an answer."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from verl_plugins.reward.gym_entries import from_text
from verl_plugins.reward.verifier import Answer


def load() -> Answer:
    """The function that answers requests; importing the library takes seconds."""
    from reasoning_gym.factory import DATASETS, get_score_answer_fn

    scorer_of = lru_cache(maxsize=None)(get_score_answer_fn)

    def score(request: dict[str, Any]) -> dict[str, Any]:
        task, entry = request["task"], from_text(request["entry"])
        if task not in DATASETS:
            return {"score": 0.0, "what": f"reasoning-gym has no task {task!r}"}
        try:
            return {"score": float(scorer_of(task)(request["answer"], entry))}
        except Exception as error:  # a scorer may raise anything at what a model wrote
            return {"score": 0.0, "what": f"{type(error).__name__}: {error}"[:300]}

    return score
