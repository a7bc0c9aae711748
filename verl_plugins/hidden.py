"""Hidden states of the policy: what a plugin that needs `hidden_states` asks for, and what `batch.hidden` gives it.

Layers are counted as Transformers counts `hidden_states`: layer l < n is what comes out of the l-th decoder layer,
layer n, the last, what the output head gets, behind the final norm. 0, the embeddings, is not among them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from verl_plugins.errors import CompositionError


@dataclass(frozen=True)
class Wish:
    """What a plugin wants to see of hidden states.

    Raises:
        CompositionError: a number is too small.
    """

    tokens: int = 8
    """At most so many generated tokens of each response; 0: what is pooled over the response is enough."""
    every: int = 10
    """In step 1 and then every so many steps."""
    layer_step: int | None = None
    """Every so many layers and the last; None: the last alone."""
    head_rows: bool = False
    """Rows of the output head that belong to the tokens."""
    argmax: bool = False
    """Tokens that the policy finds likeliest in their place."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("tokens", self.tokens, 0),
            ("every", self.every, 1),
            ("layer_step", self.stride, 1),
        ):
            if value < least:
                raise CompositionError(f"a wish for hidden states has {name}={value}: it must be at least {least}")

    @property
    def stride(self) -> int:
        """1 where only the last layer is wanted."""
        return 1 if self.layer_step is None else self.layer_step

    def due(self, step: int) -> bool:
        """Whether it is wanted in this training step, which are counted from 1 on."""
        return (step - 1) % self.every == 0

    def layers(self, depth: int) -> tuple[int, ...]:
        """The layers, of a model with so many."""
        return (depth,) if self.layer_step is None else tuple(sorted({*range(self.stride, depth, self.stride), depth}))

    def of(self, hidden: Hidden | None, step: int) -> Hidden | None:
        """What was wished for, whatever other plugins have; None in steps in which it is not due."""
        if hidden is None or not self.due(step):
            return None
        layers = self.layers(hidden.layers[-1])
        at = [hidden.layers.index(layer) for layer in layers]
        mine = hidden.draw < self.tokens
        return replace(
            hidden,
            layers=layers,
            features=hidden.features[mine][:, at],
            pooled=hidden.pooled[:, at],
            row=hidden.row[mine],
            position=hidden.position[mine],
            draw=hidden.draw[mine],
            label=hidden.label[mine],
            head_row=None if hidden.head_row is None else hidden.head_row[mine],
            argmax=None if hidden.argmax is None else hidden.argmax[mine],
        )


@dataclass(frozen=True)
class Asked:
    """What all plugins together want in a step."""

    tokens: int
    head_rows: bool
    argmax: bool
    wishes: tuple[Wish, ...]

    def layers(self, depth: int) -> tuple[int, ...]:
        """The layers, of a model with so many."""
        return tuple(sorted({layer for wish in self.wishes for layer in wish.layers(depth)}))


def united(wishes: Iterable[Wish], step: int) -> Asked | None:
    """The wishes that are due in a step as one; None where there is none."""
    due = tuple(wish for wish in wishes if wish.due(step))
    if not due:
        return None
    tokens = max(1, *(wish.tokens for wish in due))
    return Asked(tokens, any(wish.head_rows for wish in due), any(wish.argmax for wish in due), due)


@dataclass(frozen=True)
class Hidden:
    """States [.., D] at N generated tokens of a batch, and pooled over each of its B responses; single precision.

    The state of a token is the one that predicts it. They travelled in bfloat16.
    """

    layers: tuple[int, ...]
    """Which layers, ascending; the last is the model's."""
    features: Tensor
    """[N, layers, D]."""
    row: Tensor
    """[N] int64 row of the batch."""
    position: Tensor
    """[N] int64 place in the response."""
    draw: Tensor
    """[N] int64 how many tokens of the row were chosen before: those with less than k are a choice of k."""
    label: Tensor
    """[N] int64 the token itself."""
    pooled: Tensor
    """[B, layers, D] mean over all generated tokens of the row; 0 where there is none."""
    head_row: Tensor | None = None
    """[N, D] rows of the output head that belong to the tokens; None if nobody wished for them."""
    argmax: Tensor | None = None
    """[N] int64 the likeliest token in each place; None if nobody wished for it."""

    def first(self, tokens: int) -> Tensor:
        """[at most `tokens`] indices of tokens: as many of each response as of any other, as far as it goes."""
        return (self.draw * (int(self.row.max()) + 1) + self.row).argsort()[:tokens] if len(self.row) else self.row


def chosen_places(keys: Sequence[str], mask: Tensor, tokens: int, seed: int) -> Tensor:
    """[B,k] int64 places of generated tokens, a random choice that depends on the row's key and its own mask alone.

    The first k' columns are the choice of k' tokens. -1 where a row has fewer; mask [B,T].
    """
    draws = [np.random.default_rng([seed, zlib.crc32(key.encode())]).random(mask.shape[1]) for key in keys]
    order = torch.from_numpy(np.stack(draws)).masked_fill(~mask.bool(), 2.0)
    values, places = order.sort(dim=1, stable=True)
    places = places.masked_fill(values > 1, -1)[:, :tokens]
    return torch.nn.functional.pad(places, (0, tokens - places.shape[1]), value=-1)
