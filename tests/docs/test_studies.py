"""The tasks of the studies: what their teachers call a right answer is one for the scorer of the study."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import yaml

from verl_plugins.commands.study.design import function
from verl_plugins.reward import verify

FOLDER = Path(__file__).parents[2] / "benchmarks/studies"
SUMS = [f"{a}+{b}+{c}=" for a in (0, 3, 9) for b in (1, 8) for c in (2, 7)]
BY_LAST_NUMBER = {"worked_sums.py:prepare", "formatted_sums.py:prepare"}


def total(prompt: str) -> int:
    return sum(map(int, prompt.rstrip("=").split("+")))


def last_number(text: str, truth: int) -> bool:
    score = function("last_number.py:compute_score", FOLDER)
    return score("sums", text, str(truth))["score"] == 1


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_numbers_in_a_row_are_scored_by_the_last(file):
    study = yaml.safe_load(file.read_text()).get("study", {})
    needed = study.get("prepare") in BY_LAST_NUMBER
    assert needed == ("reward.custom_reward_function.path={here}/last_number.py" in study.get("common", []))


@pytest.mark.parametrize("prompt", SUMS)
def test_a_worked_answer_is_right_by_its_last_number(prompt, monkeypatch):
    worked = function("worked_sums.py:worked", FOLDER)
    monkeypatch.setitem(worked.__globals__, "ERRS", 0.0)
    answer = worked(prompt, random.Random(0))
    assert last_number(answer, total(prompt)) and not last_number(answer, total(prompt) + 1)
    assert not last_number("", 0)


@pytest.mark.parametrize("prompt", SUMS)
def test_the_common_task_s_form_is_what_the_scorer_takes(prompt):
    truth = total(prompt)
    for said in ("", "7 ", "7 7 7 12 "):
        assert verify(f"{said}`{truth}`", str(truth)).correct
        assert not verify(f"{said}`{truth + 1}`", str(truth)).correct
        assert not verify(f"{said}{truth}?", str(truth)).correct


def test_the_evidence_page_has_the_numbers_that_are_kept():
    folder = FOLDER.parent
    summary, block = function("evidence.py:summary", folder), function("evidence.py:block", folder)
    page = (FOLDER.parents[1] / "docs/evidence.md").read_text()
    begin, end = (block.__globals__[name] for name in ("BEGIN", "END"))
    made, found = summary()
    assert found and page.partition(begin)[2].partition(end)[0].strip() == block(made)
