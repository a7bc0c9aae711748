"""Updates of deep stacks and the geometry of their states: formulas in plain Python, degenerate cases, and the lab."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_page import PAGES, not_on_page

from verl_plugins.diagnostics.mgt import depth_geometry, effective_rank, pairwise_cosine
from verl_plugins.labs import mgt
from verl_plugins.labs.mgt import Settings, delta_update, doubly_stochastic, erasing_update, gated, signed_beta

FEW = settings(max_examples=40, deadline=None)
PAGE = PAGES / "mgt.md"
NAMED = r"(\w[\w ,.-]*?) (\d+\.\d) / (\d\.\d\d)"
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


class TestStacks:
    """What each kind of stack makes of x, written once more."""

    ALPHA, SCALE = 0.3, 0.6

    @pytest.fixture
    def step(self):
        x, one, other, inner = (drawn(seed, 64, 64) / 8 for seed in range(4))

        def sublayer(h):
            return torch.sin(h @ inner)

        made = mgt.stacks(Settings(beta_scale=self.SCALE, alpha=self.ALPHA))
        return x, sublayer, one, other, {name: stack(x, sublayer, one, other) for name, stack in made.items()}

    def norm(self, x):
        return (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    def test_without_and_with_skips(self, step):
        x, sublayer, _, _, made = step
        assert torch.allclose(made["no skip"], sublayer(self.norm(x)))
        assert torch.allclose(made["post-norm"], self.norm(x + sublayer(x)))
        assert torch.allclose(made["pre-norm residual"], x + sublayer(self.norm(x)))

    def test_gates_and_signs(self, step):
        x, sublayer, one, other, made = step
        update = sublayer(self.norm(x)) * self.norm(x @ one.T).sigmoid()
        beta = self.SCALE * (x @ other.T).tanh()
        assert torch.allclose(made["gate"], x + update)
        assert torch.allclose(made["gate and signed beta"], x + beta * update)
        assert torch.allclose(made["the same, alpha 0.3"], x + beta * (update - self.ALPHA * x))

    def test_delta_learning(self, step):
        x, sublayer, one, other, made = step
        k = sublayer(self.norm(x))
        k = k / k.norm(dim=1, keepdim=True)
        beta, v = 2 * (self.norm(x) @ one[0]).sigmoid(), 4 * (x @ other[0]).sigmoid()
        expected = x + beta[:, None] * (v - (k * x).sum(1))[:, None] * k
        assert torch.allclose(made["delta learning"], expected)

    def test_streams(self, step):
        """Twice: at first all streams are x."""
        x, sublayer, one, other, made = step
        mixing = doubly_stochastic(one[:4, :4])
        read, write = ((8 * other[row, :4]).softmax(0) for row in (0, 1))
        first = made["four streams, mixed"]
        for stream in range(4):
            expected = mixing[stream].sum() * x + write[stream] * sublayer(self.norm(x))
            assert torch.allclose(first[stream], expected)
        second = mgt.stacks(Settings())["four streams, mixed"](first, sublayer, one, other)
        seen = sum(read[stream] * first[stream] for stream in range(4))
        for stream in range(4):
            expected = sum(mixing[stream, other_] * first[other_] for other_ in range(4))
            assert torch.allclose(second[stream], expected + write[stream] * sublayer(self.norm(seen)))

    def test_sublayers_are_attention_and_mlp_with_weights_that_keep_the_size(self):
        """Of tokens with unit entries, a layer's values have about unit entries, an MLP's half of them."""
        layers = list(mgt.sublayers(20, torch.Generator().manual_seed(0)))
        assert len(layers) == 40
        same = torch.ones(5, 1).double() * drawn(1, 1, 64)
        for attention, mlp in zip(layers[::2], layers[1::2], strict=True):
            out = attention(same)
            assert torch.allclose(out, out[:1].expand_as(out))  # what is attended to is the same everywhere
            assert torch.allclose(mlp(3 * same), 3 * mlp(same))
        sizes = [[float(one(same).square().mean() / same.square().mean()) for one in layers[n::2]] for n in (0, 1)]
        assert sum(sizes[0]) / 20 == pytest.approx(1, abs=0.15)
        assert sum(sizes[1]) / 20 == pytest.approx(0.5, abs=0.1)


class TestClaims:
    NAMES = ("none", "post", "residual", "gate", "streams", "delta", "signed", "erasing")
    RANKS = {"none": 1, "post": 2, "residual": 5, "gate": 6, "streams": 4, "delta": 7, "signed": 8, "erasing": 7}

    def failed(self, **ranks: float) -> list[int]:
        """Places of the claims that fail when the last of three seeds has these ranks."""
        ends = {name: torch.tensor([rank, rank, ranks.get(name, rank)]).double() for name, rank in self.RANKS.items()}
        found = mgt._claims(ends, list(self.NAMES))
        return [place for place, claim in enumerate(found) if not claim.holds]

    def test_each_is_false_when_one_seed_says_otherwise(self):
        assert self.failed() == []
        assert self.failed(none=2.6) == [0] and self.failed(none=2.4) == []
        assert self.failed(post=2.6) == [1] and self.failed(post=2.4) == []
        assert self.failed(residual=6.1, none=1) == [2]
        assert self.failed(signed=6.5) == [4] and self.failed(signed=5.5) == [3, 4]
        assert self.failed(erasing=5.9) == [5]
        assert self.failed(streams=100) == []

    def test_the_factor_is_told_where_there_is_one(self):
        ends = {name: torch.tensor([float(rank)]) for name, rank in self.RANKS.items()}
        told = [claim.expected.count("by a factor of 2 ") for claim in mgt._claims(ends, list(self.NAMES))]
        assert told == [1, 1, 0, 0, 0, 0]


class TestLab:
    @pytest.fixture(scope="class")
    def found(self):
        return mgt.lab(Settings(), 0, lambda share, what: None)

    def test_every_claim_holds_and_stands_on_the_page(self, found):
        assert found.failed == []
        assert not_on_page("mgt", found, close=0.03) == []

    def test_ranks_and_cosines_that_are_told_are_on_the_page(self, found):
        told = [(name, *map(float, pair)) for name, *pair in re.findall(NAMED, found.notes[0])]
        page = [
            (name, *map(float, pair))
            for name, *pair in re.findall(NAMED, PAGE.read_text().split("## Measured here")[1])
        ]
        assert [numbers for _, *numbers in told] == [pytest.approx(numbers, abs=0.5) for _, *numbers in page]
        assert len(told) == 8
        curves = {curve.label: curve.y[-1] for curve in found.panels[0].curves}
        assert [rank for _, rank, _ in told] == pytest.approx(list(curves.values()), abs=0.06)
        assert found.notes[1].split()[8] == f"{found.panels[0].curves[0].y[0]:.1f}:"

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
