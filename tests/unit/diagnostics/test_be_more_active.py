"""Slots that decide, are ignored, or help on some prompts; the formulas in plain Python; the hook and its memory."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict

import numpy as np
import pytest
import torch
from fakes import FakeRun
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from verl_plugins import Batch, CompositionError, DataError, Groups
from verl_plugins.diagnostics.be_more_active import BeMoreActive, classify, residual_share

FEW = settings(max_examples=60, deadline=None)
ROWS = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from("ab"), st.integers(-4, 4).map(lambda value: value / 2)),
    min_size=1,
    max_size=16,
)
AUGMENTED = OmegaConf.create({"plugins": {"prompt_augmentation": {}, "be_more_active": {}}})


def method(**options) -> BeMoreActive:
    return BeMoreActive(BeMoreActive.Config(**options))


def ran(plugin: BeMoreActive, rows, step: int = 1, config=AUGMENTED, **fields) -> dict[str, float]:
    """Metrics of a step with rows of (prompt, slot, reward)."""
    n, run = len(rows), FakeRun(step=step, config=config)
    batch = Batch.from_tensors(
        **{
            "uid": [f"{prompt}-{step}-0" for prompt, _, _ in rows],
            "rm_scores": torch.tensor([[0.0, reward] for *_, reward in rows]),
            "response_mask": torch.ones(n, 2),
            "response_lengths": torch.arange(1, n + 1),
            "format_name": [slot for _, slot, _ in rows],
        }
        | fields
    )
    plugin.observe(run, batch)
    assert not batch.written, "it only reads"
    return run.metrics


def kind_of(metrics: dict[str, float], slot: str = "format_name") -> list[str]:
    return [kind for kind in ("passive", "active", "mixed") if metrics.get(f"slot/{slot}/{kind}")]


def shares(rows) -> dict[int, float]:
    """u_p of each prompt that is evidence."""
    prompts, found = defaultdict(list), {}
    for prompt, slot, y in rows:
        prompts[prompt].append((slot, y))
    for prompt, some in prompts.items():
        of = defaultdict(list)
        for slot, y in some:
            of[slot].append(y)
        total = statistics.pvariance([y for _, y in some]) * len(some)
        within = sum(statistics.pvariance(ys) * len(ys) for ys in of.values())
        n, v = len(some), len(of)
        if total > 1e-12 and v >= 2 and n > v:
            found[prompt] = min(1.0, (within / (n - v)) / (total / (n - 1)))
    return found


class TestResidualShare:
    @FEW
    @given(ROWS)
    def test_against_sums_of_squares(self, rows):
        prompts = Groups([prompt for prompt, _, _ in rows])
        y = torch.tensor([value for *_, value in rows])
        share, evidence = residual_share(y, [slot for _, slot, _ in rows], prompts)
        found = {
            int(prompt): float(u)
            for prompt, u, there in zip(prompts.labels, share, evidence.tolist(), strict=True)
            if there
        }
        assert found == pytest.approx(shares(rows), abs=1e-9)

    @FEW
    @given(ROWS, st.randoms(), st.sampled_from([0.5, 3.0]), st.integers(-2, 2))
    def test_order_scale_shift_and_names_make_no_difference(self, rows, random, factor, shift):
        other = random.sample(rows, len(rows))
        other = [(prompt, f"new {slot}", factor * y + shift) for prompt, slot, y in other]
        assert shares(rows) == pytest.approx(shares(other), abs=1e-9)
        one, two = (ran(method(), some) for some in (rows, other))
        assert one == pytest.approx(two, abs=1e-5)

    @FEW
    @given(ROWS)
    def test_is_a_share(self, rows):
        y = torch.tensor([value for *_, value in rows])
        share, evidence = residual_share(y, [slot for _, slot, _ in rows], Groups([row[0] for row in rows]))
        assert ((share >= 0) & (share <= 1)).all() and share.shape == evidence.shape

    def test_no_rows(self):
        share, evidence = residual_share(torch.zeros(0), [], Groups([]))
        assert share.tolist() == evidence.tolist() == []

    @pytest.mark.parametrize(
        ("slots", "rewards"),
        [
            ("abab", [1, 1, 1, 1]),
            ("aaaa", [0, 1, 0, 1]),
            ("ab", [0, 1]),
            ("abcd", [0, 1, 2, 3]),
            ("a", [1]),
        ],
        ids=["one outcome", "one value", "a response each", "a value each", "one response"],
    )
    def test_what_is_no_evidence(self, slots, rewards):
        found = ran(method(), [(7, slot, float(reward)) for slot, reward in zip(slots, rewards, strict=True)])
        assert found == {"responses": len(slots), "slot/format_name/n_prompts": 0}


class TestClassify:
    @pytest.mark.parametrize(
        ("values", "kind"),
        [
            ([1.0, 0.9, 0.85], "passive"),
            ([0.0, 0.1, 0.05], "active"),
            ([0.0, 1.0, 1.0], "mixed"),
            ([0.5, 0.5], "mixed"),
            ([1.3, 1.3], "mixed"),
            ([0.75], "passive"),
            ([0.25], "active"),
            ([0.74], "mixed"),
            ([0.26], "mixed"),
            ([0.75, 1.25], "passive"),
            ([0.5, 1.5], "mixed"),
        ],
    )
    def test_each_kind(self, values, kind):
        found = classify(np.array(values)[:, None], 0.25, 0.25)
        assert [name for name in ("passive", "active", "mixed") if getattr(found, name)[0]] == [kind]

    @given(st.lists(st.lists(st.floats(0, 2), min_size=3, max_size=3), min_size=1, max_size=9))
    def test_every_latent_has_one_kind_and_none_depends_on_another(self, rows):
        u = np.array(rows)
        found = classify(u, 0.1, 0.2)
        assert (found.passive.astype(int) + found.active + found.mixed).tolist() == [1, 1, 1]
        assert found.mean.tolist() == pytest.approx([statistics.fmean(column) for column in u.T.tolist()])
        assert found.variance.tolist() == pytest.approx([statistics.pvariance(column) for column in u.T.tolist()])
        turned = classify(u[::-1, ::-1], 0.1, 0.2)
        assert turned.active.tolist() == found.active[::-1].tolist()


class TestToy:
    """Eight responses to each of 60 prompts under two templates, as prompts are asked twice."""

    def rows(self, effect: float, share: float, seed: int = 0) -> list[tuple[int, str, float]]:
        """The template adds `effect` to the rewards of so many of the prompts."""
        rng = np.random.default_rng(seed)
        return [
            (prompt, slot, float(rng.normal() + effect * (slot == "a") * (prompt < 60 * share)))
            for prompt in range(60)
            for slot in 4 * "ab"
        ]

    @pytest.mark.parametrize(
        ("effect", "share", "kind"), [(0.0, 1.0, "passive"), (20.0, 1.0, "active"), (20.0, 0.5, "mixed")]
    )
    def test_kind(self, effect, share, kind):
        for seed in range(3):
            found = ran(method(), self.rows(effect, share, seed))
            assert kind_of(found) == [kind]
            assert found["slot/format_name/n_prompts"] == 60
            assert found["responses"] == 480

    def test_the_mean_and_variance_are_those_of_the_shares(self):
        rows = self.rows(1.0, 0.5)
        found, expected = ran(method(), rows), [*shares(rows).values()]
        assert found["slot/format_name/u_mean"] == pytest.approx(statistics.fmean(expected), abs=1e-6)
        assert found["slot/format_name/u_var"] == pytest.approx(statistics.pvariance(expected), abs=1e-6)


DRAW = [(7, "a", 0.0), (7, "a", 0.5)]
OTHER = [(7, "b", 5.0), (7, "b", 5.5)]


class TestMemory:
    def test_draws_of_a_prompt_are_put_together(self):
        plugin = method()
        assert ran(plugin, DRAW)["slot/format_name/n_prompts"] == 0
        assert kind_of(ran(plugin, OTHER, step=2)) == ["active"]

    @pytest.mark.parametrize(("steps", "prompts", "responses"), [(3, 1, 4), (2, 0, 2), (1, 0, 2)])
    def test_within_so_many_steps(self, steps, prompts, responses):
        plugin = method(steps=steps)
        ran(plugin, DRAW)
        found = ran(plugin, OTHER, step=3)
        assert (found["slot/format_name/n_prompts"], found["responses"]) == (prompts, responses)

    def test_is_saved(self):
        plugin, other = method(), method()
        ran(plugin, DRAW)
        other.load_state_dict(plugin.state_dict())
        assert ran(other, OTHER, step=2) == ran(plugin, OTHER, step=2)
        empty = method()
        empty.load_state_dict(method().state_dict())
        assert ran(empty, DRAW)["responses"] == 2

    def test_what_was_dropped_is_looked_at_too(self):
        rows, run = DRAW + OTHER, FakeRun(config=AUGMENTED)
        fields = {"response_mask": torch.ones(4, 1), "format_name": [slot for _, slot, _ in rows]}
        scores = torch.tensor([[reward] for *_, reward in rows])
        full = Batch.from_tensors(uid=["7-1-0"] * 4, rm_scores=scores, **fields)
        left = Batch.from_tensors(uid=["7-1-0"], rm_scores=scores[:1], response_mask=torch.ones(1, 1), full=full)
        method().observe(run, left)
        assert run.metrics["responses"] == 4

    def test_a_session_counts_once_by_its_last_output(self):
        rows = [(7, "a", 0.0), (7, "a", 99.0), (7, "a", 0.5), (7, "b", 5.0), (7, "b", 5.5)]
        found = ran(method(), rows, session=[0, 1, 1, 2, 3], turn=[0, 0, 1, 0, 0])
        assert found["responses"] == 4
        assert found["slot/format_name/u_mean"] == pytest.approx(shares(DRAW + OTHER)[7])


class TestSettings:
    def test_columns_of_the_plugins_that_are_there(self):
        both = OmegaConf.create({"plugins": {"sage": {}, "prompt_augmentation": {}}})
        assert method().slots(both) == ("format_name", "hint_used")
        assert method(slots=("role",)).slots(both) == ("role",)
        method(slots=("role",)).check(OmegaConf.create({"plugins": {}}))
        found = ran(method(), DRAW + OTHER, config=both, hint_used=[0, 1, 0, 1])
        assert kind_of(found) == ["active"] and kind_of(found, "hint_used") == ["passive"]

    def test_nothing_to_look_at_is_refused(self):
        with pytest.raises(CompositionError, match="slots names no column"):
            method().check(OmegaConf.create({"plugins": {"be_more_active": {}, "grpo": {}}}))

    def test_a_column_that_is_not_there(self):
        with pytest.raises(DataError, match="'role'"):
            ran(method(slots=("role",)), DRAW)

    def test_numbers_and_missing_values_are_values(self):
        for values in (
            [1, 1, 2, 2],
            [None, None, "x", "x"],
            [0.5, 0.5, math.inf, math.inf],
            [True, True, False, False],
        ):
            assert kind_of(ran(method(slots=("tag",)), DRAW + OTHER, tag=values), "tag") == ["active"]

    def test_other_statistics(self):
        rows = [(7, "a", 0.0), (7, "a", 0.25), (7, "b", 0.5), (7, "b", 1.0), (7, "a", 0.75)]
        right = [(7, slot, float(reward >= 0.5)) for _, slot, reward in rows]
        length = [(7, slot, math.log(place + 1)) for place, (_, slot, _) in enumerate(rows)]
        for statistic, expected in (("reward", rows), ("correct", right), ("log_length", length)):
            found = ran(method(statistic=statistic), rows)
            assert found["slot/format_name/u_mean"] == pytest.approx(shares(expected)[7], abs=1e-6)
