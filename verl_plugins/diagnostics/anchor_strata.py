"""Anchor strata: rewards by semantic anchor, and how evenly a step covers the anchors. It only measures.

arXiv:2601.00543 has the anchors (see `anchor_tags`); to use them as strata of RL data is ours. With p_k the share of a
step's prompts that lie at anchor k of those the dataset has,

    coverage_entropy = - sum_k p_k log p_k      in nats; evenness = coverage_entropy / log K

The same column can be the strata of `portfolio_mixture`, which then chooses how many prompts each anchor gives:
plugins.portfolio_mixture.column=anchor_id, by wealth, or evenly with scale=0.

What differs from GRPO: nothing, no prompt, reward or loss is changed.

Degenerate cases: an anchor that no prompt of the step lies at has no reward. With one anchor there is no evenness.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from verl_plugins import Batch, DataError, Groups, Plugin, Run, hookimpl, setting

MOST_ANCHORS = 256
"""Each has metrics of its own."""


def coverage_entropy(counts: np.ndarray) -> float:
    """[K] prompts at each anchor, at least one in all -> nats."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum()) + 0.0


class AnchorStrata(Plugin):
    """Logs reward and entropy per anchor, and how evenly anchors are covered."""

    name = "anchor_strata"
    paper = "arXiv:2601.00543"
    needs = frozenset({"entropy"})

    @dataclass
    class Config:
        column: str = setting("anchor_id", "column of the dataset, or key of its extra_info, with the prompt's anchor")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.anchors = np.zeros(0, dtype=np.int64)
        """[K] those of the dataset; empty until it has been read."""

    @hookimpl
    def observe(self, run: Run, batch: Batch) -> None:
        if not len(self.anchors):
            self.anchors = dataset_anchors(run, self.config.column)
        full = batch.full
        of = full.numbers(self.config.column).long()
        asked = full.groups.first(torch.ones(len(full)))
        counts = np.bincount(np.searchsorted(self.anchors, of[asked].numpy()), minlength=len(self.anchors))
        run.log({"coverage_entropy": coverage_entropy(counts), "anchors": int((counts > 0).sum())})
        if len(counts) > 1:
            run.log({"evenness": coverage_entropy(counts) / np.log(len(counts))})
        self._log(run, "reward", Groups(of, full.is_last), full.scores.double(), of)
        trained = batch.numbers(self.config.column).long()
        tokens = batch.response_mask.double().sum(1)
        groups = Groups(trained, tokens > 0)
        sums = torch.where(batch.response_mask, batch.entropy.double(), 0.0).sum(1)
        self._log(run, "entropy", groups, groups.sum(sums) / groups.sum(tokens).clamp(min=1), trained)

    def _log(self, run: Run, what: str, groups: Groups, values: torch.Tensor, of: torch.Tensor) -> None:
        """The mean over the counted rows of each anchor that has any."""
        there = groups.count() > 0
        found = dict(zip(of[there].tolist(), groups.mean(values)[there].tolist(), strict=True))
        run.log({f"{anchor}/{what}": found[anchor] for anchor in sorted(found)})


def dataset_anchors(run: Run, column: str) -> np.ndarray:
    """[K] the anchors that the dataset's prompts have, in order.

    Raises:
        DataError: a row has none, or there are too many.
    """
    rows = (run.dataset[prompt_id] for prompt_id in range(len(run.dataset)))
    found = [row.get(column, (row.get("extra_info") or {}).get(column)) for row in rows]
    if None in found:
        raise DataError(
            f"anchor_strata: row {found.index(None)} of the dataset has no {column!r}, neither as a column nor in "
            "extra_info; verl-plugins data anchors FILE --to OUT writes it"
        )
    anchors = np.unique(np.array(found, dtype=np.int64))
    if len(anchors) > MOST_ANCHORS:
        raise DataError(
            f"anchor_strata: column {column!r} has {len(anchors)} numbers, at most {MOST_ANCHORS} anchors have metrics"
        )
    return anchors
