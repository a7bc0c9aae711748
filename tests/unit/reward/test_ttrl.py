"""TTRL: who wins the vote, who is rewarded, who is trained on."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pluggy
import pytest
import torch
from fakes import FakeRun
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from verl_plugins import Batch, CompositionError, DataError, hookspecs
from verl_plugins.reward.ttrl import NO_VOTE, Ttrl, agreement, majority
from verl_plugins.services import Prompt, Prompts

END, OTHER = 2, 7
FEW = settings(max_examples=50, deadline=None)
ANSWER = st.sampled_from(["1", "2", "3", "", None])
GROUPS = st.lists(st.lists(ANSWER, min_size=1, max_size=7), min_size=1, max_size=4)


def method(**options) -> Ttrl:
    return Ttrl(Ttrl.Config(**{"grader": "exact"} | options))


def run_with(n: int) -> FakeRun:
    return FakeRun(config=OmegaConf.create({"actor_rollout_ref": {"rollout": {"n": n}}}))


def sampled(groups, truth="1", cut=(), order=None, **fields) -> Batch:
    """A batch of groups of answers; rows in `cut` are truncated, `order` shuffles rows."""
    rows = [(g, s, answer) for g, answers in enumerate(groups) for s, answer in enumerate(answers)]
    rows = [rows[place] for place in (range(len(rows)) if order is None else order)]
    responses = torch.full((len(rows), 3), END)
    responses[list(cut)] = OTHER
    return Batch.from_tensors(
        **{
            "uid": [f"{g}-1-0" for g, _, _ in rows],
            "session": [s for _, s, _ in rows],
            "rm_scores": torch.zeros(len(rows), 3),
            "response_mask": torch.ones(len(rows), 3, dtype=torch.bool),
            "responses": responses,
            "response_lengths": torch.full((len(rows),), 3),
            "answer": [answer for _, _, answer in rows],
            "acc": [float(answer == truth) for _, _, answer in rows],
            "reward_model": [{"ground_truth": truth}] * len(rows),
            "budget": 3,
            "tokenizer": SimpleNamespace(eos_token_id=END),
        }
        | fields
    )


def rewards_of(plugin: Ttrl, batch: Batch, run: FakeRun | None = None) -> list[float]:
    plugin.shape_rewards(run or run_with(2), batch)
    return batch.scores.tolist()


class TestVote:
    """The most frequent answer, the first among equals."""

    @FEW
    @given(GROUPS)
    def test_against_counting(self, groups):
        found = rewards_of(method(), sampled(groups))
        expected = []
        for answers in groups:
            votes = Counter(answer for answer in answers if answer)
            label = max(votes, key=votes.get) if votes else None  # the first inserted of equals
            expected += [float(bool(answer) and answer == label) for answer in answers]
        assert found == expected

    @FEW
    @given(GROUPS)
    def test_a_missing_answer_as_an_answer(self, groups):
        found = rewards_of(method(missing="as_empty_answer"), sampled(groups))
        expected = []
        for answers in groups:
            votes = Counter(answer or "" for answer in answers)
            expected += [float((answer or "") == max(votes, key=votes.get)) for answer in answers]
        assert found == expected

    @FEW
    @given(GROUPS, st.randoms())
    def test_order_of_rows_does_not_matter(self, groups, random):
        count = sum(map(len, groups))
        order = random.sample(range(count), count)
        given_order, shuffled = sampled(groups), sampled(groups, order=order)
        one, other = rewards_of(method(), given_order), rewards_of(method(), shuffled)
        assert [one[place] for place in order] == other
        for batch in (given_order, shuffled):
            method().select_rows(run_with(2), batch)
        assert given_order.dropped[order].tolist() == shuffled.dropped.tolist()

    def test_ties_go_to_the_first_in_vote_order(self):
        assert rewards_of(method(), sampled([["8", "2", "2", "8", "5"]])) == [1, 0, 0, 1, 0]

    def test_nobody_answered(self):
        run = run_with(2)
        assert rewards_of(method(), sampled([["", None, ""], ["1", "", "1"]]), run) == [0, 0, 0, 1, 0, 1]
        assert run.metrics["majority_ratio"] == pytest.approx(1 / 3)
        assert run.metrics["label_accuracy"] == 0.5

    def test_a_truncated_response_has_no_answer(self):
        batch = sampled([["1", "1", "2", "2", "2"]], cut=[2, 3])
        assert rewards_of(method(), batch) == [1, 1, 0, 0, 0]

    def test_the_authors_take_what_the_extractor_finds(self):
        batch = sampled([["1", "1", "2", "2", "2"]], cut=[2, 3])
        assert rewards_of(method(missing="as_empty_answer"), batch) == [0, 0, 1, 1, 1]

    def test_space_around_an_answer_is_nothing(self):
        assert rewards_of(method(), sampled([[" 4", "4 ", "5", " "]])) == [1, 1, 0, 0]

    def test_answers_that_are_numbers(self):
        assert rewards_of(method(), sampled([[4, 4, 5]])) == [1, 1, 0]

    @pytest.mark.parametrize(
        ("missing", "answers", "rewards"),
        [
            ("as_empty_answer", ["", None, "", "3"], [1, 1, 1, 0]),
            ("as_empty_answer", ["3", "", "3", None, "3"], [1, 0, 1, 0, 1]),
            ("as_empty_answer", ["", "3", "3", None], [1, 0, 0, 1]),
            ("excluded", ["", None, "", "3"], [0, 0, 0, 1]),
            ("excluded", ["", None], [0, 0]),
        ],
    )
    def test_who_is_paid_where_answers_are_missing(self, missing, answers, rewards):
        batch, run = sampled([answers, ["1", "1", "2"]]), run_with(2)
        assert rewards_of(method(missing=missing), batch, run) == [*rewards, 1, 1, 0]
        blank = sum(not answer for answer in answers) / (len(answers) + 3)
        assert run.metrics["missing_answer_share"] == pytest.approx(blank)

    def test_one_vote_agrees_with_itself(self):
        assert rewards_of(method(), sampled([["7"], ["8"]])) == [1, 1]

    def test_equal_numbers_are_rewarded_and_had_no_vote(self):
        answers = [["0.5", "0.5", "1/2", "7", "7", ""]]
        assert rewards_of(method(grader="math"), sampled(answers)) == [1, 1, 1, 0, 0, 0]
        assert rewards_of(method(grader="exact"), sampled(answers)) == [1, 1, 0, 0, 0, 0]
        split = [["1/2", "7", "0.5", "7"]]  # two votes for 7, one each for the ways to write a half
        assert rewards_of(method(grader="math"), sampled(split)) == [0, 1, 0, 1]

    @pytest.mark.parametrize(
        ("answers", "rewards"), [(["4", "4"], [1, 1]), (["", None], [0, 0]), (["4", "", "5"], [1, 0, 0]), (["4"], [1])]
    )
    def test_nothing_to_compare(self, answers, rewards):
        assert rewards_of(method(grader="math"), sampled([answers])) == rewards

    def test_a_pair_is_compared_once(self):
        asked = []
        votes, labels = np.array([0, 1, 1, 2, 3, 1]), np.array([0, 0, 0, 0, 0, NO_VOTE])
        texts = np.array(["a", "b", "c", ""], dtype=object)
        same = agreement(
            votes, labels, texts, lambda pairs: asked.extend(pairs.tolist()) or [one == "b" for one, _ in pairs]
        )
        assert same.tolist() == [True, True, True, False, False, False]
        assert asked == [["b", "a"], ["c", "a"]]

    def test_several_outputs_count_once_by_the_last(self):
        batch = sampled([["9", "9", "9", "1", "1"]], session=[0, 0, 0, 1, 2], turn=[0, 1, 2, 0, 0])
        assert rewards_of(method(), batch) == [0, 0, 0, 1, 1]

    def test_rows_without_a_vote(self):
        winner, ballots = majority(np.full(3, NO_VOTE), np.array([0, 0, 1]), np.arange(3), 2)
        assert (winner.tolist(), ballots.tolist()) == ([-1, -1], [0, 0])


class TestLabelsStayOut:
    """The ground truth feeds metrics and nothing else."""

    @FEW
    @given(GROUPS)
    def test_rewards_do_not_depend_on_it(self, groups):
        one, other = (rewards_of(method(), sampled(groups, truth)) for truth in ("1", "2"))
        assert one == other

    def test_metrics(self):
        run = run_with(2)
        batch = sampled([["1", "2", "2", ""], ["1", "1", "1", "3"]])
        method().shape_rewards(run, batch)
        method().select_rows(run, batch)
        assert run.metrics == pytest.approx(
            {
                "majority_ratio": (2 / 4 + 3 / 4) / 2,
                "mean_reward": 5 / 8,
                "missing_answer_share": 1 / 8,
                "n_distinct_answers": 2,
                "label_accuracy": 0.5,
                "reward_accuracy": (1 + 4) / 8,
                "ground_truth_ratio": 4 / 8,
                "no_majority_in_train_share": 0,
            }
        )

    @pytest.mark.parametrize("truth", ["", None])
    def test_without_labels(self, truth):
        run = run_with(2)
        assert rewards_of(method(), sampled([["1", "1", "2"]], truth), run) == [1, 1, 0]
        assert {"label_accuracy", "reward_accuracy", "ground_truth_ratio"}.isdisjoint(run.metrics)

    def test_the_verdict_is_kept(self):
        batch = sampled([["2", "2", "1"]])
        rewards_of(method(), batch)
        assert batch.correct.tolist() == [False, False, True]

    def test_no_extracted_answer_is_an_error(self, sentence):
        with pytest.raises(DataError) as error:
            rewards_of(method(answer="pred"), sampled([["1"]]))
        sentence(error.value, "'pred'")


class TestRows:
    """More votes than rows to train on."""

    def test_prompts_ask_for_all_votes(self):
        prompts = Prompts([Prompt(0, {}), Prompt(1, {})])
        method(n_votes=5).prepare_prompts(prompts)
        assert [prompt.group_size for prompt in prompts] == [5, 5]

    @FEW
    @given(GROUPS, st.integers(1, 7))
    def test_the_first_sessions_are_kept(self, groups, n):
        batch, run = sampled(groups), run_with(n)
        method().shape_rewards(run, batch)
        method().select_rows(run, batch)
        assert batch.dropped.tolist() == [place >= n for answers in groups for place in range(len(answers))]

    def test_a_failed_session_moves_the_others_up(self):
        batch = sampled([["1", "2", "3"]], session=[1, 4, 6])
        method().select_rows(run_with(2), batch)
        assert batch.dropped.tolist() == [False, False, True]

    def test_outputs_of_a_session_stay_together(self):
        batch = sampled([["1", "1", "2", "3", "3"]], session=[0, 0, 1, 2, 2], turn=[0, 1, 0, 0, 1])
        method().select_rows(run_with(2), batch)
        assert batch.dropped.tolist() == [False, False, False, True, True]

    def test_no_majority_among_the_kept(self):
        run, batch = run_with(2), sampled([["1", "2", "3", "3"], ["1", "1", "2", "3"]])
        method().shape_rewards(run, batch)
        method().select_rows(run, batch)
        assert run.metrics["no_majority_in_train_share"] == 0.5


class TestCheck:
    """Settings that cannot work."""

    @staticmethod
    def config(n=4, filter_groups=False):
        return OmegaConf.create(
            {
                "actor_rollout_ref": {"rollout": {"n": n}},
                "algorithm": {"filter_groups": {"enable": filter_groups}},
            }
        )

    def test_as_many_as_votes(self):
        method(n_votes=4).check(self.config())

    def test_more_rows_than_votes(self, sentence):
        with pytest.raises(CompositionError) as error:
            method(n_votes=3).check(self.config())
        sentence(error.value, "rollout.n=4", "n_votes=3")

    def test_a_filter_that_sees_labels(self, sentence):
        with pytest.raises(CompositionError) as error:
            method().check(self.config(filter_groups=True))
        sentence(error.value, "algorithm.filter_groups.enable=true")


def test_pluggy_calls_it():
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(method(n_votes=3))
    run, batch, prompts = run_with(2), sampled([["1", "1", "2"]]), Prompts([Prompt(0, {})])
    manager.hook.prepare_prompts(run=run, prompts=prompts)
    manager.hook.shape_rewards(run=run, batch=batch)
    manager.hook.select_rows(run=run, batch=batch)
    assert (prompts[0].group_size, batch.scores.tolist(), int(batch.dropped.sum())) == (3, [1, 1, 0], 1)
