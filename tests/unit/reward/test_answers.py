"""Answers with the verdict a person gives, by kind: `tests/data/answers.jsonl`."""

import json
from collections import defaultdict
from pathlib import Path

import pytest

from verl_plugins.reward.compare import judge
from verl_plugins.reward.comparer import Comparer

FILE = Path(__file__).parents[2] / "data" / "answers.jsonl"
ROWS = [json.loads(line) for line in FILE.read_text().splitlines()]
KINDS = sorted({row["kind"] for row in ROWS})
MISSED: set[tuple[str, str]] = set()
"""Right answers that are known not to be seen, as (text, truth): the guide lists them with the reason."""


@pytest.fixture(scope="module")
def verdicts():
    """Row and verdict of each answer by kind; compared in this process."""
    comparer = Comparer(cache_size=0)
    comparer.pool.ask = lambda request: judge(**request)
    found = defaultdict(list)
    for row in ROWS:
        found[row["kind"]].append((row, comparer.verify(row["text"], row["truth"])))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_as_a_person_judges(verdicts, kind):
    wrong = [(row["text"], row["truth"], verdict) for row, verdict in verdicts[kind] if verdict.correct != row["right"]]
    assert [one for one in wrong if one[2].correct] == [], "rewarded, but wrong"
    assert [one for one in wrong if (one[0], one[1]) not in MISSED] == [], "right, but not rewarded"


@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_ends_in_an_error(verdicts, kind):
    assert [row["text"] for row, verdict in verdicts[kind] if verdict.reason in ("error", "time-out")] == []


def test_there_are_right_and_wrong_ones_of_many_kinds():
    right = sum(row["right"] for row in ROWS)
    assert len(KINDS) >= 45
    assert min(right, len(ROWS) - right) >= 400
    assert len(MISSED) <= 0.02 * len(ROWS)


@pytest.mark.parametrize("text", ["8 + 19", "The answer is 8+19", r"\boxed{8 + 19}", "So: $8+19$"])
def test_a_calculation_is_no_answer_where_calculations_are_the_questions(text):
    for calculations in (True, False):
        comparer = Comparer(cache_size=0, calculations=calculations)
        comparer.pool.ask = lambda request: judge(**request)
        assert comparer.verify(text, "27").correct is calculations
        assert comparer.verify("8 + 19 = 27", "27").correct
        assert comparer.verify("27", "27").correct
