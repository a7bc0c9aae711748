"""verl's bootstrap of validation metrics (best, worst and majority of n answers), with arrays in place of its loops.

verl reduces a thousand samples per prompt, metric and n one by one, which takes longer than the validation it is about.
The samples are the same here, and so are the results, bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
from verl.trainer.ppo import metric_utils

VERLS = metric_utils.bootstrap_metric
REDUCTIONS = {np.max: np.max, np.min: np.min}


def fast_validation_metrics() -> AbstractContextManager:
    """Inside, verl's validation metrics are computed with `bootstrap_metric`."""
    return patch.object(metric_utils, "bootstrap_metric", bootstrap_metric)


def bootstrap_metric(
    data: Sequence[Any],
    subset_size: int,
    reduce_fns: Sequence[Callable[[np.ndarray], float]],
    n_bootstrap: int = 1000,
    seed: int = 42,
) -> list[tuple[float, float]]:
    """Mean and standard deviation of each reduction over `n_bootstrap` samples of `subset_size` of the data.

    Args: as verl's function of this name, which does what is not the largest or smallest value or a majority vote.
    """
    drawn = _drawn(len(data), subset_size, n_bootstrap, seed)
    if all(reduce in REDUCTIONS for reduce in reduce_fns):
        values = _numbers(data)
        reduced = None if values is None else [REDUCTIONS[reduce](values[drawn], axis=1) for reduce in reduce_fns]
    elif len(reduce_fns) == 1 and getattr(reduce_fns[0], "func", None) is metric_utils.calc_maj_val:
        reduced = _majority(data, drawn, **reduce_fns[0].keywords)
    else:
        reduced = None
    if reduced is None:
        return VERLS(data, subset_size, reduce_fns, n_bootstrap, seed)
    return [(float(np.mean(values)), float(np.std(values))) for values in reduced]


@functools.lru_cache(maxsize=32)
def _drawn(count: int, subset_size: int, n_bootstrap: int, seed: int) -> np.ndarray:
    """[n_bootstrap, subset_size] places; verl draws the same for every prompt, and seeds numpy's generator for it."""
    return np.random.RandomState(seed).choice(count, size=(n_bootstrap, subset_size), replace=True)


def _numbers(data: Sequence[Any]) -> np.ndarray | None:
    """The data as finite float64; None if it is anything else."""
    if not all(isinstance(value, (bool, int, float, np.number)) for value in data):
        return None
    values = np.asarray(data, dtype=np.float64)
    return values if np.isfinite(values).all() else None


def _majority(
    data: Sequence[dict[str, Any]], drawn: np.ndarray, vote_key: str, val_key: str
) -> list[np.ndarray] | None:
    """The value of the first answer that voted as most did; of equal votes the one that came first."""
    values = _numbers([entry[val_key] for entry in data])
    if values is None:
        return None
    votes = pd.factorize(np.array([entry[vote_key] for entry in data], dtype=object))[0][drawn]
    alike = (votes[:, :, None] == votes[:, None, :]).sum(2)
    return [values[drawn[np.arange(len(drawn)), alike.argmax(1)]]]
