"""Memories that methods keep between steps: of responses by prompt and outcome, and of rows still to be trained on.

`ReplayStore` has per prompt, and apart for right and wrong ones, the newest `capacity` responses: token ids and the
log-probs of the policy that generated them. `RowStore` has rows with all that training on them needs, until they are
taken or too old. Both are saved as arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import TYPE_CHECKING, Any

import numpy as np

from verl_plugins.errors import StateError
from verl_plugins.tokens import row_number

if TYPE_CHECKING:
    from torch import Tensor

    from verl_plugins.batch import Batch

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


@dataclass(frozen=True)
class StoredRow:
    """A row of an earlier step, all of whose tokens are the policy's: `batch.bring_back` trains on it."""

    uid: str
    """The draw of its prompt."""
    step: int
    """In which it was rolled out."""
    context: np.ndarray
    """[m] token ids of its prompt, and of what of the response stands before it."""
    offset: int
    """How many of these are the response's."""
    response: np.ndarray
    """[n] token ids."""
    old_log_probs: np.ndarray
    """[n] under the policy of that step, before its update."""
    reward: float
    correct: bool
    truncated: bool
    columns: Mapping[str, float] = field(default_factory=dict)
    """Its values of what is put for the rows of a step in `select_rows`."""

    @property
    def prompt_id(self) -> int:
        return int(self.uid.split("-", 1)[0])


ROW_FACTS = {"prompt_id": np.int64, "row": np.int64, "step": np.int64, "offset": np.int64}
ROW_FACTS |= {"reward": np.float64, "correct": np.bool_, "truncated": np.bool_}
"""What is known of each row besides its tokens; `row` is the number of its key."""
ROW_TOKENS = {"context": np.int32, "response": np.int32, "old_log_probs": np.float32}


class RowStore:
    """Rows wait here for the step in which they are trained on.

    Args:
        columns: names of numbers of the method's own that are kept with each row.
    """

    def __init__(self, columns: Sequence[str] = ()) -> None:
        self._columns = tuple(columns)
        kinds = ROW_FACTS | dict.fromkeys(self._columns, np.float64)
        self.facts = {name: np.zeros(0, dtype) for name, dtype in kinds.items()}
        """[rows] arrays by name: of steps in their order, and within a step by key."""
        self._held: dict[str, list[Any]] = {name: [] for name in ("uid", *ROW_TOKENS)}

    def __len__(self) -> int:
        return len(self.facts["row"])

    def add(
        self,
        batch: Batch,
        rows: np.ndarray,
        step: int,
        old_log_probs: Sequence[Tensor],
        columns: Mapping[str, np.ndarray],
    ) -> None:
        """Keep k rows of a step's batch, all of whose tokens are the policy's.

        Args:
            batch: the rows with their rewards.
            rows: [k] their places in it.
            step: the training step.
            old_log_probs: of each, [n] under the policy before the step's update.
            columns: [k] each.
        """
        order = np.argsort(np.asarray(batch.keys, dtype=object)[rows])
        places = rows[order].tolist()
        known = {
            "prompt_id": batch.prompt_id,
            "row": row_numbers(batch),
            "step": np.full(len(batch), step),
            "offset": batch.offsets,
            "reward": batch.scores,
            "correct": batch.correct,
            "truncated": batch.truncated,
        }
        facts = {name: np.asarray(values)[places] for name, values in known.items()}
        facts |= {name: np.asarray(columns[name])[order] for name in self._columns}
        prompts, ends, lengths = batch.extra("prompts"), batch.prompt_lengths.tolist(), batch.lengths.tolist()
        held = {
            "uid": batch.uid[places].tolist(),
            "context": [prompts[row, : ends[row]].numpy() for row in places],
            "response": [batch.responses[row, : lengths[row]].numpy() for row in places],
            "old_log_probs": [old_log_probs[place].detach().numpy() for place in order.tolist()],
        }
        self.facts = {name: np.append(old, facts[name]).astype(old.dtype) for name, old in self.facts.items()}
        self._held = {name: [*old, *_own(held[name], name)] for name, old in self._held.items()}

    def forget(self, before: int) -> int:
        """Leave out rows of steps before this one; how many these were."""
        stale = self.facts["step"] < before
        self._keep(~stale)
        return int(stale.sum())

    def take(self, rows: np.ndarray) -> list[StoredRow]:
        """[rows of the store] bool -> these rows in their order, which then are no longer here."""
        places = np.flatnonzero(rows).tolist()
        taken = [self._row(place) for place in places]
        self._keep(~np.asarray(rows, bool))
        return taken

    def _row(self, place: int) -> StoredRow:
        held = {name: values[place] for name, values in self._held.items()}
        facts = {name: values[place].item() for name, values in self.facts.items() if name not in ("row", "prompt_id")}
        columns = {name: facts.pop(name) for name in self._columns}
        return StoredRow(**held, **facts, columns=columns)

    def _keep(self, rows: np.ndarray) -> None:
        self.facts = {name: values[rows] for name, values in self.facts.items()}
        self._held = {name: [*compress(values, rows)] for name, values in self._held.items()}

    def state_dict(self) -> dict[str, Any]:
        """Arrays: the facts, all tokens one after the other and how many each row has; and the uids."""
        joined = {name: np.concatenate([np.zeros(0, kind), *self._held[name]]) for name, kind in ROW_TOKENS.items()}
        lengths = {f"{name}_length": _lengths(self._held[name]) for name in ("context", "response")}
        return {**self.facts, **joined, **lengths, "uid": self._held["uid"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises StateError if the parts do not fit each other."""
        lengths = {name: np.asarray(state[f"{name}_length"], np.int64) for name in ("context", "response")}
        lengths["old_log_probs"] = lengths["response"]
        rows = len(state["row"])
        for name in ROW_TOKENS:
            if len(lengths[name]) != rows or lengths[name].sum() != len(state[name]):
                raise StateError(
                    f"row store: {len(state[name])} values of {name} are saved, and {lengths[name].sum()} belong to "
                    f"{len(lengths[name])} of its {rows} rows"
                )
        for name in [name for name in (*self.facts, "uid") if len(state[name]) != rows]:
            raise StateError(f"row store: {len(state[name])} values of {name} are saved for {rows} rows")
        self.facts = {name: np.array(state[name], values.dtype) for name, values in self.facts.items()}
        parts = {
            name: np.split(np.array(state[name], kind), np.cumsum(lengths[name])[:-1])[:rows]
            for name, kind in ROW_TOKENS.items()
        }
        self._held = {"uid": list(state["uid"])} | {name: _own(values, name) for name, values in parts.items()}


def row_numbers(batch: Batch) -> np.ndarray:
    """[B] int64: who each row is, by its key."""
    return np.array([row_number(key) for key in batch.keys], dtype=np.int64)


def chances(rows: np.ndarray, salt: int | np.ndarray) -> np.ndarray:
    """[k] numbers of rows -> [k] float64 in [0, 1): for a row and a salt the same, whatever rows stand beside it.

    The mixing of splitmix64, started at `row` + `salt` times its increment.
    """
    salts = np.atleast_1d(salt).astype(np.uint64)
    mixed = np.asarray(rows).astype(np.uint64) + salts * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def _lengths(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([len(one) for one in arrays], np.int64)


def _own(values: Sequence[Any], name: str) -> list[Any]:
    """Token ids and log-probs as arrays of their own, in the type that is saved."""
    return [np.array(one, ROW_TOKENS[name]) for one in values] if name in ROW_TOKENS else list(values)
