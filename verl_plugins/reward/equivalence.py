"""Which responses to a prompt are equivalent: by their answers, by their tool calls, or by the tokens they share."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from verl_plugins import Batch, Groups
from verl_plugins.reward.normal_form import normal_form

CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
ROUNDING = 1e-9


def given_answers(batch: Batch, part: str, cut_off: bool = False) -> np.ndarray:
    """[B] the answer that the scorer extracted from each response, in its normal form, "" where there is none.

    Args:
        batch: the step's responses.
        part: the part of the reward with the answers.
        cut_off: whether what was found in a response that was cut off is its answer.

    Raises:
        DataError: there is no such part.
    """
    found = batch.extra(part)
    found = found.tolist() if isinstance(found, Tensor) else found
    given = pd.Series(found, dtype="string").fillna("").map(normal_form).to_numpy(object)
    if not cut_off:
        given[batch.truncated.numpy()] = ""
    return given


def tool_calls(texts: list[str]) -> np.ndarray:
    """[B] the calls in each text, in their order, written so that equal ones are equal texts; "" where there is none.

    A call is JSON between `<tool_call>` and `</tool_call>`; the order of its keys makes no difference, nor does space.
    What is no JSON stands for itself.
    """
    calls = pd.Series(texts, dtype=object).str.findall(CALL)
    return calls.map(lambda found: "\n".join(map(_one_way, found))).to_numpy(object)


def _one_way(call: str) -> str:
    try:
        return json.dumps(json.loads(call), sort_keys=True)
    except (ValueError, RecursionError):  # a model wrote it
        return " ".join(call.split())


def chained(tokens: Tensor, mask: Tensor, groups: Groups, least: float) -> Tensor:
    """[B] labels: rows of a group that a chain of similar rows joins have one; 0 or more, a row without tokens -1.

    Two rows are similar if at least the share `least` of the different tokens of both is in both (Jaccard, single
    linkage).

    Args:
        tokens: [B,T] ids.
        mask: [B,T] bool, the tokens that count.
        groups: rows of different groups are never joined.
        least: above 0, at most 1.
    """
    place = Groups(groups.index).rank(torch.arange(len(tokens)).double()).long()
    row, at = mask.nonzero(as_tuple=True)
    kinds, kind = torch.unique(torch.stack([groups.index[row], tokens[row, at]], 1), dim=0, return_inverse=True)
    start = torch.searchsorted(kinds[:, 0].contiguous(), torch.arange(len(groups)))
    column = kind - start[groups.index[row]]
    rows, columns = (int(values.max()) + 1 if len(values) else 1 for values in (place, column))
    has = torch.zeros(len(groups), rows, columns)
    has[groups.index[row], place[row], column] = 1
    size, common = has.sum(2), has @ has.mT
    joined = common + ROUNDING >= least * (size[:, :, None] + size[:, None, :] - common)
    for _ in range(math.ceil(math.log2(max(rows, 2)))):
        joined = (joined.float() @ joined.float()) > 0
    first = torch.where(joined, torch.arange(rows), rows).amin(2)
    label = torch.arange(len(groups))[:, None] * rows + first
    return torch.where(mask.any(1), label[groups.index, place], -1)
