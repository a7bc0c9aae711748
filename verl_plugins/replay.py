"""A bounded memory of responses by prompt and outcome: what methods that replay answers keep between steps.

Per prompt, and apart for right and wrong ones, the newest `capacity` responses are kept: token ids and the log-probs of
the policy that generated them. It is saved as arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from verl_plugins.errors import StateError

FACTS = {"number": np.int64, "prompt_id": np.int64, "correct": np.bool_, "step": np.int64, "reward": np.float64}
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
        self.facts = {name: np.zeros(0, dtype) for name, dtype in FACTS.items()}
        """[entries] arrays by name, in ascending order of `number`."""
        self._entries: dict[int, Entry] = {}
        self._stored = 0

    def __len__(self) -> int:
        return len(self.facts["number"])

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
        self._stored += len(entries)
        self._entries |= dict(zip(numbers.tolist(), entries, strict=True))
        new = (numbers, prompt_id, correct, np.full(len(entries), step), reward)
        facts = {
            name: np.concatenate([self.facts[name], values]).astype(dtype)
            for (name, dtype), values in zip(FACTS.items(), new, strict=True)
        }
        kinds = _kind(facts["prompt_id"], facts["correct"])
        order = np.lexsort((-facts["number"], kinds))
        kept = np.zeros(len(order), dtype=bool)
        kept[order] = _place_in_run(kinds[order]) < self.capacity
        for number in facts["number"][~kept].tolist():
            del self._entries[number]
        self.facts = {name: values[kept] for name, values in facts.items()}

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
            [m] places among the wishes, ascending, and [m] places of entries in `facts`.
        """
        kinds, wanted = _kind(self.facts["prompt_id"], self.facts["correct"]), _kind(prompt_id, correct)
        order = np.lexsort((-self.facts["number"] if rng is None else rng.random(len(self)), kinds))
        first, end = (np.searchsorted(kinds[order], wanted, side) for side in ("left", "right"))
        count = np.minimum(end - first, limit).astype(np.int64)
        wish = np.repeat(np.arange(len(wanted)), count)
        return wish, order[first[wish] + _place_in_run(wish)]

    def state_dict(self) -> dict[str, Any]:
        """Arrays: the facts, and all tokens one after the other."""
        entries = [self._entries[number] for number in self.facts["number"].tolist()]
        parts = {"tokens": [entry.response for entry in entries], "log_probs": [entry.log_probs for entry in entries]}
        joined = {name: np.concatenate([np.zeros(0, TOKENS[name]), *rows]) for name, rows in parts.items()}
        lengths = np.array([len(entry.response) for entry in entries], np.int64)
        return {**self.facts, **joined, "length": lengths, "stored": self._stored}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises StateError if the arrays do not fit each other."""
        lengths = np.asarray(state["length"], np.int64)
        if not lengths.sum() == len(state["tokens"]) == len(state["log_probs"]):
            raise StateError(
                f"replay store: {len(state['tokens'])} tokens and {len(state['log_probs'])} log-probs are saved, "
                f"{lengths.sum()} belong to its {len(lengths)} responses"
            )
        self.facts = {name: np.array(state[name], dtype) for name, dtype in FACTS.items()}
        ends = np.cumsum(lengths)[:-1]
        parts = (np.split(np.array(state[name], dtype), ends) for name, dtype in TOKENS.items())
        self._entries = {
            number: Entry(*one) for number, *one in zip(self.facts["number"].tolist(), *parts, strict=False)
        }
        self._stored = int(state["stored"])


def _kind(prompt_id: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """[k] one number per prompt and outcome."""
    return np.asarray(prompt_id, np.int64) * 2 + np.asarray(correct, np.int64)


def _place_in_run(labels: np.ndarray) -> np.ndarray:
    """[k] labels, equal ones next to each other -> [k] 0, 1, … within each run."""
    begins = np.ones(len(labels), dtype=bool)
    begins[1:] = labels[1:] != labels[:-1]
    starts = np.flatnonzero(begins)
    return np.arange(len(labels)) - np.repeat(starts, np.diff(np.append(starts, len(labels))))
