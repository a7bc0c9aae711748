"""Batches of outcomes for the tests of estimators."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from verl_plugins import Batch

SCORES = st.one_of(st.sampled_from([0.0, 1.0]), st.integers(-4, 4).map(lambda n: n / 4))


@st.composite
def outcomes(draw, min_groups: int = 1, distinct: bool = False) -> tuple[list[str], list[float]]:
    """uid and score of each row, groups of 1 to 9 in any order."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=min_groups, max_size=4))
    uid = draw(st.permutations([f"{group}-1-0" for group, size in enumerate(sizes) for _ in range(size)]))
    rows = len(uid)
    scores = (
        st.permutations([n / 8 for n in range(rows)]) if distinct else st.lists(SCORES, min_size=rows, max_size=rows)
    )
    return uid, draw(scores)


def batch_of(uid, scores, tokens: int = 4, dtype=torch.float32, **fields) -> Batch:
    """Responses of 1 to `tokens` tokens, the score on the last one."""
    lengths = (torch.arange(len(uid)) % tokens + 1)[:, None]
    rewards = torch.zeros(len(uid), tokens, dtype=dtype).scatter_(
        1, lengths - 1, torch.tensor(scores).to(dtype)[:, None]
    )
    fields = {"response_mask": torch.arange(tokens)[None] < lengths} | fields
    return Batch.from_tensors(uid=uid, rm_scores=rewards, **fields)


def per_row(advantages: torch.Tensor) -> torch.Tensor:
    """The value on each row's first token (every response has one)."""
    return advantages[:, 0]
