"""Where the fields of a batch come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from verl_plugins.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from verl_plugins.replay import StoredRow

RESERVED = frozenset(
    ("prompts", "responses", "input_ids", "attention_mask", "position_ids", "response_mask", "rm_scores")
    + ("raw_scores", "advantages", "returns", "values", "rollout_log_probs", "ref_log_prob", "entropy", "raw_prompt")
    + ("prompt_log_probs", "sum_pi_squared", "top2_gap", "routed_experts", "hidden_states", "head_values")
    + ("bootstrap_values",)
    + ("uid", "extra_fields", "extra_info", "reward_model", "data_source")
    + ("response_lengths", "prompt_lengths", "seq_len", "verdict", "acc")
)
"""Names of the trainer's own; what a method may replace is the policy's `old_log_probs`, in `observe`."""
LOSS_MASK = "loss_mask"
"""The trainer's own as well: a method may take tokens out of it."""


@dataclass(frozen=True)
class Addition:
    """A response that `select_rows` adds to a group: all its tokens are the policy's, its reward is on the last."""

    key: str
    like: int
    """The row of the batch whose prompt and dataset columns it shares."""
    response: np.ndarray
    """[n] token ids."""
    reward: float
    correct: bool
    rollout_log_probs: np.ndarray | None
    """[n] what the rollout server reported when it was generated."""
    past: StoredRow | None = None
    """The row of an earlier step that it is; then only the columns' names and types are those of row `like`."""


class Source(Protocol):
    """Where a batch's fields come from: the queue in training, plain tensors in tests."""

    keys: list[str]
    """`<uid>_<session>_<turn>` of each row."""

    def fetch(self, name: str) -> Any:
        """Field `name`: a tensor [B,…] or a list [B]; KeyError when there is no such field."""

    def prefetch(self, names: Iterable[str]) -> None:
        """Make ready what `fetch` will be asked for."""


class TensorSource:
    """Fields held in memory."""

    def __init__(self, keys: Sequence[str], fields: Mapping[str, Any]) -> None:
        self.keys = list(keys)
        self.fields = dict(fields)

    def fetch(self, name: str) -> Any:
        return self.fields[name]

    def prefetch(self, names: Iterable[str]) -> None:
        """Nothing to do."""


class Fields(dict[str, Any]):
    """Fields by name, each as it was when it came in."""

    def __init__(self) -> None:
        super().__init__()
        self._versions: dict[str, int | None] = {}

    def __setitem__(self, name: str, value: Any) -> None:
        self._versions[name] = version(value)
        super().__setitem__(name, value)

    def changed(self) -> list[str]:
        """Names of the tensors that were written into since they came in."""
        return [name for name, value in self.items() if version(value) != self._versions[name]]


def version(value: Any) -> int | None:
    """How often a tensor was written into; None for what is no tensor, and in inference mode, where nobody counts."""
    try:
        return value._version
    except (AttributeError, RuntimeError):
        return None


def narrowed(mask: Tensor, response_mask: Tensor, before: Tensor | None) -> Tensor:
    """[B,T] the tokens that have a part in the loss by this mask and by one that was put before.

    Raises:
        DataError: it is no mask of tokens, or has tokens that the policy did not generate.
    """
    if mask.shape != response_mask.shape or bool(((mask != 0) & (mask != 1)).any()):
        found, expected = tuple(mask.shape), tuple(response_mask.shape)
        raise DataError(f"put 'loss_mask': {mask.dtype} {found}, expected flags {expected}")
    if bool((mask.bool() & ~response_mask.bool()).any()):
        raise DataError(
            "put 'loss_mask': it has tokens that the policy did not generate; combine it with response_mask"
        )
    return mask.long() if before is None else mask.long() * before
