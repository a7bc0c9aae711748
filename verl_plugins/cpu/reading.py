"""What a teacher says of tokens that are there: its log-probs at every place of a text, without generating any.

verl's teacher path asks a rollout server for the `prompt_logprobs` of prompt and response, as vLLM calls them.

Notation: R texts read together, L tokens of the longest, V vocabulary, k tokens told at each place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

PIECE = 256
"""Places whose log-probs are made at a time."""
LOGITS = 1 << 26
"""Numbers of logits that are there at a time, 256 MB: more texts are read in several passes."""


@dataclass
class Reading:
    """One text to be read."""

    prompt_ids: list[int]
    top: int
    """How many tokens are told at each place, the most probable first; 0: the one that stands there."""
    seed: None = None
    """A reading draws nothing."""


@dataclass
class Told:
    """Of each token of the text: ids and log-probs of what follows it. Nothing does after the last, which has zeros."""

    ids: list[list[int]]
    log_probs: list[list[float]]

    def fields(self) -> dict[str, list]:
        """As verl's servers name them."""
        return {"prompt_ids": self.ids, "prompt_logprobs": self.log_probs}


@torch.inference_mode()
def read(model: PreTrainedModel, readings: Sequence[Reading]) -> list[Told]:
    """What the model says of all texts, at temperature 1."""
    width = max(len(reading.prompt_ids) for reading in readings)
    rows = max(1, LOGITS // (width * model.config.get_text_config().vocab_size))
    parts = [readings[start : start + rows] for start in range(0, len(readings), rows)]
    return [told for part in parts for told in _read(model, part, width)]


def _read(model: PreTrainedModel, readings: Sequence[Reading], width: int) -> list[Told]:
    """In one forward pass."""
    device = model.device
    ids = torch.zeros((len(readings), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, reading in enumerate(readings):
        ids[row, : len(reading.prompt_ids)] = torch.tensor(reading.prompt_ids)
        mask[row, : len(reading.prompt_ids)] = 1
    ids, mask = ids.to(device), mask.to(device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return [_told(row[: len(one.prompt_ids)], one) for row, one in zip(logits, readings, strict=True)]


def _told(logits: Tensor, reading: Reading) -> Told:
    """Of the logits [L,V] of one text."""
    width = max(reading.top, 1)
    ids, log_probs = [], []
    following = torch.tensor(reading.prompt_ids[1:], device=logits.device)
    for log_p, place in _pieces(logits[:-1]):
        if reading.top:
            values, tokens = log_p.topk(width, -1)
        else:
            tokens = following[place, None]
            values = log_p.gather(1, tokens)
        ids += tokens.tolist()
        log_probs += values.tolist()
    return Told([*ids, [0] * width], [*log_probs, [0.0] * width])


def _pieces(logits: Tensor) -> Iterator[tuple[Tensor, slice]]:
    for start in range(0, len(logits), PIECE):
        place = slice(start, start + PIECE)
        yield logits[place].float().log_softmax(-1), place
