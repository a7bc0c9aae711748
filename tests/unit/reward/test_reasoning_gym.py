"""Scores of reasoning-gym: its own, from confined processes, for what a response gives as its answer."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reasoning_gym.factory import create_dataset, get_score_answer_fn

from verl_plugins import DataError
from verl_plugins.reward.gym_entries import from_text, to_text
from verl_plugins.reward.reasoning_gym import ReasoningGym, answer_of
from verl_plugins.services import Answer, Verdict

TASKS = {
    "chain_sum": {},
    "countdown": {},
    "simple_integration": {},  # its scorer evaluates the answer with sympy
    "number_sorting": {},  # its scorer reads a literal
    "spell_backward": {},
    "knights_knaves": {},
    "shortest_path": {},
    "rearc": {},  # a board of tuples
    "graph_color": {},  # no answer of its own
    "word_ladder": {},  # its scorer reads a list of words
}


@pytest.fixture(scope="module")
def scorer() -> Iterator[ReasoningGym]:
    plugin = ReasoningGym(ReasoningGym.Config(deadline=20))
    yield plugin
    plugin.pool.close()


def entry(task: str, place: int = 0) -> dict[str, Any]:
    return create_dataset(task, size=place + 1, seed=3, **TASKS.get(task, {}))[place]


def scored(plugin: ReasoningGym, task: str, found: dict[str, Any], text: str) -> Verdict:
    extra = {"task": task, "entry": to_text(found), "index": 0}
    return plugin.score_answer(Answer(text, found["answer"], f"reasoning_gym/{task}", extra))


@pytest.mark.parametrize("task", TASKS)
def test_what_the_librarys_own_scorer_says(scorer: ReasoningGym, task: str) -> None:
    for place in range(3):
        found = entry(task, place)
        own = get_score_answer_fn(task)
        for given_answer in (str(found["answer"]), "17", "not this", "[1, 2]", "x + 1"):
            expected = float(own(given_answer, found))
            verdict = scored(scorer, task, found, f"So.\n<answer>{given_answer}</answer>")
            assert (verdict.score, verdict.correct) == (expected, expected >= 1), (given_answer, verdict)
            assert verdict.parts["scorer_timeout"] == 0


def test_right_answers_are_right(scorer: ReasoningGym) -> None:
    right = [task for task in TASKS if task != "graph_color"]
    assert all(scored(scorer, task, found, f"{found['answer']}").correct for task in right for found in [entry(task)])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer> 12 </answer>", "12"),
        ("first <answer>1</answer> no, <answer>2</answer>", "2"),
        ("<think>3 or 4</think>\n1 2\n3 4", "1 2\n3 4"),
        (r"Thus \boxed{7}.", "7"),
        ("The answer is **blue**.", "blue"),
        ("<think>it is 5", ""),
        ("<answer>A is true, and B is not.</answer>", "A is true, and B is not."),
        ("<answer>\n1 2\n3 4\n</answer>", "1 2\n3 4"),
        ("<answer></answer>", ""),
        ("", ""),
    ],
)
def test_what_the_answer_is(text: str, answer: str) -> None:
    assert answer_of(text) == answer


def test_an_answer_that_is_none_is_not_asked_about(scorer: ReasoningGym) -> None:
    verdict = scored(scorer, "chain_sum", entry("chain_sum"), "<think>hm")
    assert (verdict.score, verdict.correct, verdict.parts["no_final_answer"]) == (0, False, 1)


def test_partial_credit() -> None:
    """The scorer of boards gives 0.05 for any board."""
    for partial in (True, False):
        plugin = ReasoningGym(ReasoningGym.Config(partial=partial, correct_from=0.05, deadline=20))
        verdict = scored(plugin, "rearc", entry("rearc"), "<answer>1 2</answer>")
        plugin.pool.close()
        part = verdict.parts["partial_score"]
        assert part == 0.05 and verdict.correct
        assert verdict.score == (part if partial else 1)


def test_a_scorer_that_raises_is_counted(scorer: ReasoningGym) -> None:
    verdict = scored(scorer, "prime_factorization", entry("prime_factorization"), "<answer>zzz</answer>")
    assert (verdict.score, verdict.parts["scorer_error"]) == (0, 1)


def test_one_that_hangs_costs_the_deadline() -> None:
    plugin = ReasoningGym(ReasoningGym.Config(deadline=1.0))
    found = entry("countdown")
    scored(plugin, "countdown", found, "<answer>1</answer>")  # its processes have started
    verdict = scored(plugin, "countdown", found, "<answer>9**9**9**9</answer>")
    plugin.pool.close()
    assert verdict.score == 0 and verdict.parts["scorer_timeout"] + verdict.parts["scorer_error"] <= 1


@pytest.mark.parametrize("attack", ["__import__('os').system('touch {}')", "open('{}', 'w')", "[open('{}', 'w')]"])
@pytest.mark.parametrize("task", ["countdown", "simple_integration", "number_sorting", "word_ladder"])
def test_nothing_runs_what_a_model_wrote(scorer: ReasoningGym, tmp_path, task: str, attack: str) -> None:
    file = tmp_path / "touched"
    scored(scorer, task, entry(task), f"<answer>{attack.format(file)}</answer>")
    assert not file.exists()


def test_rows_of_other_data_are_refused(scorer: ReasoningGym) -> None:
    with pytest.raises(DataError, match="row 5 of own .*`verl-plugins data gym`"):
        scorer.score_answer(Answer("1", "1", "own", {"index": 5}))


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
KEYS = st.text() | st.integers() | st.tuples(st.integers(), st.text())
VALUES = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(KEYS, inner)
        | st.frozensets(st.integers() | st.text()).map(set)
    ),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(st.text(), VALUES, max_size=4))
def test_entries_come_back_as_they_were(found: dict[str, Any]) -> None:
    assert from_text(to_text(found)) == found


def test_entries_of_numpy_are_plain_and_others_refused() -> None:
    assert from_text(to_text({"a": np.arange(3), "b": np.float64(2)})) == {"a": [0, 1, 2], "b": 2.0}
    with pytest.raises(DataError, match="holds a Colour"):
        to_text({"a": Enum("Colour", "red").red})
