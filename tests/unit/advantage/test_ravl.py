"""The minimum of heads, their spread and diversity, and what GAE is given of them."""

from __future__ import annotations

import itertools
import math
import statistics
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_plugins import Batch, DataError, Values
from verl_plugins.advantage.ravl import Ravl, aggregate, diversity, spread
from verl_plugins.bridge.defaults import CriticDefaults, DriverDefaults
from verl_plugins.composition import outcome
from verl_plugins.composition.manager import Plugins
from verl_plugins.errors import ResultError
from verl_plugins.testing import FakeRun

FEW = settings(max_examples=30, deadline=None)
MASK = [[1, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
"""Whole; a hole and an observation at the end; empty; length 1."""


def make(heads: torch.Tensor, ends: torch.Tensor, truncated: list[int], mask: list[list[int]] = MASK) -> Batch:
    return Batch.from_tensors(
        uid=[str(row) for row in range(len(mask))],
        rm_scores=torch.zeros(len(mask), len(mask[0])),
        response_mask=torch.tensor(mask),
        truncated=truncated,
        values=heads.mean(-1),
        head_values=heads,
        bootstrap_values=ends,
    )


def asked(batch: Batch, **config) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """What verl's estimator is given, and the metrics."""
    plugins, defaults, run, given = (
        Plugins([Ravl(Ravl.Config(**config))], check=outcome.check),
        DriverDefaults(),
        FakeRun(),
        {},
    )
    plugins.add_fallback(defaults)

    def estimator() -> torch.Tensor:
        given.update(values=batch.values, bootstrap=batch.bootstrap)
        batch.take_assigned()
        return torch.zeros(batch.response_mask.shape)

    defaults.estimator = estimator
    plugins.hook.estimate_advantage(run=run, batch=batch)
    return given, run.metrics


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_smallest_head_is_the_baseline_and_follows_truncated_rows_only() -> None:
    heads, ends = drawn(4, 4, 3), drawn(4, 3, seed=1)
    given, metrics = asked(make(heads, ends, [1, 0, 1, 1]), members=3)
    assert given["values"].tolist() == [[min(token) for token in row] for row in heads.tolist()]
    expected = [min(ends[0].tolist()), 0, 0, min(ends[3].tolist())]
    assert given["bootstrap"].tolist() == pytest.approx(expected), "the empty row contributes nothing"
    assert metrics["truncated_frac"] == 0.5
    assert metrics["bootstrap_mean"] == pytest.approx((expected[0] + expected[3]) / 2)


def test_the_spread_inside_and_at_the_edge_in_plain_python() -> None:
    heads, ends = drawn(4, 4, 3), drawn(4, 3, seed=1)
    _, metrics = asked(make(heads, ends, [1, 0, 1, 1]), members=3)
    inside = [statistics.stdev(heads[r, t].tolist()) for r, t in itertools.product(range(4), range(4)) if MASK[r][t]]
    edge = [statistics.stdev(ends[row].tolist()) for row in (0, 3)]
    assert metrics["ensemble_std_interior"] == pytest.approx(statistics.mean(inside), rel=1e-5)
    assert metrics["ensemble_std_boundary"] == pytest.approx(statistics.mean(edge), rel=1e-5)


@pytest.mark.parametrize("truncated", [[0, 0, 0, 0], [0, 0, 1, 0]])
def test_without_a_truncated_row_there_is_no_edge(truncated: list[int]) -> None:
    given, metrics = asked(make(drawn(4, 4, 3), drawn(4, 3), truncated), members=3)
    assert not given["bootstrap"].any() and metrics["truncated_frac"] == 0
    assert metrics.keys() == {"truncated_frac", "ensemble_std_interior"}


def test_one_head_has_no_spread() -> None:
    heads, ends = drawn(4, 4, 1), drawn(4, 1)
    given, metrics = asked(make(heads, ends, [1, 1, 1, 1]), members=1)
    assert torch.equal(given["values"], heads[..., 0])
    assert given["bootstrap"].tolist() == [*ends[:2, 0].tolist(), 0, ends[3, 0].item()]
    assert metrics.keys() == {"truncated_frac", "bootstrap_mean"} and metrics["truncated_frac"] == 0.75


def test_the_options() -> None:
    heads, ends = drawn(4, 4, 3), drawn(4, 3, seed=1)
    batch = lambda: make(heads, ends, [1, 1, 0, 0])  # noqa: E731
    none, metrics = asked(batch(), members=3, bootstrap="none")
    assert not none["bootstrap"].any() and "bootstrap_mean" not in metrics and "ensemble_std_boundary" in metrics
    mean, _ = asked(batch(), members=3, aggregate="mean")
    torch.testing.assert_close(mean["bootstrap"][:2], ends[:2].mean(-1))
    assert torch.equal(mean["values"], heads.amin(-1))
    base, _ = asked(batch(), members=3, baseline="mean")
    torch.testing.assert_close(base["values"], heads.mean(-1))
    assert torch.equal(base["bootstrap"][:2], ends[:2].amin(-1))


@FEW
@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 10**6))
def test_diversity_in_plain_python(count: int, width: int, seed: int) -> None:
    weights = drawn(count, width, seed=seed).double()
    rows = weights.tolist()
    size = lambda row: math.sqrt(sum(value**2 for value in row)) + 1e-10  # noqa: E731
    cosine = lambda a, b: sum(x * y for x, y in zip(a, b, strict=True)) / size(a) / size(b)  # noqa: E731
    expected = sum(cosine(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j) / (count - 1)
    assert float(diversity(weights)) == pytest.approx(expected, abs=1e-9)
    assert -count / (count - 1) - 1e-9 <= expected <= count + 1e-9
    torch.testing.assert_close(diversity(weights * 7), diversity(weights), atol=1e-4, rtol=0)
    torch.testing.assert_close(diversity(weights.flip(0)), diversity(weights))


def test_diversity_of_a_batch_is_that_of_each_and_a_zero_gradient_is_in_no_direction() -> None:
    weights = drawn(5, 3, 4)
    torch.testing.assert_close(diversity(weights), torch.stack([diversity(one) for one in weights]))
    assert float(diversity(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))) == 0
    assert float(diversity(torch.ones(4, 3))) == pytest.approx(4)


def test_less_diversity_is_more_loss_and_its_gradient_drives_heads_apart() -> None:
    weights = drawn(3, 4).requires_grad_()
    before = diversity(weights)
    before.backward()
    with torch.no_grad():
        assert diversity(weights - 0.05 * weights.grad) < before


def loss_of(heads: int, eta: float, weight: torch.Tensor | None, mask: list[list[int]]) -> tuple[torch.Tensor, dict]:
    told: dict[str, float] = {}
    values = Values(
        values=drawn(2, 3, heads).requires_grad_() * 1.0,
        old_values=drawn(2, 3, heads, seed=1),
        returns=drawn(2, 3, seed=2),
        response_mask=torch.tensor(mask),
        config=SimpleNamespace(cliprange_value=0.5),
        head_weight=weight,
        log=lambda owner, metrics, reduce: told.update(metrics),
    )
    plugins = Plugins([Ravl(Ravl.Config(members=heads, eta=eta))], check=outcome.check)
    plugins.add_fallback(CriticDefaults())
    return plugins.hook.value_loss(values=values), told


def test_heads_regress_to_the_same_returns_and_diversity_is_added_to_every_token() -> None:
    weight, mask = drawn(3, 5, seed=4), [[1, 1, 0], [1, 1, 1]]
    new, old, returns = drawn(2, 3, 3), drawn(2, 3, 3, seed=1), drawn(2, 3, seed=2)
    near = new.clamp(old - 0.5, old + 0.5)
    each = 0.5 * torch.maximum((new - returns[..., None]) ** 2, (near - returns[..., None]) ** 2)
    found, told = loss_of(3, 0.25, weight, mask)
    torch.testing.assert_close(found, each.sum(-1) + 0.25 * diversity(weight))
    assert told == {"diversity": pytest.approx(float(diversity(weight)))}
    torch.testing.assert_close(loss_of(3, 0.0, weight, mask)[0], each.sum(-1))


def test_one_head_has_verls_loss_and_says_nothing() -> None:
    found, told = loss_of(1, 1.0, None, [[1, 1, 0], [1, 1, 1]])
    assert found.shape == (2, 3) and told == {}


def test_padding_says_nothing() -> None:
    assert loss_of(3, 1.0, drawn(3, 5), [[0, 0, 0]] * 2)[1] == {}


def test_aggregates_and_a_spread_of_nothing() -> None:
    assert aggregate(torch.tensor([[3.0, 1.0]])).tolist() == [1]
    assert aggregate(torch.tensor([[3.0, 1.0]]), "mean").tolist() == [2]
    assert spread(drawn(2, 3), torch.zeros(2, dtype=torch.bool)) is None
    assert spread(drawn(2, 1), torch.ones(2, dtype=torch.bool)) is None


class TestBatch:
    def test_what_is_assigned_has_the_shape_and_is_finite(self) -> None:
        batch = make(drawn(4, 4, 2), drawn(4, 2), [0] * 4)
        assert batch.bootstrap.tolist() == [0] * 4
        for name, wrong in (
            ("values", drawn(4, 3)),
            ("values", torch.full((4, 4), math.nan)),
            ("values", [[0.0]]),
            ("values", torch.zeros(4, 4, dtype=torch.int64)),
            ("bootstrap", drawn(4, 2)),
            ("bootstrap", torch.full((4,), math.inf)),
        ):
            with pytest.raises(DataError, match=name):
                setattr(batch, name, wrong)

    def test_after_the_estimator_it_is_too_late(self) -> None:
        batch = make(drawn(4, 4, 2), drawn(4, 2), [0] * 4)
        assert batch.take_assigned() == {}
        with pytest.raises(DataError, match="too late"):
            batch.bootstrap = torch.zeros(4)

    def test_without_a_critic_there_are_none(self) -> None:
        batch = Batch.from_tensors(uid=["0"], rm_scores=torch.zeros(1, 2), response_mask=torch.ones(1, 2))
        with pytest.raises(DataError, match="values"):
            batch.values = torch.zeros(1, 2)


class TestValueLoss:
    def given(self, returned: object, **changed: torch.Tensor) -> None:
        fields = {"values": drawn(2, 3, 2), "old_values": drawn(2, 3, 2), "returns": drawn(2, 3), **changed}
        outcome.check(
            "value_loss",
            returned,
            {"values": Values(response_mask=torch.ones(2, 3), config=None, **fields)},
            wraps=False,
        )

    def test_what_is_no_loss_per_token_is_refused(self) -> None:
        self.given(torch.zeros(2, 3))
        self.given(None)
        for wrong, words in ((torch.zeros(2), "shape"), (0.0, "float"), (torch.full((2, 3), math.nan), "nan")):
            with pytest.raises(ResultError, match=f"value_loss.*{words}"):
                self.given(wrong)

    def test_what_was_given_is_blamed_first(self) -> None:
        with pytest.raises(DataError, match="returns that are not finite"):
            self.given(torch.full((2, 3), math.nan), returns=torch.full((2, 3), math.nan))

    def test_a_tensor_that_was_written_into_is_named(self) -> None:
        values = Values(
            values=drawn(1, 2, 1),
            old_values=drawn(1, 2, 1),
            returns=drawn(1, 2),
            response_mask=torch.ones(1, 2),
            config=None,
        )
        values.scoped("x").returns.add_(1)
        assert values.changed_in_place() == ["returns"]
