"""What a hook is handed besides the batch: the run, prompts, rollouts, answers, the actor.

These are the types plugins are written against; `bridge/` provides them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from verl_plugins.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from omegaconf import DictConfig
    from torch import Tensor

    from verl_plugins.batch import Batch


class Dataset(Protocol):
    """The training prompts."""

    fingerprint: str
    """Changes when rows, their order or their columns change."""

    def __len__(self) -> int: ...
    def __getitem__(self, prompt_id: int) -> dict[str, Any]: ...


class Run(Protocol):
    """The running training, as one plugin sees it."""

    config: DictConfig
    """The whole composed configuration."""
    step: int
    """The training step, from 1."""
    update: int
    """The update, from 1: `step`, but in `separate_async`, where a step has `parameter_sync_step` of them."""
    tokenizer: Any
    dataset: Dataset

    def log(self, metrics: Mapping[str, float]) -> None:
        """Add metrics to this step; `key` appears as `plugins/<plugin>/<key>`."""

    def rng(self, name: str = "") -> np.random.Generator:
        """This plugin's generator of this step, seeded by (run seed, step, plugin, name): the same after a resume."""

    def in_flight(self) -> np.ndarray:
        """Prompt ids drawn whose outcome has not arrived yet (always empty at selection time in `sync` mode)."""

    def log_probs(self, batch: Batch, temperature: float | None = None) -> Tensor:
        """[B,T] log-probs of the batch's responses under the current policy: an extra forward pass."""

    def score(self, prompts: Sequence, targets: Sequence) -> list[Tensor]:
        """Teacher-forced log-probs of each target's tokens after its prompt under the current policy.

        Prompts are chat messages or token ids, targets are text or token ids.
        """

    def generate(
        self, prompts: Sequence, n: int = 1, temperature: float | None = None, max_tokens: int | None = None
    ) -> list[list[Generated]]:
        """`n` responses per prompt (chat messages or token ids) from the rollout servers with current weights."""

    def stop(self, reason: str) -> None:
        """End training after this step."""


@dataclass
class Generated:
    """One generated response."""

    token_ids: list[int]
    log_probs: list[float]
    text: str


class Prompt:
    """One drawn prompt: a row of the dataset on its way to the rollout. Changes act on this draw only."""

    def __init__(self, prompt_id: int, row: dict[str, Any]) -> None:
        self.id = prompt_id
        """Dataset row, stable over epochs."""
        self.row = row
        """Columns of the row by name; new or changed columns travel with every response (`batch.extra(name)`)."""

    @property
    def messages(self) -> list[dict[str, str]]:
        """The chat messages that are asked."""
        return self.row["raw_prompt"]

    @messages.setter
    def messages(self, messages: list[dict[str, str]]) -> None:
        self.row["raw_prompt"] = messages

    @property
    def prefill(self) -> str:
        """Text that stands at the beginning of the answer; its tokens are the prompt's, and are not trained on."""
        return self.row.get("__prefill__", "")

    @prefill.setter
    def prefill(self, text: str) -> None:
        self.row["__prefill__"] = text

    @property
    def solution(self) -> str | None:
        """The worked solution (`solution` in `extra_info`), None where the data has none."""
        return (self.row.get("extra_info") or {}).get("solution")

    @property
    def group_size(self) -> int | None:
        """Responses to generate for this draw; None means `rollout.n`."""
        return self.row.get("__rollout_n__")

    @group_size.setter
    def group_size(self, size: int) -> None:
        if size < 1:
            raise DataError(f"prompt {self.id}: group_size must be at least 1, got {size}")
        self.row["__rollout_n__"] = int(size)

    @property
    def max_tokens(self) -> int | None:
        """Response budget in tokens of this draw; None means `data.max_response_length`."""
        return self.row.get("__max_tokens__")

    @max_tokens.setter
    def max_tokens(self, budget: int) -> None:
        if budget < 1:
            raise DataError(f"prompt {self.id}: max_tokens must be at least 1, got {budget}")
        self.row["__max_tokens__"] = int(budget)

    @property
    def greedy(self) -> bool:
        """Whether this draw is decoded greedily."""
        return not self.row.get("__do_sample__", True)

    @greedy.setter
    def greedy(self, greedy: bool) -> None:
        self.row["__do_sample__"] = not greedy


class Prompts(Sequence[Prompt]):
    """The prompts drawn for one submission to the rollout."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._prompts = list(prompts)

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index):
        return self._prompts[index]

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self._prompts)

    def repeat(self, place: int, instead_of: int) -> Prompt:
        """Draw the prompt at `place` a second time, in the place of another; gives the new draw, a group of its own.

        Raises:
            DataError: if both are the same place.
        """
        if place == instead_of:
            raise DataError(f"repeat: the draw at place {place} cannot give way to itself")
        self._prompts[instead_of] = Prompt(self._prompts[place].id, copy.deepcopy(self._prompts[place].row))
        return self._prompts[instead_of]


@dataclass
class Rollout:
    """One scored session that has not been published to the queue yet."""

    text: str
    response_ids: list[int]
    score: float
    correct: bool
    truncated: bool
    info: dict[str, Any]
    """What the reward function said besides the score."""
    outputs: Any
    """verl's own outputs of the session: opaque, published as they are."""
    log_probs: list[float] = field(default_factory=list)
    """Of each token of the response, as the rollout server reported; 0 where `mask` is."""
    mask: list[int] = field(default_factory=list)
    """Of each token of the response: 1 if the policy generated it in this session, 0 of a prefix or a tool."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Put here, values travel with the row: later stages read them with `batch.extra(name)`."""
    segments: list[Segment] = field(default_factory=list)
    """The rows it is published as, in the order of their tokens; none: one row, of all its tokens."""


@dataclass
class Segment:
    """Tokens of a response as a row of their own; what stands before them is its context and is not trained on.

    A response counts once, by its last segment, whose end is the response's and which alone may be empty. What another
    response begins with as well is published with one of them.
    """

    rollout: Rollout
    """In which they were generated, with their mask and log-probs: the response itself, or what it continues."""
    start: int
    end: int
    """Places in the tokens of the response, the end not included."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Travel with this row, besides those of the response."""


@dataclass(frozen=True)
class Answer:
    """A response to be scored."""

    text: str
    ground_truth: Any
    data_source: str
    extra_info: dict[str, Any] = field(default_factory=dict)
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Of the row: those of the dataset, and above them what the agent loop or a plugin gave the session."""

    def extra(self, name: str) -> Any:
        """A column of the row or a key of `extra_info`, by name as in `batch.extra`.

        Raises:
            DataError: there is none.
        """
        for place in (self.columns, self.extra_info):
            if name in place:
                return place[name]
        raise DataError(f"field {name!r} is neither a column of the answer's row nor in its extra_info")


@dataclass
class Verdict:
    """What a scorer says of an answer; numeric parts are kept and logged, all parts are in `batch.extra(name)`."""

    score: float
    correct: bool
    parts: dict[str, Any] = field(default_factory=dict)


class Actor(Protocol):
    """The actor in its worker process, around one optimiser step; gradients are accumulated and not yet clipped."""

    module: torch.nn.Module
    optimizer: torch.optim.Optimizer
    step: int
    """The training step, from 1."""
    mini_batch: int
    """Optimiser steps already made in this training step."""

    def parameters(self) -> list[Tensor]:
        """This rank's parts of the parameters that are trained; to write into one changes the model."""

    def logits(self, tokens: int, at: Iterable[Tensor] | None = None) -> Tensor:
        """[n,V] logits that predict response tokens of this mini-batch, over the temperature and after `shape_logits`.

        At the parameters as they are, or at others, a tensor for each of `parameters()`, which are taken back whatever
        happens. `tokens` response tokens of all ranks together, evenly spread, the same in each call; without gradient
        or dropout, in single precision or better. All ranks must call it together; declare `logits` in `needs`.
        """

    def distillation_gradient(self) -> list[Tensor]:
        """This rank's parts of the gradient of the distillation loss alone, its coefficient in it: one for each of
        `parameters()`, whose own gradients are of all losses together and stay.

        It takes another forward and backward pass over the mini-batch, and FSDP2; all ranks must call it together.
        """

    def gradients(self, name: str, parameters: Sequence[Tensor]) -> dict[float, list[Tensor]]:
        """The gradient of this mini-batch's loss in parts: by value of a field [rows] put with `batch.put`, 0 left out.

        This rank's parts, one for each of `parameters` (of `module.parameters()`); over the values they add up to the
        gradients that are there, which stay as they are. A forward and backward pass for each value that any rank has;
        all ranks must call it together. verl's FSDP2 only.
        """

    def gather(self, values: Tensor) -> Tensor:
        """[any] values of all ranks, one rank's after the other's; all must call it together, some may have none."""

    def log(self, metrics: Mapping[str, float]) -> None:
        """Add metrics; `key` appears as `plugins/<plugin>/<key>`, averaged over the mini-batches of the step."""
