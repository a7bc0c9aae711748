"""IGPO: where turns end, what they add to the belief in the known answer, and what their tokens earn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fakes import FakeRun
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from verl_plugins import Batch, CompositionError, Groups
from verl_plugins.advantage.igpo import Igpo, ends_of_turns, turn_advantage
from verl_plugins.reward.word_f1 import WordF1, answer_in, f1
from verl_plugins.services import Answer

FEW = settings(max_examples=60, deadline=None)


def in_words(rows, mode: str, by_std: bool, gamma: float) -> list[list[float]]:
    """The sheet's steps: rows of (group, rewards of the turns, the last one the outcome) -> returns of the turns."""
    pools: dict = {}
    for group, rewards in rows:
        for number, reward in enumerate(rewards):
            kind = (number == len(rewards) - 1) if mode == "separate" else None
            pools.setdefault((group, kind), []).append(reward)
    found = []
    for group, rewards in rows:
        z = []
        for number, reward in enumerate(rewards):
            pool = pools[group, (number == len(rewards) - 1) if mode == "separate" else None]
            centred = reward - sum(pool) / len(pool) if len(set(pool)) > 1 else 0.0
            spread = np.sqrt(np.var(pool) + 1e-8) if len(pool) > 1 else 1.0
            z.append(centred / (spread + 1e-6) if by_std else centred)
        returns, later = [], 0.0
        for value in reversed(z):
            later = value + gamma * later
            returns.insert(0, later)
        found.append(returns)
    return found


@st.composite
def conversations(draw):
    """Rows of (group, [(tokens, reward, tokens of the tool after it)])."""
    number = st.sampled_from([0.0, 1.0, 0.25, -2.0])
    turn = st.tuples(st.integers(1, 3), number, st.integers(0, 2))
    return draw(
        st.lists(st.tuples(st.sampled_from("ab"), st.lists(turn, min_size=1, max_size=3)), min_size=1, max_size=5)
    )


def laid_out(rows):
    """Rewards, ends and mask [B,T] of the rows, and each token's turn (-1: not the policy's)."""
    width = max(sum(tokens + tool for tokens, _, tool in turns) for _, turns in rows) + 1
    rewards, of_turn = torch.zeros(len(rows), width, dtype=torch.double), torch.full((len(rows), width), -1)
    ends = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, (_, turns) in enumerate(rows):
        place = 0
        for number, (tokens, reward, tool) in enumerate(turns):
            of_turn[row, place : place + tokens] = number
            place += tokens
            rewards[row, place - 1], ends[row, place - 1] = reward, True
            place += tool
    return rewards, ends, of_turn


@FEW
@given(conversations(), st.sampled_from(["separate", "joint"]), st.booleans(), st.sampled_from([1.0, 0.9, 0.3]))
def test_tokens_earn_their_turn_s_return(rows, mode, by_std, gamma):
    rewards, ends, of_turn = laid_out(rows)
    mask = of_turn >= 0
    group = Groups([name for name, _ in rows]).index
    found = turn_advantage(rewards, ends, mask, group, mode=mode, by_std=by_std, gamma=gamma)
    expected = in_words([(name, [reward for _, reward, _ in turns]) for name, turns in rows], mode, by_std, gamma)
    for row, returns in enumerate(expected):
        for place, turn in enumerate(of_turn[row].tolist()):
            assert float(found[row, place]) == pytest.approx(returns[turn] if turn >= 0 else 0.0, abs=1e-6)


@FEW
@given(conversations())
def test_turns_are_found_in_the_mask_where_tools_answer(rows):
    rows = [(name, [(tokens, reward, max(tool, 1)) for tokens, reward, tool in turns]) for name, turns in rows]
    _, ends, of_turn = laid_out(rows)
    assert torch.equal(ends_of_turns(of_turn >= 0), ends)


def test_a_tool_that_said_nothing_leaves_two_turns_where_the_loop_tells_them():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1], [1, 1, 0, 0]], dtype=torch.bool)
    told = [[1, 3], None, []]
    assert ends_of_turns(mask, told).tolist() == [
        [False, True, False, True],
        [False, True, False, True],
        [False, False, False, False],
    ]


def test_equal_outcomes_leave_the_gains():
    rewards = torch.tensor([[0.5, 0.0, 1.0], [-0.5, 0.0, 1.0]])
    ends = torch.tensor([[True, False, True]] * 2)
    found = turn_advantage(rewards, ends, ends, torch.tensor([0, 0]))
    assert found[:, 0].tolist() == pytest.approx([1, -1], abs=1e-4) and found[:, 2].tolist() == [0, 0]


class Scores(FakeRun):
    """Scores a known answer by how long the history is; remembers what it was asked."""

    def __init__(self, beliefs: list[float]) -> None:
        super().__init__()
        self.asked: list[tuple[list[int], str]] = []
        self._beliefs = iter(beliefs)
        self.tokenizer = lambda text, add_special_tokens: {"input_ids": [90, 91]}

    def score(self, prompts, targets):
        self.asked = [(list(prompt), target) for prompt, target in zip(prompts, targets, strict=True)]
        return [torch.tensor([value + 0.5, value - 0.5]) for value in (next(self._beliefs) for _ in prompts)]


def batch(**fields) -> Batch:
    """Two conversations of a group: three turns, and one; the tool says 70."""
    mask = torch.tensor([[1, 1, 0, 1, 0, 1], [1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    rewards = torch.zeros(2, 6)
    rewards[0, 5], rewards[1, 1] = 1.0, 0.0
    return Batch.from_tensors(
        **{
            "uid": ["0-1-0", "0-1-0"],
            "session": [0, 1],
            "response_mask": mask,
            "response_lengths": torch.tensor([6, 2]),
            "responses": torch.tensor([[11, 12, 70, 13, 70, 14], [21, 22, 0, 0, 0, 0]]),
            "prompts": torch.tensor([[1, 2, 3], [4, 5, 0]]),
            "prompt_lengths": torch.tensor([3, 2]),
            "old_log_probs": torch.zeros(2, 6),
            "rm_scores": rewards,
            "reward_model": [{"ground_truth": "Ada"}, {"ground_truth": "Ada"}],
        }
        | fields
    )


class TestPlugin:
    def test_the_answer_is_scored_before_each_turn_of_those_that_have_several(self):
        run = Scores([-2.0, -1.0, -1.5])
        Igpo(Igpo.Config()).estimate_advantage(run, batch())
        histories = [[1, 2, 3], [1, 2, 3, 11, 12, 70], [1, 2, 3, 11, 12, 70, 13, 70]]
        assert run.asked == [([*history, 90, 91], "Ada") for history in histories]

    def test_of_several_conversations_each_has_its_own_turns(self):
        """The second begins its second turn later than the first, the third not at all."""
        mask = torch.tensor([[1, 0, 1, 0, 0], [1, 1, 1, 0, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
        run = Scores([-1.0, -2.0, -3.0, -1.0])
        rows = batch(
            uid=["0-1-0"] * 3,
            session=[0, 1, 2],
            response_mask=mask,
            response_lengths=torch.tensor([3, 5, 2]),
            responses=torch.tensor([[11, 70, 12, 0, 0], [21, 22, 23, 71, 24], [31, 32, 0, 0, 0]]),
            prompts=torch.tensor([[1], [2], [3]]),
            prompt_lengths=torch.tensor([1, 1, 1]),
            old_log_probs=torch.zeros(3, 5),
            rm_scores=torch.zeros(3, 5),
            reward_model=[{"ground_truth": "Ada"}] * 3,
        )
        found = Igpo(Igpo.Config(by_std=False)).estimate_advantage(run, rows)
        assert [history[:-2] for history, _ in run.asked] == [[1], [1, 11, 70], [2], [2, 21, 22, 23, 71]]
        # gains -1 and 2 around their mean of 0.5, outcomes all alike
        assert found.tolist() == [[-1.5, 0, 0, 0, 0], [1.5, 1.5, 1.5, 0, 0], [0, 0, 0, 0, 0]]

    def test_gains_and_outcomes_are_credited(self):
        run = Scores([-2.0, -1.0, -1.5])
        found = Igpo(Igpo.Config()).estimate_advantage(run, batch())
        # gains 1 and -0.5 of one pool, outcomes 1 and 0 of another
        assert found[0].tolist() == pytest.approx([1.0, 1.0, 0, 0.0, 0, 1.0], abs=1e-3)
        assert found[1].tolist() == pytest.approx([-1.0, -1.0, 0, 0, 0, 0], abs=1e-3)
        expected = {"info_gain_mean": 0.25, "info_gain_max": 1.0, "info_gain_min": -0.5, "frac_positive_gain": 0.5}
        expected |= {"turns": 2.0, "fallback_frac": 0.0, "outcome_mean": 0.5, "groups_zero_outcome_spread": 0.0}
        assert {key: run.metrics[key] for key in expected} == pytest.approx(expected)
        assert run.metrics["info_gain_std"] == pytest.approx(0.75)

    def test_probabilities_in_place_of_their_logarithms(self):
        run = Scores([-2.0, -1.0, -1.5])
        Igpo(Igpo.Config(gain="prob_diff")).estimate_advantage(run, batch())
        assert run.metrics["info_gain_max"] == pytest.approx(np.exp(-1) - np.exp(-2), abs=1e-6)

    @pytest.mark.parametrize("truth", ["", None, []])
    def test_without_an_answer_to_believe_in_the_outcome_is_all(self, truth):
        run = Scores([])
        rows = batch(reward_model=[{"ground_truth": truth}, {"ground_truth": "Ada"}])
        found = Igpo(Igpo.Config()).estimate_advantage(run, rows)
        assert not run.asked and run.metrics["fallback_frac"] == 1.0
        assert found[0].tolist() == pytest.approx([1, 1, 0, 1, 0, 1], abs=1e-3)

    @pytest.mark.parametrize("place", range(3))
    def test_a_belief_that_is_no_number_leaves_the_outcome(self, place):
        run = Scores([float("nan") if number == place else -1.0 for number in range(3)])
        found = Igpo(Igpo.Config()).estimate_advantage(run, batch())
        assert run.metrics["fallback_frac"] == 1.0 and bool(found.isfinite().all())

    def test_of_several_known_answers_the_first_is_believed_in(self):
        run = Scores([-2.0, -1.0, -1.5])
        Igpo(Igpo.Config()).estimate_advantage(run, batch(reward_model=[{"ground_truth": ["Ada", "Lovelace"]}] * 2))
        assert {target for _, target in run.asked} == {"Ada"}

    def test_a_kl_in_the_reward_is_refused(self, sentence):
        with pytest.raises(CompositionError) as refusal:
            Igpo(Igpo.Config()).check(OmegaConf.create({"algorithm": {"use_kl_in_reward": True}}))
        sentence(refusal.value, "algorithm.use_kl_in_reward", "false")


class TestWordF1:
    @pytest.mark.parametrize(
        ("answer", "truth", "score"),
        [
            ("Leo Tolstoy", "leo tolstoy!", 1.0),
            ("the Tolstoy", "Leo Tolstoy", 0.5),
            ("Tolstoy Tolstoy", "Tolstoy", 1.0),
            ("Dickens", "Tolstoy", 0.0),
            ("", "Tolstoy", 0.0),
            ("?", "!", 1.0),
            ("a b c", "a", 0.5),
        ],
    )
    def test_shared_words(self, answer, truth, score):
        assert f1(answer, truth) == pytest.approx(score)

    @pytest.mark.parametrize(
        ("text", "answer"),
        [
            ("<think>x</think><answer> 4 </answer>", "4"),
            ("<answer>1</answer><answer>2</answer>", "2"),
            ("no block", None),
            ("<answer>1", None),
            ("</answer>1<answer>", None),
            ("<think><answer>1</answer>", None),
            ("<answer>1</answer></tool_call>", None),
            ("<answer><answer>1</answer></answer>", None),
            ("<tool_call>{}</tool_call><answer>a\nb</answer>", "a\nb"),
        ],
    )
    def test_the_form(self, text, answer):
        assert answer_in(text) == answer

    def test_verdicts(self):
        plugin = WordF1(WordF1.Config())
        right = plugin.score_answer(Answer("<answer>Ada</answer>", "Grace<|answer_split|>Ada", "qa"))
        assert (right.score, right.correct, right.parts["em"]) == (1.0, True, 1.0)
        part = plugin.score_answer(Answer("<answer>Ada Byron</answer>", ["Ada", "Grace Hopper"], "qa"))
        assert part.score == pytest.approx(2 / 3) and not part.correct
        broken = plugin.score_answer(Answer("Ada", "Ada", "qa"))
        assert (broken.score, broken.correct, broken.parts["format_error"]) == (-2.0, False, 1.0)
