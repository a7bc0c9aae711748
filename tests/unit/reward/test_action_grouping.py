"""Action grouping: risks, shrinkage and the hook, against the formulas in plain Python."""

from __future__ import annotations

import logging
import statistics
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from fakes import FakeRun
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_plugins import Batch, Groups
from verl_plugins.reward.action_grouping import ActionGrouping, risk, select, shrink, shrinkage

END, OTHER = 2, 7
FEW = settings(max_examples=60, deadline=None)
SCORE = st.integers(-8, 8).map(lambda value: value / 4)
ANSWER = st.sampled_from(["1", "2", "3", "", None])
GROUPS = st.lists(st.lists(st.tuples(ANSWER, SCORE), min_size=1, max_size=7), min_size=1, max_size=4)
VARIANCE = st.sampled_from([0.0, 0.01, 0.25, 1.0, 9.0])


def method(**options) -> ActionGrouping:
    return ActionGrouping(ActionGrouping.Config(**options))


def scored(groups, cut=(), order=None, **fields) -> Batch:
    """A batch of groups of (answer, score); the score stands on the second of three tokens, which is the last."""
    rows = [(g, s, *row) for g, group in enumerate(groups) for s, row in enumerate(group)]
    rows = [rows[place] for place in (range(len(rows)) if order is None else order)]
    n = len(rows)
    rewards, responses = torch.zeros(n, 3), torch.full((n, 3), END)
    rewards[:, 1] = torch.tensor([score for *_, score in rows])
    responses[list(cut)] = OTHER
    return Batch.from_tensors(
        **{
            "uid": [f"{g}-1-0" for g, *_ in rows],
            "session": [s for _, s, *_ in rows],
            "rm_scores": rewards,
            "response_mask": torch.tensor([[1, 1, 0]] * n),
            "responses": responses,
            "response_lengths": torch.full((n,), 2),
            "answer": [answer for _, _, answer, _ in rows],
            "budget": 2,
            "tokenizer": SimpleNamespace(eos_token_id=END),
        }
        | fields
    )


def pooled_by(plugin: ActionGrouping, batch: Batch, run: FakeRun | None = None) -> list[float]:
    plugin.shape_rewards(run or FakeRun(), batch)
    return batch.scores.tolist()


def classes_of(group, missing: bool = False) -> list[list[int]]:
    """Places of the responses of each class."""
    found = defaultdict(list)
    for place, (answer, _) in enumerate(group):
        found[answer or ("" if missing else place)].append(place)
    return list(found.values())


def j(scores: list[float], parts: list[list[int]], variance: float) -> float:
    total = (2 * len(parts) - len(scores)) * variance
    for part in parts:
        mean = statistics.fmean(scores[place] for place in part)
        total += sum((scores[place] - mean) ** 2 for place in part)
    return total


def by_hand(group, mode: str, variance: float, missing: bool = False) -> list[float]:
    scores, parts = [score for _, score in group], classes_of(group, missing)
    if mode == "select":
        levels = [[[place] for place in range(len(scores))], parts, [[*range(len(scores))]]]
        parts = min(levels, key=lambda level: round(j(scores, level, variance), 12))
    found = list(scores)
    for part in parts:
        mean = statistics.fmean(scores[place] for place in part)
        share = 1.0
        if mode == "shrink":
            above = max(0.0, statistics.variance([scores[place] for place in part]) - variance) if part[1:] else 0
            share = variance / (variance + above) if part[1:] and variance else 0.0
        for place in part:
            found[place] += share * (mean - scores[place])
    return found


class TestAgainstTheFormula:
    @FEW
    @given(GROUPS, VARIANCE, st.sampled_from(["shrink", "select"]), st.booleans())
    def test_pooled(self, groups, variance, mode, missing):
        plugin = method(mode=mode, sigma=variance**0.5, group_missing=missing)
        found = pooled_by(plugin, scored(groups))
        expected = [value for group in groups for value in by_hand(group, mode, variance, missing)]
        assert found == pytest.approx(expected, abs=1e-6)

    @FEW
    @given(GROUPS, VARIANCE)
    def test_risk(self, groups, variance):
        batch = scored(groups)
        for parts, of in (
            (batch.groups, lambda group: [[*range(len(group))]]),
            (Groups(method().labels(batch)), classes_of),
        ):
            found = risk(batch.scores.double(), parts, batch.groups, variance).tolist()
            expected = [j([s for _, s in group], of(group), variance) for group in groups for _ in group]
            assert found == pytest.approx(expected)

    @FEW
    @given(GROUPS, VARIANCE, st.sampled_from(["shrink", "select"]), st.randoms())
    def test_order_of_rows_does_not_matter(self, groups, variance, mode, random):
        count = sum(map(len, groups))
        order = random.sample(range(count), count)
        one = pooled_by(method(mode=mode, sigma=variance**0.5), scored(groups))
        other = pooled_by(method(mode=mode, sigma=variance**0.5), scored(groups, order=order))
        assert [one[place] for place in order] == pytest.approx(other, abs=1e-7)

    @FEW
    @given(GROUPS, VARIANCE, SCORE, st.sampled_from([0.5, 2.0, 4.0]))
    def test_moves_with_the_scores_and_scales_with_them(self, groups, variance, shift, factor):
        moved = [[(answer, factor * score + shift) for answer, score in group] for group in groups]
        one = pooled_by(method(sigma=variance**0.5), scored(groups))
        other = pooled_by(method(sigma=factor * variance**0.5), scored(moved))
        assert other == pytest.approx([factor * value + shift for value in one], abs=1e-5)

    @FEW
    @given(GROUPS, VARIANCE)
    def test_means_of_classes_stay_and_scores_never_move_apart(self, groups, variance):
        batch = scored(groups)
        scores, classes = batch.scores.double(), Groups(method().labels(batch))
        pooled, share = shrink(scores, classes, variance)
        assert torch.allclose(classes.mean(pooled), classes.mean(scores))
        assert ((share >= 0) & (share <= 1)).all()
        assert (classes.std(pooled) <= classes.std(scores) + 1e-12).all()


class TestCorners:
    def test_a_group_of_one_stays(self):
        for mode in ("shrink", "select"):
            assert pooled_by(method(mode=mode, sigma=1.0), scored([[("1", 0.25)], [("1", 0.75)]])) == [0.25, 0.75]

    @FEW
    @given(GROUPS, st.sampled_from(["shrink", "select"]))
    def test_without_noise_nothing_changes(self, groups, mode):
        batch = scored(groups)
        before = batch.rewards.clone()
        method(mode=mode, sigma=0.0).shape_rewards(FakeRun(), batch)
        assert torch.equal(batch.rewards, before) and not batch.written

    @pytest.mark.parametrize("mode", ["shrink", "select"])
    def test_equal_scores_stay_bit_for_bit(self, mode):
        run, batch = FakeRun(), scored([[("1", 0.1)] * 3 + [("2", 0.1)] * 4])
        before = batch.rewards.clone()
        method(mode=mode, sigma=0.3).shape_rewards(run, batch)
        assert torch.equal(batch.rewards, before)
        assert "score_var_removed" not in run.metrics

    def test_missing_answers_are_one_each_unless_grouped(self):
        group = [[("", 0.0), (None, 1.0), ("4", 0.0), ("4", 1.0)]]
        assert pooled_by(method(sigma=10.0), scored(group)) == [0, 1, 0.5, 0.5]
        assert pooled_by(method(sigma=10.0, group_missing=True), scored(group)) == [0.5, 0.5, 0.5, 0.5]

    def test_answers_that_were_cut_off_are_missing(self):
        group = [[("4", 0.0), ("4", 1.0), ("4", 2.0)]]
        assert pooled_by(method(sigma=10.0), scored(group, cut=[2])) == [0.5, 0.5, 2]

    def test_one_answer_to_two_prompts_is_two_classes(self):
        groups = [[("4", 0.0), ("4", 1.0)], [("4", 5.0), ("4", 7.0)]]
        assert pooled_by(method(sigma=10.0), scored(groups)) == [0.5, 0.5, 6, 6]

    def test_the_reward_stays_on_the_last_token(self):
        batch = scored([[("4", 0.0), ("4", 1.0)]])
        method(sigma=10.0).shape_rewards(FakeRun(), batch)
        assert batch.rewards.tolist() == [[0, 0.5, 0], [0, 0.5, 0]]

    def test_ties_go_to_the_finest(self):
        scores, prompts = torch.tensor([0.0, 2.0]).double(), Groups([0, 0])
        level = [select(scores, (Groups([0, 1]), prompts), prompts, variance)[1].tolist() for variance in (1.0, 1.01)]
        assert level == [[0, 0], [1, 1]]

    def test_the_whole_group_where_the_noise_is_all_there_is(self):
        group = [[("1", 0.0), ("1", 1.0), ("2", 0.5), ("3", 1.5)]]
        assert pooled_by(method(mode="select", sigma=5.0), scored(group)) == [0.75] * 4

    def test_little_noise_moves_little(self):
        scores, classes = torch.tensor([0.0, 1.0]).double(), Groups([0, 0])
        assert shrinkage(scores, classes, 0.01).tolist() == pytest.approx([0.02, 0.02])
        assert shrinkage(scores, classes, 0.5).tolist() == pytest.approx([1, 1])

    def test_no_rows(self):
        none, nobody = torch.zeros(0, dtype=torch.float64), Groups([])
        assert select(none, (nobody, nobody), nobody, 0.1)[0].tolist() == shrink(none, nobody, 0.1)[0].tolist() == []

    def test_a_session_speaks_by_its_last_output(self):
        batch = scored([[("4", 0.0), ("9", 5.0), ("4", 1.0), ("4", 3.0)]], session=[0, 1, 1, 2], turn=[0, 0, 1, 0])
        assert pooled_by(method(sigma=10.0), batch) == pytest.approx([4 / 3] * 4)

    def test_a_setting_for_each_kind_of_equivalence(self):
        texts = ["<tool_call>{}</tool_call>", "no", "<tool_call>{ }</tool_call> yes", "no"]
        tokenizer = SimpleNamespace(eos_token_id=END, batch_decode=lambda ids, **_: texts)
        group = [[("1", 0.0), ("1", 1.0), ("2", 2.0), ("3", 4.0)]]
        batch = scored(group, tokenizer=tokenizer)
        assert pooled_by(method(sigma=10.0, equivalence="tool_call"), batch) == [1, 1, 1, 4]
        ids = torch.tensor([[5, 6, 0], [5, 7, 0], [6, 5, 9], [5, 6, 8]])
        batch = scored(group, responses=ids)
        assert pooled_by(method(sigma=10.0, equivalence="jaccard"), batch) == [2, 1, 2, 2]
        batch = scored(group, responses=ids)
        assert pooled_by(method(sigma=10.0, equivalence="jaccard", similarity=0.3), batch) == [1.75] * 4


class TestMetrics:
    def test_shrink(self):
        run = FakeRun()
        pooled_by(method(sigma=0.5), scored([[("1", 0.0), ("1", 0.0), ("2", 2.0)], [("1", 0.0), ("1", 1.0)]]), run)
        assert run.metrics["sigma"] == 0.5
        assert run.metrics["n_groups_mean"] == 1.5
        assert run.metrics["alpha_mean"] == pytest.approx((1 + 1 + 0 + 0.5 + 0.5) / 5)
        before, after = 8 / 3 + 0.5, 8 / 3 + 0.125
        assert run.metrics["score_var_removed"] == pytest.approx(1 - after / before)
        assert run.metrics["equal_classes"] == 0.5
        assert not [name for name in run.metrics if name.startswith("level_")]

    def test_select(self):
        run = FakeRun()
        groups = [
            [("1", 0.0), ("1", 9.0)],
            [("1", 0.0), ("1", 0.1), ("2", 9.0)],
            [("1", 0.0), ("2", 0.1)],
            [("1", 1.0)],
        ]
        pooled_by(method(mode="select", sigma=1.0), scored(groups), run)
        found = [run.metrics[f"level_{level}"] for level in ("singletons", "classes", "all")]
        assert found == [0.5, 0.25, 0.25]
        assert "alpha_mean" not in run.metrics

    def test_small_scores_that_all_become_one(self):
        run = FakeRun()
        pooled_by(method(mode="select", sigma=1.0), scored([[("1", 0.0), ("2", 0.1)], [("1", 0.5)]]), run)
        assert run.metrics["score_var_removed"] == pytest.approx(1)

    def test_variance_is_of_sessions(self):
        run, group = FakeRun(), [("1", 0.0), ("9", 50.0), ("1", 1.0), ("2", 2.0)]
        pooled_by(method(sigma=10.0), scored([group], session=[0, 1, 1, 2], turn=[0, 0, 1, 0]), run)
        assert run.metrics["score_var_removed"] == pytest.approx(1 - 1.5 / 2)

    def test_what_is_undefined_is_left_out(self):
        run = FakeRun()
        pooled_by(method(), scored([[("1", 0.5), ("2", 0.5)]]), run)
        assert run.metrics.keys() == {"sigma", "n_groups_mean", "alpha_mean"}


class TestWarnings:
    EQUAL = [[("1", 1.0), ("1", 1.0), ("2", 0.0), ("2", 0.0)]]
    ALONE = [[("1", 1.0), ("2", 0.0)]]
    NOISY = [[("1", 1.0), ("1", 0.9)]]

    def warned(self, caplog, plugin, *steps) -> list[int]:
        """Steps at which something was said."""
        found = []
        for number, group in enumerate(steps, 1):
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                plugin.shape_rewards(FakeRun(step=number), scored(group))
            found += [number] * len(caplog.records)
        return found

    def test_at_once_without_noise(self, caplog):
        assert self.warned(caplog, method(sigma=0.0), self.NOISY, self.NOISY) == [1]

    def test_after_so_many_steps_without_noise_in_a_row(self, caplog):
        steps = [self.EQUAL, self.NOISY, self.EQUAL, self.ALONE, self.EQUAL, self.EQUAL, self.EQUAL]
        assert self.warned(caplog, method(warn_after=3), *steps) == [6]
        assert "3 steps" in caplog.text or not caplog.records

    def test_after_one_step(self, caplog):
        assert self.warned(caplog, method(warn_after=1), self.EQUAL, self.EQUAL) == [1]

    def test_never(self, caplog):
        assert self.warned(caplog, method(warn_after=0), *[self.EQUAL] * 9) == []

    def test_counts_on_after_a_checkpoint(self, caplog):
        first, second = method(warn_after=2), method(warn_after=2)
        assert self.warned(caplog, first, self.EQUAL) == []
        second.load_state_dict(first.state_dict())
        assert self.warned(caplog, second, self.EQUAL, self.EQUAL) == [1]
        first.load_state_dict(second.state_dict())
        assert self.warned(caplog, first, self.EQUAL, self.EQUAL) == []

    def test_no_answers_are_said_once_and_tokens_compared(self, caplog):
        plugin, group = method(sigma=10.0, answer="final"), [[("1", 0.0), ("2", 1.0)]]
        with caplog.at_level(logging.WARNING):
            assert pooled_by(plugin, scored(group)) == [0.5, 0.5]
            pooled_by(plugin, scored(group))
        assert caplog.text.count("plugins.action_grouping.answer=final is no part of the reward") == 1
