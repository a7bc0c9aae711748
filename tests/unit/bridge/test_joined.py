"""Metrics of the loss: whole, whatever each micro-batch and each rank has logged."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from verl_plugins.bridge.joined import JoinedMetrics
from verl_plugins.errors import DataError


def over_ranks(reduce: str, *ranks: list[float], mini_batches: int = 1) -> tuple[str, list[float]] | None:
    """What reaches the driver when each rank logs its values, in every mini-batch."""
    joined = JoinedMetrics()
    for _ in range(mini_batches):
        own = [JoinedMetrics() for _ in ranks]
        for metrics, values in zip(own, ranks, strict=True):
            for value in values:
                metrics.add("a", value, reduce)
        joined.join([metrics.leave() for metrics in own])
    return joined.take().get("a")


@pytest.mark.parametrize(
    ("reduce", "expected"), [("mean", ("mean", [3.0])), ("sum", ("mean", [9.0])), ("min", ("min", [1.0]))]
)
def test_ranks_may_log_unequally_often(reduce: str, expected: tuple[str, list[float]]) -> None:
    assert over_ranks(reduce, [1.0, 2.0], [6.0]) == expected
    assert over_ranks(reduce, [1.0, 2.0, 6.0]) == expected
    assert over_ranks(reduce, [], [1.0], [2.0, 6.0], []) == expected


def test_the_largest_stays_the_largest_over_mini_batches_whatever_its_name() -> None:
    assert over_ranks("max", [1.0], [5.0], mini_batches=2) == ("max", [5.0, 5.0])


def test_a_key_that_nobody_logs_is_not_there() -> None:
    assert over_ranks("mean", [], []) is None


def test_a_key_may_be_logged_in_one_mini_batch_only() -> None:
    joined = JoinedMetrics()
    joined.add("early", 1, "mean")
    joined.close_mini_batch()
    joined.add("late", torch.tensor(2.0), "max")
    joined.close_mini_batch()
    assert joined.take() == {"early": ("mean", [1.0]), "late": ("max", [2.0])}
    assert joined.take() == {}


@pytest.mark.parametrize(
    ("value", "reduce", "part"),
    [
        (1.0, "maximum", "did you mean 'max'"),
        (1.0, "median", "reduce='median'"),
        (torch.ones(2), "mean", "must be one number"),
        ("high", "mean", "must be one number"),
        (None, "sum", "must be one number"),
        (1.0, "sum", "reduce='mean' and with reduce='sum'"),
    ],
)
def test_what_cannot_be_joined_is_refused(value: object, reduce: str, part: str, sentence: Callable) -> None:
    metrics = JoinedMetrics()
    metrics.add("plugins/x/a", 1.0, "mean")
    with pytest.raises(DataError) as error:
        metrics.add("plugins/x/a" if "with reduce" in part else "plugins/x/b", value, reduce)
    sentence(error.value, "plugins/x/", part)
