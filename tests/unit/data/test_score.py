"""`verl-plugins score`: which columns are read, what is said of each answer, and what is refused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from verl_plugins.commands.cli import app
from verl_plugins.data.score import LOST, REWARDED, print_scores, score
from verl_plugins.errors import DataError

ROWS = [
    {"text": r"\boxed{0.5}", "truth": r"\frac12"},
    {"text": r"\boxed{132_5}", "truth": "132_7"},
    {"text": "**Answer:** 3√2", "truth": r"3\sqrt{2}"},
    {"text": "I do not know where to begin.", "truth": "4"},
    {"text": "\\boxed{4 ∇ \x1b[31m}", "truth": "4"},
    {"text": "5", "truth": None},
]
REASONS = ["equal value", "not equal", "equal text", "no final answer", "not understood", "no ground truth"]


@pytest.fixture
def answers(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows into a file."""

    def write(*rows: dict[str, Any], name: str = "answers.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(map(json.dumps, rows)))
        return path

    return write


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The verdicts on `ROWS`."""
    path = tmp_path_factory.mktemp("scores") / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return score(path, workers=1)


def test_each_answer_has_its_reason(scores: Any) -> None:
    assert [row.verdict.reason for row in scores.rows] == REASONS
    assert scores.shares() == {**dict.fromkeys(REASONS, 1), "error": 0, "time-out": 0}
    assert scores.plain()["accuracy"] == 2 / 6


def test_disagreement_with_plain_math_verify_is_labelled(scores: Any) -> None:
    labels = [row.disagreement for row in scores.rows]
    assert (labels[0], labels[1], labels[2]) == ("", REWARDED, LOST)


def test_the_table_shows_nothing_that_a_terminal_obeys(scores: Any) -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    print_scores(scores, console, 20)
    text = console.export_text()
    assert "\x1b" not in text and "not understood: " in text and "6 answers, 33.3% right" in text


def test_dumps_of_a_run_are_read_in_the_order_of_steps(answers: Any) -> None:
    for step, text in ((2, "2"), (10, "10"), (1, "3")):
        answers({"input": "?", "output": text, "gts": str(step), "score": 0.0}, name=f"dump/{step}.jsonl")
    found = score(answers({"output": "2", "gts": "2"}, name="dump/2.jsonl").parent, workers=1)
    assert [(row.truth, row.verdict.correct) for row in found.rows] == [("1", False), ("2", True), ("10", True)]


def test_the_command_prints_plain_data(answers: Any) -> None:
    file = answers({"mine": "#### 4", "gold": {"it": 4}})
    done = CliRunner().invoke(app, ["score", str(file), "--text", "mine", "--truth", "gold.it", "--json"])
    assert done.exit_code == 0
    data = json.loads(done.stdout)
    assert (data["answers"], data["accuracy"], data["rows"][0]["reason"]) == (1, 1.0, "equal text")


@pytest.mark.parametrize(
    ("rows", "options", "parts"),
    [
        ([{"text": "5", "truth": None}], {}, ("no row", "truth", "--truth")),
        ([{"words": "5", "truth": "5"}], {}, ("words, truth", "--text")),
        ([{"text": "5", "what": "5"}], {}, ("text, what", "--truth")),
        ([{"text": "5", "truth": "5"}], {"text": "tex"}, ("--text tex", "did you mean 'text'")),
        ([{"text": 5, "truth": "5"}], {}, ("row 1", "column text", "int")),
        ([], {}, ("no rows",)),
    ],
)
def test_what_cannot_be_scored_is_one_sentence(
    answers: Any, sentence: Any, rows: list, options: dict, parts: tuple[str, ...]
) -> None:
    with pytest.raises(DataError) as caught:
        score(answers(*rows), workers=1, **options)
    sentence(caught.value, *parts)


def test_a_folder_without_dumps_says_how_to_get_some(tmp_path: Path, sentence: Any) -> None:
    with pytest.raises(DataError) as caught:
        score(tmp_path)
    sentence(caught.value, "trainer.rollout_data_dir")
