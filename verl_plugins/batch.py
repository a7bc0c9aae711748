"""What a hook on the driver sees of the data: `Batch` (the loss sees `Tokens`).

Notation: B rows (responses; synthetic padding rows are never among them), T the longest response in the batch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from verl_plugins.errors import DataError
from verl_plugins.fields import LOSS_MASK, RESERVED, Fields, Source, TensorSource, narrowed, version
from verl_plugins.groups import Groups
from verl_plugins.hidden import Hidden
from verl_plugins.selecting import SelectsRows
from verl_plugins.values import HasValues

TOLD = {"truncated", "offset", "lag", "lag_steps"}
"""What the bridge says of rows, under names of its own."""


class Batch(SelectsRows, HasValues):
    """The responses of one training step, padding rows left out; fields are fetched when first read.

    Group statistics count each session once, by its last output; their results come back for every row.
    """

    def __init__(self, source: Source, *, tokenizer: Any = None, budget: int | None = None, full: Batch | None = None):
        self._source = source
        self._tokenizer = tokenizer
        self._budget = budget
        self._fields = Fields()
        self.written: dict[str, Tensor] = {}
        """Fields put by plugins, still to be shipped by the bridge."""
        self._assigned = {}
        super().__init__(full)

    @classmethod
    def from_tensors(cls, *, uid: Sequence[str], full: Batch | None = None, **fields: Any) -> Batch:
        """A batch for tests and notebooks, from padded tensors and lists named like the queue's fields.

        Needs `response_mask` [B,T] and `rm_scores` [B,T]; `session` and `turn` default to one output per session.
        """
        sessions = torch.as_tensor(fields.pop("session", range(len(uid)))).clone()
        turns = torch.as_tensor(fields.pop("turn", [0] * len(uid))).clone()
        keys = [f"{u}_{s}_{t}" for u, s, t in zip(uid, sessions.tolist(), turns.tolist(), strict=True)]
        tokenizer, budget = fields.pop("tokenizer", None), fields.pop("budget", None)
        fields |= {f"__{name}__": fields.pop(name) for name in TOLD & fields.keys()}
        batch = cls(TensorSource(keys, fields), tokenizer=tokenizer, budget=budget, full=full)
        batch.uid, batch.session, batch.turn = np.asarray(uid, dtype=object), sessions, turns
        return batch

    def __len__(self) -> int:
        return len(self._source.keys)

    # Identity

    @property
    def keys(self) -> list[str]:
        """[B] unique row keys, `<uid>_<session>_<turn>`."""
        return self._source.keys

    @cached_property
    def uid(self) -> np.ndarray:
        """[B] the draw each row belongs to; new at every draw of a prompt."""
        return np.array([key.rsplit("_", 2)[0] for key in self.keys], dtype=object)

    @cached_property
    def session(self) -> Tensor:
        """[B] int64 session number within the group."""
        return torch.tensor([int(key.rsplit("_", 2)[1]) for key in self.keys])

    @cached_property
    def turn(self) -> Tensor:
        """[B] int64 output number within the session."""
        return torch.tensor([int(key.rsplit("_", 1)[1]) for key in self.keys])

    @cached_property
    def prompt_id(self) -> Tensor:
        """[B] int64 dataset row, stable over epochs (the bridge writes it into the uid)."""
        try:
            return torch.from_numpy(np.array([uid.split("-", 1)[0] for uid in self.uid]).astype(np.int64))
        except ValueError:
            raise DataError(f"field uid: {self.uid[0]!r} does not start with a prompt id, as in '17-3-0'") from None

    @cached_property
    def sessions(self) -> Groups:
        """The sessions of the batch: the outputs of one response are a group here."""
        return Groups([key.rsplit("_", 1)[0] for key in self.keys])

    @cached_property
    def is_last(self) -> Tensor:
        """[B] bool: the last output of its session, the one whose verdict counts."""
        if not self._several_outputs:
            return torch.ones(len(self), dtype=torch.bool)
        return self.turn == self.sessions.max(self.turn)

    @cached_property
    def groups(self) -> Groups:
        """The groups of the batch (rows with one uid), each session counted once."""
        return Groups(self.uid, counted=self.is_last if self._several_outputs else None)

    @cached_property
    def _several_outputs(self) -> bool:
        return bool((self.turn != 0).any())

    def of_session(self, values: Tensor) -> Tensor:
        """[B] -> [B]: for every row the value of its session's last output."""
        if not self._several_outputs:
            return values
        last = torch.empty(len(self.sessions), dtype=torch.int64)
        last[self.sessions.index[self.is_last]] = self.is_last.nonzero()[:, 0]
        return values[last[self.sessions.index]]

    # Fields

    def _field(self, name: str) -> Any:
        if name not in self._fields:
            try:
                self._fields[name] = self._source.fetch(name)
            except KeyError:
                raise DataError(f"field {name!r} is not in the batch; a plugin that reads it declares needs") from None
        return self._fields[name]

    def prefetch(self, *names: str) -> None:
        """Fetch fields that will be read, in one message to the queue; they must exist."""
        self._source.prefetch([name for name in names if name not in self._fields])

    @cached_property
    def response_mask(self) -> Tensor:
        """[B,T] bool: tokens the policy generated."""
        return self._field("response_mask").bool()

    @property
    def rewards(self) -> Tensor:
        """[B,T] token-level rewards, as shaped so far. Assign [B,T], or [B] to put a reward on the last token."""
        self._row_sums  # noqa: B018  refuses rewards that are not finite
        return self._field("rm_scores")

    @rewards.setter
    def rewards(self, values: Tensor) -> None:
        self._keep_raw_scores()
        self._row_shaped(values, "rewards")
        if values.dim() == 1:
            self._finite(values, "rewards: the reward")
            last = self.lengths.clamp(min=1) - 1
            values = torch.zeros_like(self._field("rm_scores")).scatter_(1, last[:, None], values[:, None].float())
        else:
            self._finite(values.sum(-1), "rewards: the sum of the rewards")
        self._fields["rm_scores"] = self.written["rm_scores"] = values.float()
        self.__dict__.pop("_row_sums", None)

    def _row_shaped(self, values: Any, what: str) -> None:
        """A real tensor [B] or [B,T]."""
        rows, tokens = self.response_mask.shape
        if not isinstance(values, Tensor):
            raise DataError(f"{what}: a {type(values).__name__}, expected a tensor [{rows}] or [{rows}, {tokens}]")
        if values.shape not in ((rows,), (rows, tokens)):
            raise DataError(f"{what}: shape {tuple(values.shape)}, expected ({rows},) or ({rows}, {tokens})")
        if values.is_complex():
            raise DataError(f"{what}: {values.dtype}, expected real numbers")

    @cached_property
    def _row_sums(self) -> Tensor:
        return self._finite(self._field("rm_scores").sum(-1), "field rm_scores: the sum of the rewards")

    @property
    def scores(self) -> Tensor:
        """[B] outcome of each row's session: the sum of the rewards of its last output."""
        return self.of_session(self._row_sums)

    def _finite(self, values: Tensor, what: str) -> Tensor:
        # A sum is finite only if every term is: looking for the row can wait until there is one.
        if not math.isfinite(values.sum()):
            for row in (~torch.isfinite(values)).nonzero()[:1, 0].tolist():
                raise DataError(f"{what} of row {self.keys[row]} is {float(values[row])}, expected a finite number")
        return values

    def _keep_raw_scores(self) -> None:
        if "raw_scores" not in self._fields:
            self._fields["raw_scores"] = self.scores.clone()

    @cached_property
    def correct(self) -> Tensor:
        """[B] bool: the verifier's verdict (`acc` of the reward function, else raw score ≥ 0.5), never shaped."""
        self._keep_raw_scores()
        for name in ("verdict", "acc"):
            try:
                self.extra(name)
            except DataError:
                continue
            return self.numbers(name) >= 0.5
        return self._fields["raw_scores"] >= 0.5

    def numbers(self, name: str) -> Tensor:
        """[B] float32 values of `extra(name)`; DataError where one is not a finite number."""
        values = self.extra(name)
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            found = torch.as_tensor(values, dtype=torch.float32)
            if found.shape == (len(self),):
                return self._finite(found, f"field {name}")
        raise DataError(f"field {name!r} must have one number per row, and has {values!r:.80}")

    @cached_property
    def lengths(self) -> Tensor:
        """[B] int64 length of the row's response, or of its segment of one, in tokens, tool output included."""
        return torch.as_tensor(self._field("response_lengths"))

    @cached_property
    def offsets(self) -> Tensor:
        """[B] int64 tokens of the response in the row's context: 0 unless it is a later segment of its response."""
        return self._told("__offset__")

    def _told(self, name: str) -> Tensor:
        """[B] int64 what the bridge says of each row, 0 where it says nothing."""
        with contextlib.suppress(KeyError):
            return torch.as_tensor(self._source.fetch(name))
        return torch.zeros(len(self), dtype=torch.int64)

    @cached_property
    def ends(self) -> Tensor:
        """[B] int64 tokens of the response up to the row's end: of its session's last row, the response's length."""
        return self.lengths + self.offsets

    @cached_property
    def lag(self) -> Tensor:
        """[B] int64 optimiser updates between the weights that began to generate a response and those trained now."""
        return self._told("__lag__")

    @cached_property
    def lag_steps(self) -> Tensor:
        """[B] int64 the same in steps, which asynchronous modes bound; 0 in `sync`."""
        return self._told("__lag_steps__")

    @cached_property
    def budgets(self) -> Tensor:
        """[B] int64 tokens each response could have: `max_tokens` of its prompt, at most `data.max_response_length`."""
        if self._budget is None:
            raise DataError("the batch does not know the response budget (data.max_response_length)")
        try:
            own = torch.as_tensor(self._source.fetch("__max_tokens__"))
        except KeyError:
            return torch.full_like(self.lengths, self._budget)
        return own.long().clamp(max=self._budget)

    @cached_property
    def truncated(self) -> Tensor:
        """[B] bool: something cut the response off, whatever it was; where nobody told, its budget was used up."""
        with contextlib.suppress(KeyError):
            return torch.as_tensor(self._source.fetch("__truncated__")).bool().clone()
        last = self.responses.gather(1, (self.lengths.clamp(min=1) - 1)[:, None])[:, 0]
        return (self.lengths >= self.budgets) & (last != self._tokenizer.eos_token_id)

    @property
    def responses(self) -> Tensor:
        """[B,T] int64 response token ids, zero-padded on the right."""
        return self._field("responses")

    @cached_property
    def text(self) -> list[str]:
        """[B] decoded responses, each up to the row's end."""
        ids = [row[:n].tolist() for row, n in zip(self.responses, self.lengths.tolist(), strict=True)]
        if self.offsets.any():
            known = zip(self.extra("prompts"), self.prompt_lengths.tolist(), self.offsets.tolist(), ids, strict=True)
            ids = [[*prompt[n - before : n].tolist(), *row] for prompt, n, before, row in known]
        return self._tokenizer.batch_decode(ids, skip_special_tokens=True)

    @property
    def old_log_probs(self) -> Tensor:
        """[B,T] log-probs under the policy before this step's update."""
        return self._field("old_log_probs")

    @property
    def rollout_log_probs(self) -> Tensor:
        """[B,T] log-probs the rollout server reported."""
        return self._field("rollout_log_probs")

    @property
    def ref_log_probs(self) -> Tensor:
        """[B,T] log-probs under the reference policy."""
        return self._field("ref_log_prob")

    @property
    def entropy(self) -> Tensor:
        """[B,T] entropy of the policy before this step's update, at each response token."""
        return self._field("entropy")

    @property
    def sum_pi_squared(self) -> Tensor:
        """[B,T] sum over the vocabulary of the squared probabilities, before this step's update."""
        return self._field("sum_pi_squared")

    @property
    def hidden(self) -> Hidden | None:
        """Hidden states of the policy before this step's update; None in steps for which no plugin wished for any."""
        return self._field("hidden_states")

    @property
    def top2_gap(self) -> Tensor:
        """[B,T] log-prob of the likeliest token less that of the second, before this step's update."""
        return self._field("top2_gap")

    @property
    def prompt_log_probs(self) -> Tensor:
        """[B,P] log-probs of the prompt's tokens after its first, zero-padded on the right; see `prompt_lengths`."""
        return self._field("prompt_log_probs")

    @property
    def prompt_lengths(self) -> Tensor:
        """[B] int64 prompt length in tokens; `prompt_log_probs` has one entry less per row."""
        return torch.as_tensor(self._field("prompt_lengths"))

    @property
    def advantages(self) -> Tensor:
        """[B,T] the step's advantages, known from `observe` on."""
        return self._field("advantages")

    @cached_property
    def solution(self) -> list[str | None]:
        """[B] worked solution of each row's prompt (`solution` in `extra_info`), None where the data has none."""
        return [(info or {}).get("solution") for info in self._field("extra_info")]

    def extra(self, name: str) -> Any:
        """Any other field: put by a plugin, a queue field, a part of the reward, or a column of the dataset row.

        A tensor [B] or [B,T], or a list [B] of what is not numeric.
        """
        for place in (lambda: self._field(name), lambda: self._inside("extra_fields", name, "reward_extra_info")):
            with contextlib.suppress(DataError, KeyError):
                return place()
        with contextlib.suppress(DataError, KeyError):
            return self._inside("extra_info", name)
        self._refuse_some(name)
        raise DataError(f"field {name!r} is neither in the queue nor in the reward's parts nor in the dataset row")

    def _refuse_some(self, name: str) -> None:
        """DataError where an agent loop, a reward or a plugin has given a field to some of the rows only."""
        with contextlib.suppress(KeyError):
            rows = self._source.fetch("extra_fields")
            having = [name in row or name in row.get("reward_extra_info", {}) for row in rows]
            if any(having) and not all(having):
                lacking = self.keys[having.index(False)]
                raise DataError(f"row {lacking} has no field {name!r}, which others of the step have: give it to all")

    def labels(self, name: str) -> list[str]:
        """[B] `extra(name)` as text: names of roles, strata or the like, numbers in their shortest form."""
        values = self.extra(name)
        if isinstance(values, Tensor):
            values = [f"{value:g}" for value in values.tolist()] if values.dim() == 1 else [None] * len(self)
        if None in values:
            raise DataError(f"field {name!r} must have one name per row; row {self.keys[values.index(None)]} has none")
        return [str(value) for value in values]

    def _inside(self, field: str, name: str, within: str | None = None) -> Any:
        rows = self._field(field)
        values = [row[within][name] if within and name in row.get(within, {}) else row[name] for row in rows]
        numeric = all(isinstance(value, (bool, int, float, np.number)) for value in values)
        return torch.tensor([float(value) for value in values]) if numeric else values

    # What a stage may do

    def to_tokens(self, values: Tensor) -> Tensor:
        """[B] -> [B,T] float32: each row's value on its generated tokens, 0 elsewhere."""
        self._finite(values, "to_tokens: the value")
        # On the CPU bytes become floats six times as fast as bools do, and a product beats torch.where.
        return self.response_mask.view(torch.uint8).float().mul_(values.float()[:, None])

    def put(self, name: str, values: Tensor) -> None:
        """Add a field [B] or [B,T]: `extra(name)` of later stages and the loss. `loss_mask` takes tokens out."""
        self._row_shaped(values, f"put {name!r}")
        if name == LOSS_MASK:
            values = narrowed(values, self.response_mask, self.written.get(name))
        if name in RESERVED or name.startswith("__"):
            raise DataError(f"put {name!r}: a field of the trainer's own has this name; give yours another one")
        self._fields[name] = self.written[name] = values

    def changed_in_place(self) -> list[str]:
        """Names of what was handed out and written into, which reaches neither the trainer nor other processes."""
        kept = {name: value for name, value in vars(self).items() if isinstance(value, Tensor) and version(value)}
        given = {id(value) for value in self._fields.values()}
        named = [name for name, value in kept.items() if id(value) not in given]
        return self._fields.changed() + ["scores" if name == "_row_sums" else name for name in named]
