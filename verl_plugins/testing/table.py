"""The rows of a step in a training that `check_plugin` invents, as the queue would have them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from verl_plugins.fields import Addition
from verl_plugins.replay import StoredRow
from verl_plugins.testing.fakes import plausible

PROMPT_FIELDS = ("prompts", "prompt_log_probs")
"""Fields whose second dimension is the prompt's, not the response's."""


class Table:
    """The rows of a step: columns by name, tensors [B,…] or lists [B]."""

    def __init__(self, keys: Sequence[str], columns: Mapping[str, Any]) -> None:
        self.keys, self.columns = list(keys), dict(columns)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def width(self) -> int:
        """T of the token-level columns."""
        return self.columns["response_mask"].shape[1]

    def rows(self, rows: Sequence[int]) -> Table:
        """Some of the rows, in the order given."""
        pick = lambda column: column[list(rows)] if isinstance(column, Tensor) else [column[row] for row in rows]  # noqa: E731
        return Table(pick(self.keys), {name: pick(column) for name, column in self.columns.items()})

    def shuffled(self, seed: int) -> Table:
        return self.rows(np.random.default_rng([seed, 11]).permutation(len(self)).tolist())

    def is_token_level(self, name: str) -> bool:
        column = self.columns[name]
        return isinstance(column, Tensor) and column.dim() == 2 and name not in PROMPT_FIELDS

    def as_wide_as(self, width: int) -> Table:
        """Token-level columns padded with zeros, or cut, to `width` tokens."""
        sized = {
            name: torch.nn.functional.pad(column, (0, width - self.width))
            for name, column in self.columns.items()
            if self.is_token_level(name)
        }
        return self.with_columns(sized)

    def with_padding_rows(self, count: int) -> Table:
        """Rows of zeros with an empty mask at the end, as verl makes them; lists repeat their first entry."""

        def longer(column: Any) -> Any:
            if isinstance(column, Tensor):
                return torch.cat([column, column.new_zeros(count, *column.shape[1:])])
            return [*column, *[column[0]] * count]

        names = [*self.keys, *[f"pad{row}_0_0" for row in range(count)]]
        columns = {name: longer(column) for name, column in self.columns.items()}
        return Table(names, columns | {"uid": uids(names)})

    def disturbed(self, names: Sequence[str]) -> Table:
        """Other values of float columns at tokens of the response that the policy did not generate."""
        lengths = self.columns["response_lengths"][:, None]
        foreign = (torch.arange(self.width) < lengths) & ~self.columns["response_mask"].bool()
        changed = {
            name: torch.where(foreign, self.columns[name] - 3.0, self.columns[name])
            for name in names
            if name in self.columns
        }
        return self.with_columns(changed)

    def with_additions(self, additions: Sequence[Addition], dataset: Callable[[int], Mapping[str, Any]]) -> Table:
        """The rows that `select_rows` added or brought back, at the end; of what they share, as rows of their groups.

        Those of earlier steps have their context, old log-probs and columns, and what `dataset` has of their prompt.
        """
        if not additions:
            return self
        ids = [torch.as_tensor(addition.response).long() for addition in additions]
        policy = [plausible(row) for row in ids]
        last = [torch.zeros(len(row)).index_fill_(0, torch.tensor(len(row) - 1), 1.0) for row in ids]
        known = [addition.rollout_log_probs for addition in additions]
        rollout = [old if own is None else torch.as_tensor(own) for own, old in zip(known, policy, strict=True)]
        before = [old if new.past is None else own for new, own, old in zip(additions, rollout, policy, strict=True)]
        of_tokens = {
            "responses": ids,
            "response_mask": [torch.ones_like(row) for row in ids],
            "rm_scores": [row * addition.reward for row, addition in zip(last, additions, strict=True)],
            "rollout_log_probs": rollout,
            "old_log_probs": before,
            **dict.fromkeys(("log_probs", "ref_log_prob"), policy),
            **dict.fromkeys(("entropy", "current_entropy"), [-row for row in policy]),
        }
        prompts = self.columns["prompts"]
        longest = max(0 if addition.past is None else len(addition.past.context) for addition in additions)
        widened = torch.nn.functional.pad(prompts, (0, max(0, longest - prompts.shape[1])))
        old = self.as_wide_as(max(self.width, *map(len, ids))).with_columns({"prompts": widened})
        wide = [torch.zeros(old.width)]
        keys = [addition.key for addition in additions]
        new = old.rows([addition.like for addition in additions]).with_columns(
            {name: pad([*rows, *wide])[:-1].to(rows[0].dtype) for name, rows in of_tokens.items()}
            | {
                "uid": uids(keys),
                "response_lengths": torch.tensor([len(row) for row in ids]),
                "verdict": torch.tensor([float(addition.correct) for addition in additions]),
                "extra_fields": [{"reward_extra_info": {"acc": float(addition.correct)}} for addition in additions],
            }
        )
        for place, addition in enumerate(additions):
            if addition.past is not None:
                new._become(place, addition.past, dataset(addition.past.prompt_id))
        join = lambda one, two: torch.cat([one, two]) if isinstance(one, Tensor) else [*one, *two]  # noqa: E731
        return Table(
            [*self.keys, *keys], {name: join(column, new.columns[name]) for name, column in old.columns.items()}
        )

    def _become(self, row: int, past: StoredRow, prompt: Mapping[str, Any]) -> None:
        """Write a row of an earlier step into the columns that are not of its response's tokens."""
        size = len(past.context)
        own = {"prompt_lengths": size, "__offset__": past.offset, "__truncated__": past.truncated}
        own |= {**prompt, **past.columns}
        for name, value in own.items():
            if name in self.columns:
                self.columns[name][row] = value
        self.columns["prompts"][row] = 0
        self.columns["prompts"][row, :size] = torch.as_tensor(past.context)

    def with_columns(self, columns: Mapping[str, Any]) -> Table:
        """Columns added or replaced."""
        return Table(self.keys, {**self.columns, **columns})

    def with_columns_of(self, other: Table, names: Iterable[str]) -> Table:
        """Columns replaced by those of `other`, if it has them; it has the same rows in any order and padding."""
        place = {key: row for row, key in enumerate(other.keys)}
        rows = other.rows([place[key] for key in self.keys]).as_wide_as(self.width)
        return self.with_columns({name: rows.columns[name] for name in names if name in rows.columns})

    def copy(self) -> Table:
        """With tensors of its own."""
        return self.rows(range(len(self)))


def uids(keys: Sequence[str]) -> list[str]:
    """The uid of each row key."""
    return [key.rsplit("_", 2)[0] for key in keys]


def pad(rows: Sequence[Tensor]) -> Tensor:
    """Rows of several lengths as one tensor, zeros on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
