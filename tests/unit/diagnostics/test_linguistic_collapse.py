"""Neural collapse by its formulas in plain Python, label modes, fixed classes, and what is left out."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from states import batch_of, hidden_of

from verl_plugins import CompositionError
from verl_plugins.composition.settings import typed
from verl_plugins.diagnostics.classes import by_class, quotient
from verl_plugins.diagnostics.linguistic_collapse import (
    LinguisticCollapse,
    agreement,
    cdnv,
    duality,
    geometry,
    rows_of,
)
from verl_plugins.testing import FakeRun

FEW = settings(max_examples=40, deadline=None)
SEED, CLASSES, WIDTH = st.integers(0, 10_000), st.integers(3, 6), st.integers(2, 5)


def drawn(seed: int, classes: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and labels, at least two of each class."""
    generator = torch.Generator().manual_seed(seed)
    more = torch.randint(classes, (8,), generator=generator)
    labels = torch.cat([torch.arange(classes).repeat(2), more])
    return torch.randn(len(labels), width, generator=generator).double(), labels


def by_hand(features: torch.Tensor, labels: torch.Tensor) -> tuple[list[list[float]], list[float], list[int]]:
    """Means, spreads and counts."""
    means, spreads, counts = [], [], []
    for label in sorted(set(labels.tolist())):
        rows = [row for row, one in zip(features.tolist(), labels.tolist(), strict=True) if one == label]
        mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        means.append(mean)
        spreads.append(sum(sum((x - m) ** 2 for x, m in zip(row, mean, strict=True)) for row in rows) / len(rows))
        counts.append(len(rows))
    return means, spreads, counts


@FEW
@given(SEED, CLASSES, WIDTH)
def test_variability_is_that_of_the_formula(seed, classes, width):
    features, labels = drawn(seed, classes, width)
    means, spreads, counts = by_hand(features, labels)
    found = by_class(features, labels)
    assert found.counts.tolist() == counts and found.ids.tolist() == list(range(classes))
    for power in (1, 2):
        pairs = [
            (spreads[i] + spreads[j]) / 2 / math.dist(means[i], means[j]) ** (2 * power)
            for i, j in itertools.combinations(range(classes), 2)
        ]
        assert cdnv(found, power) == pytest.approx(statistics.fmean(pairs))
    centre = [statistics.fmean(column) for column in zip(*means, strict=True)]
    within = sum(n * v for n, v in zip(counts, spreads, strict=True)) / sum(counts)
    between = statistics.fmean(math.dist(mean, centre) ** 2 for mean in means)
    assert float(quotient(found)) == pytest.approx(within / between)


@FEW
@given(SEED, CLASSES, WIDTH)
def test_geometry_and_duality_are_those_of_the_formulas(seed, classes, width):
    features, labels = drawn(seed, classes, width)
    means, _, _ = by_hand(features, labels)
    centre = [statistics.fmean(column) for column in zip(*means, strict=True)]
    centred = [[x - c for x, c in zip(mean, centre, strict=True)] for mean in means]
    norms = [math.hypot(*mean) for mean in centred]
    units = [[x / norm for x in mean] for mean, norm in zip(centred, norms, strict=True)]
    pairs = list(itertools.combinations(range(classes), 2))
    kernel = [-math.log(math.dist(units[i], units[j])) for i, j in pairs]
    found = geometry(by_class(features, labels))
    assert found["logkernel_var"] == pytest.approx(statistics.pvariance(kernel))
    assert found["norm_cv"] == pytest.approx(statistics.stdev(norms) / statistics.fmean(norms))
    assert found["interfere_mean"] == pytest.approx(
        statistics.fmean(sum(a * b for a, b in zip(centred[i], centred[j], strict=True)) for i, j in pairs)
    )
    head = drawn(seed + 1, classes, width)[0][:classes]
    cosines = [
        sum(a * b for a, b in zip(row, unit, strict=True)) / math.hypot(*row)
        for row, unit in zip(head.tolist(), units, strict=True)
    ]
    dual = duality(by_class(features, labels), head)
    assert dual["simcos_mean"] == pytest.approx(statistics.fmean(cosines))
    assert dual["simcos_var"] == pytest.approx(statistics.variance(cosines))


@FEW
@given(SEED, CLASSES, WIDTH, st.floats(0.01, 100))
def test_order_place_and_scale(seed, classes, width, scale):
    features, labels = drawn(seed, classes, width)
    one = by_class(features, labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    other = by_class(scale * features[order] + 3.0, labels[order])
    assert float(quotient(other)) == pytest.approx(float(quotient(one)), rel=1e-6)
    assert cdnv(other, 1) == pytest.approx(cdnv(one, 1), rel=1e-6)
    assert cdnv(other, 2) == pytest.approx(cdnv(one, 2) / scale**2, rel=1e-6)


def test_a_simplex_is_a_simplex_and_two_classes_always_are():
    frame = torch.eye(4).double().repeat_interleave(2, 0)
    labels = torch.arange(4).repeat_interleave(2)
    classes = by_class(frame, labels)
    found = geometry(classes)
    assert found["etf_error"] == pytest.approx(0, abs=1e-12) and found["logkernel_var"] == pytest.approx(0, abs=1e-24)
    assert duality(classes, classes.centred)["dual_error"] == pytest.approx(0, abs=1e-12)
    two = by_class(torch.randn(6, 3).double(), torch.tensor([0, 1] * 3))
    assert geometry(two)["etf_error"] == pytest.approx(0, abs=1e-12)


class TestSelection:
    CLASSES = by_class(torch.randn(11, 2).double(), torch.tensor([5] * 4 + [2] * 3 + [9] * 3 + [1]))

    def test_bounds(self):
        assert self.CLASSES.selected(3).ids.tolist() == [2, 5, 9]
        assert self.CLASSES.selected(1, below=4).ids.tolist() == [1, 2, 9]
        assert self.CLASSES.selected(5).ids.tolist() == []

    def test_the_most_frequent_and_of_equals_the_first(self):
        assert self.CLASSES.selected(most=1).ids.tolist() == [5]
        assert self.CLASSES.selected(most=2).ids.tolist() == [2, 5]
        assert self.CLASSES.selected(4, most=3).ids.tolist() == [5]

    def test_rows_of_the_head_by_class(self):
        labels = torch.tensor([9, 2, 5, 9, 1])
        rows = rows_of(self.CLASSES.selected(3), labels, labels[:, None].float() * torch.tensor([1.0, 10.0]))
        assert rows.tolist() == [[2, 20], [5, 50], [9, 90]]


class TestAgreement:
    CLASSES = by_class(torch.tensor([[1.0, 0], [0, 4.0]]).double(), torch.tensor([0, 3]))
    FEATURES = torch.tensor([[0.9, 0], [0, 3.0], [0, 1.0], [0.1, 0]])

    def test_nearest_of_the_observed(self):
        assert agreement(self.CLASSES, self.FEATURES, torch.tensor([0, 3, 0, 7])) == 0.75

    def test_the_rest_of_the_vocabulary_is_at_zero_and_its_first_token_counts(self):
        assert agreement(self.CLASSES, self.FEATURES, torch.tensor([0, 3, 1, 1]), never_seen=True) == 1
        first = by_class(torch.tensor([[1.0, 0]]).double(), torch.tensor([0]))
        assert agreement(first, self.FEATURES[3:], torch.tensor([1]), never_seen=True) == 1
        assert agreement(first, self.FEATURES[3:], torch.tensor([0]), never_seen=True, vocabulary=1) == 1


class TestPlugin:
    """Two tokens of each of six responses to two prompts."""

    UID = ["1-1-0"] * 3 + ["2-1-1"] * 3
    ROWS = [row for row in range(6) for _ in range(2)]

    def plugin(self, **settings: object) -> LinguisticCollapse:
        given = {"freq": 1, "min_per_class": 2, "holdout": 0.0} | settings
        return LinguisticCollapse(typed(LinguisticCollapse.Config, given, "plugins.linguistic_collapse"))

    def hidden(self, labels: list[int], seed: int = 0, same: bool = False):
        states = torch.randn(12, 1, 4, generator=torch.Generator().manual_seed(seed))
        pooled = states.view(6, 2, 1, 4).mean(1)
        if same:
            pooled = pooled[[0, 0, 0, 3, 3, 3]]
        label = torch.tensor(labels)
        return hidden_of(states, self.ROWS, pooled, label=label, head_row=torch.eye(9, 4)[label], argmax=label)

    def logged(self, plugin: LinguisticCollapse, hidden, step: int = 1, **more: object) -> dict[str, float]:
        run = FakeRun(step=step)
        plugin.observe(run=run, batch=batch_of(hidden, self.UID, [1, 0, 1, 0, 0, 1], **more))
        assert all(math.isfinite(value) for value in run.metrics.values())
        return run.metrics

    def test_identical_rollouts_have_a_quotient_of_zero(self):
        found = self.logged(self.plugin(labels=["uid"]), self.hidden([0] * 12, same=True))
        assert found["uid_quotient"] == pytest.approx(0, abs=1e-12) and found["uid_cdnv"] == pytest.approx(0, abs=1e-12)
        assert self.logged(self.plugin(labels=["uid"]), self.hidden([0] * 12))["uid_quotient"] > 0.01

    def test_classes_of_each_mode(self):
        hidden = self.hidden([0, 1, 2] * 4)
        found = self.logged(self.plugin(), hidden)
        assert [found[f"{mode}_n_classes"] for mode in ("token", "uid", "outcome")] == [3, 2, 2]
        assert [found[f"{mode}_n_samples"] for mode in ("token", "uid", "outcome")] == [12, 6, 6]
        pooled = hidden.pooled[:, 0]
        for mode, labels in (("uid", [0, 0, 0, 1, 1, 1]), ("outcome", [1, 0, 1, 0, 0, 1])):
            expected = float(quotient(by_class(pooled, torch.tensor(labels))))
            assert found[f"{mode}_quotient"] == pytest.approx(expected)
            assert not {f"{mode}_agreement", f"{mode}_unc3", f"{mode}_norm_cv"} & found.keys()
        assert {"token_unc3", "token_simcos_mean", "token_gnc2_var", "token_norm_cv"} <= found.keys()

    def test_a_response_without_generated_tokens_has_no_part(self):
        mask = torch.tensor([[1.0], [1], [0], [1], [1], [1]])
        found = self.logged(self.plugin(labels=["uid"]), self.hidden([0] * 12), response_mask=mask)
        assert found["uid_n_samples"] == 5

    def test_a_lone_response_is_no_class(self):
        plugin, run = self.plugin(labels=["uid"]), FakeRun()
        hidden = self.hidden([0] * 12)
        plugin.observe(run=run, batch=batch_of(hidden, ["1-1-0"] * 5 + ["2-1-1"], [0.0] * 6))
        assert run.metrics == {"uid_n_classes": 1, "uid_n_samples": 5}

    def test_all_right_leaves_no_classes_of_outcome(self):
        run = FakeRun()
        self.plugin(labels=["outcome"]).observe(run=run, batch=batch_of(self.hidden([0] * 12), self.UID, [1.0] * 6))
        assert run.metrics == {"outcome_n_classes": 1, "outcome_n_samples": 6}

    def test_classes_stay_those_of_the_first_step_also_after_a_resume(self):
        plugin = self.plugin(labels=["token"], max_classes=2)
        assert self.logged(plugin, self.hidden([0] * 6 + [1] * 4 + [2] * 2))["token_n_classes"] == 2
        later = self.plugin(labels=["token"], max_classes=2)
        later.load_state_dict(plugin.state_dict())
        new = self.hidden([2] * 6 + [1] * 5 + [0], seed=1)
        assert self.logged(later, new, step=2) == {"token_n_classes": 1, "token_n_samples": 5}
        free = self.plugin(labels=["token"], fixed_classes=False)
        self.logged(free, self.hidden([0] * 6 + [1] * 6))
        assert self.logged(free, new, step=2)["token_n_samples"] == 11

    def test_a_step_with_too_few_classes_is_no_reference(self):
        plugin = self.plugin(labels=["token"], min_per_class=5)
        assert self.logged(plugin, self.hidden([0] * 8 + [1] * 4))["token_n_classes"] == 1
        assert plugin.reference is None
        assert self.logged(plugin, self.hidden([2] * 6 + [1] * 6), step=2)["token_n_classes"] == 2
        assert plugin.reference.tolist() == [1, 2]

    def test_agreement_is_measured_on_tokens_that_made_no_mean(self):
        plugin = self.plugin(labels=["token"], holdout=0.5, min_per_class=1)
        found = self.logged(plugin, self.hidden([0, 1] * 6))
        assert 0 < found["token_n_samples"] < 12 and 0 <= found["token_agreement"] <= 1
        assert "token_agreement" not in self.logged(self.plugin(labels=["token"]), self.hidden([0, 1] * 6))

    def test_fewer_tokens_are_taken_from_every_response_alike(self):
        found = self.logged(self.plugin(labels=["token"], max_tokens=6), self.hidden([0, 1] * 6))
        assert (found["token_n_classes"], found["token_n_samples"]) == (1, 6)

    def test_silent_in_steps_between(self):
        assert self.logged(self.plugin(freq=2), self.hidden([0] * 12), step=2) == {}
        assert self.logged(self.plugin(), None) == {}

    @pytest.mark.parametrize("labels", [[], ["tokens"], ["uid", "prompt"]])
    def test_modes_that_do_not_exist(self, labels):
        with pytest.raises(CompositionError, match=r"plugins.linguistic_collapse: labels is .*token, uid, outcome"):
            self.plugin(labels=labels)

    def test_what_it_wishes_for(self):
        wish = self.plugin(labels=["uid"]).hidden_wish()
        assert (wish.tokens, wish.head_rows, wish.argmax) == (0, False, False)
        wish = self.plugin(labels=["token"], freq=3, tokens_per_response=5).hidden_wish()
        assert (wish.tokens, wish.every, wish.head_rows, wish.argmax, wish.layer_step) == (5, 3, True, True, None)
