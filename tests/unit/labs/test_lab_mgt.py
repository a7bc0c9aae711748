"""Updates of deep stacks and the geometry of their states: formulas in plain Python, degenerate cases, and the lab."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_page import not_on_page

from verl_plugins.labs import mgt
from verl_plugins.labs.mgt import (
    Settings,
    delta_update,
    depth_geometry,
    doubly_stochastic,
    effective_rank,
    erasing_update,
    gated,
    pairwise_cosine,
    signed_beta,
)

FEW = settings(max_examples=40, deadline=None)
SEED = st.integers(0, 10_000)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


@FEW
@given(SEED, st.integers(1, 6), st.integers(1, 6))
def test_effective_rank_is_between_1_and_the_rank_and_knows_no_scale(seed, tokens, width):
    states = drawn(seed, tokens, width)
    found = float(effective_rank(states))
    assert 1 - 1e-9 <= found <= min(tokens, width) + 1e-9
    assert float(effective_rank(7 * states)) == pytest.approx(found)
    turned = torch.linalg.qr(drawn(seed + 1, width, width)).Q
    assert float(effective_rank(states @ turned)) == pytest.approx(found)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_tokens_at_right_angles_have_full_rank(size):
    assert float(effective_rank(torch.eye(size).double())) == pytest.approx(size)
    assert float(effective_rank(torch.ones(size, 4).double())) == pytest.approx(1)


def test_two_directions_of_unequal_size_in_plain_python():
    shares = [0.75, 0.25]
    expected = math.exp(-sum(p * math.log(p) for p in shares))
    assert float(effective_rank(torch.diag(torch.tensor([3.0, 1.0, 0.0])).double())) == pytest.approx(expected)


@FEW
@given(SEED, st.integers(2, 6), st.integers(1, 5))
def test_the_mean_cosine_is_that_over_all_pairs(seed, tokens, width):
    states = drawn(seed, tokens, width)
    unit = [[value / math.sqrt(sum(v * v for v in row)) for value in row] for row in states.tolist()]
    pairs = [
        sum(a * b for a, b in zip(unit[i], unit[j], strict=True))
        for i in range(tokens)
        for j in range(tokens)
        if i != j
    ]
    assert float(pairwise_cosine(states)) == pytest.approx(sum(pairs) / len(pairs), abs=1e-9)


def test_a_single_token_has_cosine_1_and_rank_1():
    found = depth_geometry(drawn(0, 3, 1, 5))
    assert found["mean_pairwise_cosine"].tolist() == [1, 1, 1]
    assert found["effective_rank"].tolist() == pytest.approx([1, 1, 1])


@FEW
@given(SEED, st.lists(st.booleans(), min_size=4, max_size=4).filter(any))
def test_padding_is_left_out(seed, kept):
    states, mask = drawn(seed, 3, 4, 5), torch.tensor(kept)
    changed = torch.where(mask[:, None], states, 100 * drawn(seed + 1, 3, 4, 5))
    one, two, short = (depth_geometry(*given) for given in ((states, mask), (changed, mask), (states[:, mask],)))
    for name, value in one.items():
        assert torch.equal(value, two[name]) and torch.equal(value, short[name]), name


@FEW
@given(SEED)
def test_steps_between_layers_in_plain_python(seed):
    states = drawn(seed, 2, 3, 4)
    found = depth_geometry(states)

    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    before, after, step = states[0].tolist(), states[1].tolist(), (states[1] - states[0]).tolist()
    assert found["layer_to_layer_cosine"].tolist() == pytest.approx([sum(map(cosine, before, after)) / 3])
    assert found["update_alignment"].tolist() == pytest.approx([sum(map(cosine, before, step)) / 3])
    norms = [[math.sqrt(sum(x * x for x in row)) for row in layer] for layer in states.tolist()]
    assert found["mean_norm"].tolist() == pytest.approx([sum(row) / 3 for row in norms])


@FEW
@given(SEED, st.floats(0.05, 2))
def test_a_delta_update_moves_along_k_only_towards_v(seed, beta):
    x, k, v = drawn(seed, 3, 5), drawn(seed + 1, 3, 5), drawn(seed + 2, 3)
    unit = k / k.norm(dim=1, keepdim=True)
    moved = delta_update(x, k, torch.full((3,), beta).double(), v)
    along = ((moved - x) * unit).sum(1, keepdim=True) * unit
    assert torch.allclose(moved - x, along, atol=1e-8)
    assert torch.allclose((moved * unit).sum(1), (1 - beta) * (x * unit).sum(1) + beta * v, atol=1e-6)


def test_a_delta_update_along_nothing_is_the_identity():
    x = drawn(1, 3, 5)
    assert torch.equal(delta_update(x, torch.zeros(3, 5).double(), torch.ones(3).double(), torch.ones(3).double()), x)


@FEW
@given(SEED, st.integers(1, 5))
def test_sinkhorn_ends_doubly_stochastic(seed, size):
    found = doubly_stochastic(drawn(seed, size, size), iterations=500, tau=1.0)
    assert float(found.min()) >= 0
    for axis in (0, 1):
        assert torch.allclose(found.sum(axis), torch.ones(size).double(), atol=1e-6)


def test_sinkhorn_normalises_rows_then_columns():
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.5]]).double()
    rows = (logits / 0.5).exp()
    rows = rows / rows.sum(1, keepdim=True)
    assert torch.allclose(doubly_stochastic(logits, 1, 0.5), rows / rows.sum(0, keepdim=True))
    assert torch.allclose(doubly_stochastic(logits, 0, 0.5), (logits / 0.5).exp())


def test_permutations_stay_what_they_are():
    logits = torch.full((4, 4), -8.0).double().fill_diagonal_(0)
    assert torch.allclose(doubly_stochastic(logits), torch.eye(4).double())


@FEW
@given(SEED)
def test_the_block_in_plain_python(seed):
    x, raw, one, two = (drawn(seed + number, *shape) for number, shape in enumerate([(2, 3), (2, 3), (3, 3), (3, 3)]))
    gate, update = gated(x, raw, one)
    y = erasing_update(x, update, signed_beta(x, two, 0.7, 0.1), 0.4)
    for t in range(2):
        row = x[t].tolist()
        scores = [sum(w * v for w, v in zip(weights, row, strict=True)) for weights in one.tolist()]
        mean = sum(scores) / 3
        deviation = math.sqrt(sum((s - mean) ** 2 for s in scores) / 3 + 1e-5)
        for d in range(3):
            open_ = 1 / (1 + math.exp(-(scores[d] - mean) / deviation))
            beta = 0.7 * math.tanh(sum(w * v for w, v in zip(two[d].tolist(), row, strict=True)) + 0.1)
            assert float(gate[t, d]) == pytest.approx(open_)
            assert float(y[t, d]) == pytest.approx(row[d] + beta * (float(raw[t, d]) * open_ - 0.4 * row[d]))


class TestLab:
    @pytest.fixture(scope="class")
    def found(self):
        return mgt.lab(Settings(), 0, lambda share, what: None)

    def test_every_claim_holds_and_stands_on_the_page(self, found):
        assert found.failed == []
        assert not_on_page("mgt", found, close=0.03) == []

    def test_every_stack_starts_with_the_same_tokens(self, found):
        curves = found.panels[0].curves
        assert len(curves) == 8 and len({curve.y[0] for curve in curves}) == 1
        assert all(len(curve.y) == len(curve.x) == 101 for curve in curves)

    def test_a_shallow_stack_loses_no_rank(self):
        found = mgt.lab(Settings(layers=1), 0, lambda share, what: None)
        assert [claim.name for claim in found.failed] == [
            "a residual stack keeps more than one without skips",
            "and more than one with norms after the sum",
        ]

    def test_a_beta_of_0_changes_nothing_and_so_keeps_all(self):
        found = mgt.lab(Settings(layers=2, beta_scale=0), 0, lambda share, what: None)
        still = next(curve for curve in found.panels[0].curves if curve.label == "gate and signed beta")
        assert list(still.y) == pytest.approx([still.y[0]] * 3)
