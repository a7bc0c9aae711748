"""Every statistic of `Groups` equals the plain Python one, whatever the order, labels and counted rows."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_plugins import Groups
from verl_plugins.groups import RUNS_FROM

FEW = settings(max_examples=60, deadline=None)
VALUES = st.one_of(st.integers(-3, 3).map(float), st.floats(-1e3, 1e3, width=32))


@st.composite
def grouped(draw, mask: bool = True):
    """Labels, values and counted rows."""
    labels = draw(st.lists(st.sampled_from("abcde"), min_size=1, max_size=30))
    values = draw(st.lists(VALUES, min_size=len(labels), max_size=len(labels)))
    counted = (
        draw(st.lists(st.booleans(), min_size=len(labels), max_size=len(labels))) if mask else [True] * len(labels)
    )
    return labels, torch.tensor(values, dtype=torch.float64), torch.tensor(counted)


def members(labels, values, counted) -> dict[str, list[float]]:
    found = defaultdict(list)
    for label, value, counts in zip(labels, values.tolist(), counted.tolist(), strict=True):
        found[label] += [value] if counts else []
    return found


def rank(value: float, counts: bool, others: list[float]) -> float:
    return sum(o < value for o in others) + (sum(o == value for o in others) - counts) / 2


REFERENCE = {
    "sum": sum,
    "mean": lambda v: statistics.fmean(v) if v else 0,
    "std": lambda v: statistics.stdev(v) if len(v) > 1 else 0,
    "min": lambda v: min(v, default=0),
    "max": lambda v: max(v, default=0),
    "median": lambda v: statistics.median_low(v) if v else 0,
}


class TestAgainstPlainPython:
    """Float statistics agree to rounding, order statistics exactly."""

    @FEW
    @given(grouped())
    def test_statistics(self, rows):
        labels, values, counted = rows
        groups, reference = Groups(labels, counted), members(*rows)
        for name, plain in REFERENCE.items():
            expected = torch.tensor([float(plain(reference[label])) for label in labels], dtype=torch.float64)
            found = getattr(groups, name)(values)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")

    @FEW
    @given(grouped(), st.booleans())
    def test_moments(self, rows, unbiased):
        labels, values, counted = rows
        groups, reference = Groups(labels, counted), members(*rows)
        deviation = statistics.stdev if unbiased else statistics.pstdev
        means = [statistics.fmean(reference[label]) if reference[label] else 0.0 for label in labels]
        stds = [deviation(reference[label]) if len(reference[label]) > 1 else 0.0 for label in labels]
        mean, std = groups.moments(values, unbiased)
        torch.testing.assert_close(mean, torch.tensor(means, dtype=torch.float64), rtol=1e-9, atol=1e-7)
        torch.testing.assert_close(std, torch.tensor(stds, dtype=torch.float64), rtol=1e-9, atol=1e-7)
        assert torch.equal(groups.std(values, unbiased), std)
        assert torch.equal(groups.moments(values)[1], groups.std(values, unbiased=True))

    @FEW
    @given(grouped())
    def test_rank(self, rows):
        labels, values, counted = rows
        reference = members(*rows)
        expected = [
            rank(value, counts, reference[label])
            for label, value, counts in zip(labels, values.tolist(), counted.tolist(), strict=True)
        ]
        assert Groups(labels, counted).rank(values).tolist() == expected

    @FEW
    @given(grouped())
    def test_flags(self, rows):
        labels, values, counted = rows
        groups, flags = Groups(labels, counted), values > 0
        reference = members(labels, flags, counted)
        assert groups.count().tolist() == [len(reference[label]) for label in labels]
        assert groups.any(flags).tolist() == [any(reference[label]) for label in labels]
        assert groups.all(flags).tolist() == [bool(reference[label]) and all(reference[label]) for label in labels]
        assert groups.sum(flags).tolist() == [sum(reference[label]) for label in labels]

    @FEW
    @given(grouped())
    def test_first(self, rows):
        labels, values, counted = rows
        seen, expected = set(), []
        for label, flag, counts in zip(labels, (values > 0).tolist(), counted.tolist(), strict=True):
            expected.append(flag and counts and label not in seen)
            seen |= {label} if expected[-1] else set()
        assert Groups(labels, counted).first(values > 0).tolist() == expected

    @FEW
    @given(grouped())
    def test_per_group(self, rows):
        labels, values, counted = rows
        groups = Groups(labels, counted)
        smallest = groups.min(values)
        found = dict(zip(groups.labels, groups.per_group(smallest).tolist(), strict=True))
        assert [found[label] for label in labels] == smallest.tolist()
        assert groups.per_group(smallest > 0).dtype == torch.bool


class TestLaws:
    """What must hold without a reference."""

    @FEW
    @given(grouped(), st.randoms(use_true_random=False))
    def test_row_order_and_labels_do_not_matter(self, rows, random):
        labels, values, counted = rows
        order = random.sample(range(len(labels)), len(labels))
        renamed = [{"a": 7, "b": -1, "c": 0, "d": -2, "e": 3}[labels[row]] for row in order]
        one, other = Groups(labels, counted), Groups(renamed, counted[order])
        for name in REFERENCE:
            torch.testing.assert_close(
                getattr(one, name)(values)[order], getattr(other, name)(values[order]), rtol=1e-9, atol=1e-7
            )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("value", [0.1, 0.2, 0.3, 0.7, 1 / 3, 1e-8, 1e8, -2.5])
    @pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 12, 16, 100, 1000])
    def test_equal_groups_do_not_vary(self, dtype, value, size):
        values = torch.cat([torch.full((size,), value), torch.arange(5.0)]).to(dtype)
        groups = Groups(["equal"] * size + ["other"] * 5)
        mean, std = groups.moments(values)
        assert (mean[:size] == values[:size]).all()
        assert (std[:size] == 0).all()

    def test_a_far_member_costs_no_precision(self):
        values = torch.tensor([1e6, 0.25, 0.5, 0.75], dtype=torch.float64)
        assert Groups(["a"] * 4).mean(values)[0].item() == pytest.approx(values.mean().item(), rel=1e-15)

    def test_lower_median_of_even_groups(self):
        assert Groups(["a"] * 4).median(torch.tensor([4.0, 1.0, 3.0, 2.0])).tolist() == [2.0] * 4

    def test_more_groups_than_16_bits(self):
        labels = torch.arange(70_000).repeat(2)
        values = torch.cat([torch.zeros(70_000), torch.ones(70_000)])
        assert (Groups(labels).max(values) == 1).all()


class TestInputs:
    """Labels of any kind; wrong shapes are refused."""

    @pytest.mark.parametrize(
        "labels", [["x", "y", "x"], [5, -1, 5], np.array(["x", "y", "x"]), torch.tensor([3, 4, 3]), ("x", "y", "x")]
    )
    def test_labels(self, labels):
        groups = Groups(labels)
        assert len(groups) == 2
        assert groups.index.tolist() == [0, 1, 0]

    def test_dtypes(self):
        groups = Groups(["a", "a"])
        whole = torch.tensor([1, 2])
        assert groups.max(whole).dtype == groups.sum(whole).dtype == torch.int64
        assert groups.mean(whole).dtype == torch.float32
        assert groups.mean(whole.half()).dtype == torch.float16

    def test_shapes(self):
        with pytest.raises(ValueError, match="one value per row: 2, got \\(3,\\)"):
            Groups(["a", "b"]).mean(torch.zeros(3))
        with pytest.raises(ValueError, match="counted has shape"):
            Groups(["a", "b"], torch.ones(3, dtype=torch.bool))


class TestManyRows:
    """From RUNS_FROM rows on, neighbours of one label are looked up once; what comes out is the same."""

    PATTERNS = {
        "neighbours": lambda row: row // 4,
        "a, b, a, c": lambda row: (0, 1, 0, 2)[row // 8 % 4] + 3 * (row // 512),
        "from the end again": lambda row: min(row, 5000 - row) // 2,
        "a first run of one": lambda row: (row + 3) // 4,
        "alternating": lambda row: row % 7,
        "one": lambda row: 0,
        "all different": lambda row: row,
    }

    @pytest.mark.parametrize("rows", [RUNS_FROM - 1, RUNS_FROM, RUNS_FROM + 1, 5001])
    @pytest.mark.parametrize("pattern", PATTERNS)
    @pytest.mark.parametrize("kind", ["text", "numbers", "tensor"])
    def test_labels(self, rows, pattern, kind):
        numbers = [self.PATTERNS[pattern](row) for row in range(rows)]
        labels = [f"{number}-1-0" for number in numbers] if kind == "text" else numbers
        groups = Groups(torch.tensor(labels) if kind == "tensor" else np.array(labels, dtype=object))
        assert groups.labels.tolist() == list(dict.fromkeys(labels))
        assert groups.labels[groups.index.numpy()].tolist() == labels
        sizes = Counter(labels)
        assert groups.count().tolist() == [sizes[label] for label in labels]

    @pytest.mark.parametrize("labels", [[], ["a"], ["a", "a"], ["a", "b"], ["a", "a", "b", "a"]])
    def test_few(self, labels):
        groups = Groups(labels)
        assert groups.labels.tolist() == list(dict.fromkeys(labels))
        assert groups.labels[groups.index.numpy()].tolist() == labels

    def test_more_groups_than_16_bits_can_number(self):
        count = (1 << 16) + 9
        label, value = torch.arange(2 * count) % count, torch.arange(2 * count).flip(0).float()
        groups = Groups(label)
        assert torch.equal(groups.max(value), value[:count].repeat(2))
        assert torch.equal(groups.min(value), value[count:].repeat(2))

    def test_groups_of_different_sizes(self):
        """The longest decides how wide the table is, also where the rows would fill another one."""
        labels, values = list("aabbbbcccd"), torch.tensor([3.0, 1, 5, 4, 9, 7, 2, 8, 6, 0])
        groups = Groups(labels)
        assert groups.min(values).tolist() == [1, 1, 4, 4, 4, 4, 2, 2, 2, 0]
        assert groups.max(values).tolist() == [3, 3, 9, 9, 9, 9, 8, 8, 8, 0]
        assert groups.median(values).tolist() == [1, 1, 5, 5, 5, 5, 6, 6, 6, 0]

    def test_groups_that_do_not_count_beside_one_that_does(self):
        groups = Groups(list("aabcd"), torch.tensor([True, True, False, False, False]))
        assert groups.max(torch.tensor([1.0, 2, 3, 4, 5])).tolist() == [2, 2, 0, 0, 0]
        assert groups.median(torch.tensor([1.0, 2, 3, 4, 5])).tolist() == [1, 1, 0, 0, 0]
