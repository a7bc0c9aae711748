"""Hidden states of the training that `check_plugin` invents: of the tokens a run would choose, as a model might."""

from __future__ import annotations

import torch

from verl_plugins.hidden import Hidden, Wish, chosen_places, united
from verl_plugins.testing.table import Table

DEPTH, WIDTH = 4, 8
"""Layers of the model and size of a state."""


def invented(wish: Wish, rows: Table, step: int) -> Hidden | None:
    """What `batch.hidden` is in a step; padding rows have none. Each state follows from its row's key, token and place.

    Deeper layers say more of the token and less of its place.
    """
    asked = united([wish], step)
    if asked is None:
        return None
    mask, responses = rows.columns["response_mask"].bool(), rows.columns["responses"].long()
    layers = asked.layers(DEPTH)
    of_token = _numbers(1, 64) * torch.tensor([float(layer) for layer in layers])[:, None, None]
    places = torch.arange(mask.shape[1])
    states = of_token.transpose(0, 1)[responses % 64] + _numbers(2, 64)[0][places % 64][None, :, None]
    pooled = (states * mask[..., None, None]).sum(1) / mask.sum(1).clamp(min=1)[:, None, None]
    chosen = chosen_places(rows.keys, mask, asked.tokens, 0)
    row, draw = (chosen >= 0).nonzero(as_tuple=True)
    position = chosen[row, draw]
    label = responses[row, position]
    head = _numbers(3, 64)[0]
    return Hidden(
        layers=layers,
        features=states[row, position],
        row=row,
        position=position,
        draw=draw,
        label=label,
        pooled=pooled,
        head_row=head[label % 64] if asked.head_rows else None,
        argmax=label + label % 2 if asked.argmax else None,
    )


def _numbers(seed: int, count: int) -> torch.Tensor:
    """[1, count, WIDTH] fixed ones."""
    return torch.randn(1, count, WIDTH, generator=torch.Generator().manual_seed(seed))
