"""A bounded memory of responses by prompt and outcome: what methods that replay answers keep between steps.

Per prompt, and apart for right and wrong ones, the newest `capacity` responses are kept: token ids and the log-probs of
the policy that generated them. It is saved as arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from verl_plugins.errors import StateError

FACTS = {"prompt_id": np.int64, "correct": np.bool_, "step": np.int64, "reward": np.float64}
"""What is known of each entry besides its tokens."""
TOKENS = {"tokens": np.int32, "log_probs": np.float32}


@dataclass(frozen=True)
class Entry:
    """One stored response."""

    response: np.ndarray
    """[n] int32 token ids."""
    log_probs: np.ndarray
    """[n] float32 log-probs under the policy that generated it."""


class ReplayStore:
    """Entries have numbers that grow with every response stored.

    Args:
        capacity: entries kept per prompt and outcome.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.facts = pd.DataFrame({name: np.zeros(0, dtype) for name, dtype in FACTS.items()})
        """One row per entry, in ascending order of its number, which is the index."""
        self._entries: dict[int, Entry] = {}
        self._stored = 0

    def __len__(self) -> int:
        return len(self.facts)

    def __getitem__(self, number: int) -> Entry:
        return self._entries[number]

    def add(
        self,
        step: int,
        prompt_id: np.ndarray,
        correct: np.ndarray,
        reward: np.ndarray,
        entries: Sequence[Entry],
    ) -> None:
        """Store k responses of one step, and forget the oldest beyond the capacity."""
        numbers = np.arange(self._stored, self._stored + len(entries))
        new = pd.DataFrame(
            {"prompt_id": prompt_id, "correct": correct, "step": step, "reward": reward}, index=numbers
        ).astype(FACTS)
        self._stored += len(entries)
        self._entries |= dict(zip(numbers.tolist(), entries, strict=True))
        facts = pd.concat([self.facts, new])
        place = facts.groupby(["prompt_id", "correct"]).cumcount(ascending=False)
        self.facts = facts[place < self.capacity]
        for number in facts.index[place >= self.capacity].tolist():
            del self._entries[number]

    def pick(
        self, prompt_id: np.ndarray, correct: np.ndarray, limit: np.ndarray, rng: np.random.Generator | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """For each of g wishes up to `limit` [g] entries of a prompt with an outcome.

        Args:
            prompt_id: [g] prompts; one may be wished for several times.
            correct: [g] bool outcomes.
            limit: [g] how many at most.
            rng: draws without replacement; without it the newest come first.

        Returns:
            [m] places among the wishes, ascending, and [m] numbers of entries.
        """
        wishes = pd.DataFrame({"prompt_id": prompt_id, "correct": np.asarray(correct, bool), "limit": limit})
        wishes["wish"] = np.arange(len(wishes))
        found = wishes.merge(self.facts.reset_index(names="number"), on=["prompt_id", "correct"])
        found["order"] = -found["number"] if rng is None else rng.random(len(found))
        found = found.sort_values(["wish", "order"])
        found = found[found.groupby("wish").cumcount() < found["limit"]]
        return found["wish"].to_numpy(), found["number"].to_numpy()

    def state_dict(self) -> dict[str, Any]:
        """Arrays: the facts, and all tokens one after the other."""
        entries = [self._entries[number] for number in self.facts.index.tolist()]
        facts = {name: self.facts[name].to_numpy(copy=True) for name in FACTS}
        return facts | {
            "number": self.facts.index.to_numpy(np.int64, copy=True),
            "stored": self._stored,
            "length": np.array([len(entry.response) for entry in entries], np.int64),
            "tokens": _joined([entry.response for entry in entries], TOKENS["tokens"]),
            "log_probs": _joined([entry.log_probs for entry in entries], TOKENS["log_probs"]),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises StateError if the arrays do not fit each other."""
        lengths = np.asarray(state["length"], np.int64)
        if not lengths.sum() == len(state["tokens"]) == len(state["log_probs"]):
            raise StateError(
                f"replay store: {len(state['tokens'])} tokens and {len(state['log_probs'])} log-probs are saved, "
                f"{lengths.sum()} belong to its {len(lengths)} responses"
            )
        numbers = np.asarray(state["number"], np.int64)
        self.facts = pd.DataFrame({name: np.asarray(state[name], dtype) for name, dtype in FACTS.items()}, numbers)
        ends = np.cumsum(lengths)[:-1]
        parts = (np.split(np.array(state[name], dtype), ends) for name, dtype in TOKENS.items())
        self._entries = {number: Entry(*one) for number, *one in zip(numbers.tolist(), *parts, strict=False)}
        self._stored = int(state["stored"])


def _joined(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)
