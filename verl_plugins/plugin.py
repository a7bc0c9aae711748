"""The base class of a method, and `setting`, which declares one of its settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from verl_plugins.hookspecs import API_VERSION

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from verl_plugins.hidden import Wish


def setting(
    default: Any,
    doc: str = "",
    *,
    authors: Any = MISSING,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Sequence[Any] | None = None,
) -> Any:
    """One field of a plugin's Config: its default, what it does, the authors' value, and the values it accepts.

    Literal arguments can be read without importing the plugin, which is how `verl-plugins show` stays fast.
    """
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt, "choices": choices}
    metadata = {"doc": doc, **{key: value for key, value in bounds.items() if value is not None}}
    if authors is not MISSING:
        metadata["authors"] = authors
    return dataclasses.field(default=default, metadata=metadata)


class Plugin:
    """One method: subclass it, name it, and implement the stages it needs (`verl_plugins.hookspecs`).

    Class attributes: `name` (the key under `plugins:`), `paper`, `version` (grows when saved state changes meaning),
    `api` (the API_VERSION it was written for), `verl` (the verl versions it works with), `needs` (fields verl must
    compute for it: entropy, current_entropy, old_log_probs, prompt_log_probs, rollout_log_probs, ref_log_probs, values,
    hidden_states (which of them says `hidden_wish`); and the columns uid, rm_scores, verdict where the loss reads them
    with `tokens.extra`), `label_free` (training needs no ground truth while the plugin is on: it makes its own labels,
    or scores without them). An attribute of the object: `value_heads`, how many heads the value model has; more than 1
    for one plugin of a run at most.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    version: ClassVar[str] = "1"
    api: ClassVar[int] = API_VERSION
    verl: ClassVar[str] = ">=0.9.1,<0.10"
    needs: ClassVar[frozenset[str]] = frozenset()
    label_free: ClassVar[bool] = False
    value_heads: int = 1

    @dataclass
    class Config:
        """No settings."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def check(self, config: DictConfig) -> None:
        """Refuse verl settings this method cannot work with, by raising CompositionError.

        `config` is the whole composed configuration; called in the driver before any process starts.
        """

    def hidden_wish(self) -> Wish:
        """Of a plugin that needs `hidden_states`: which of them, of how many tokens, and how often."""
        from verl_plugins.hidden import Wish

        return Wish()

    def start_scoring(self) -> None:
        """Called once in each reward worker before answers come: start here what `score_answer` needs."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart: tensors, numpy arrays, and JSON scalars, lists and dicts."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
