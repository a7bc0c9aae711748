"""My method: verdicts by hand."""

import pytest
from my_method.method import MyMethod

from verl_plugins import Answer


@pytest.mark.parametrize(
    ("text", "correct"),
    [("The answer is **12**.", True), ("12", True), ("12 or 13", False), ("", False), ("...", False)],
)
def test_by_hand(text: str, correct: bool) -> None:
    verdict = MyMethod(MyMethod.Config(wrong=-1.0)).score_answer(Answer(text, "12", "sums"))
    assert (verdict.correct, verdict.score) == (correct, 1.0 if correct else -1.0)
    assert verdict.parts == {"words": len(text.split())}
