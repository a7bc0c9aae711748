"""Score a short answer by the words it shares with the known one; a broken form is punished.

As IGPO and DeepResearcher (arXiv:2510.14967, 2504.03160) score answers to questions. Of the text between the last
`<answer>` and `</answer>`, in lower case, punctuation as blanks, words as a set:

    P = shared / words of the answer,  R = shared / words of the truth,  F1 = 2 P R / (P + R)

the best over alternative truths. The form is broken where tags of one kind do not open and close in turn, or where
there is no answer block: then the score is `penalty`. Degenerate cases: an answer without words scores 0, or 1 if the
truth has none either.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from verl_plugins.hookspecs import hookimpl
from verl_plugins.plugin import Plugin, setting
from verl_plugins.services import Answer, Verdict

TAGS = ("code", "tool_call", "think", "answer")
WORD = re.compile(r"[^\W_]+")
BLOCK = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def words(text: str) -> list[str]:
    """In lower case, without punctuation."""
    return WORD.findall(text.lower())


def f1(answer: str, truth: str) -> float:
    """Of the sets of words."""
    ours, theirs = {*words(answer)}, {*words(truth)}
    if not ours or not theirs:
        return float(ours == theirs)
    shared = len(ours & theirs)
    return 2 * shared / (len(ours) + len(theirs))


def answer_in(text: str) -> str | None:
    """What stands in the last answer block; None where the form is broken."""
    for tag in TAGS:
        open_ = False
        for found in re.finditer(rf"<(/?){tag}>", text):
            if open_ != bool(found[1]):
                return None
            open_ = not open_
        if open_:
            return None
    blocks = BLOCK.findall(text)
    return blocks[-1].strip() if blocks else None


class WordF1(Plugin):
    """Rewards words shared with the known answer."""

    name = "word_f1"
    paper = "arXiv:2510.14967"

    @dataclass
    class Config:
        penalty: float = setting(-2.0, "score of an answer whose form is broken", authors=-2.0, le=0)
        separator: str = setting("<|answer_split|>", "between alternative truths", authors="<|answer_split|>")

    @hookimpl
    def score_answer(self, answer: Answer) -> Verdict:
        truths = answer.ground_truth if isinstance(answer.ground_truth, (list, tuple)) else [answer.ground_truth]
        truths = [part for truth in truths for part in str(truth).split(self.config.separator)]
        given = answer_in(answer.text)
        if given is None:
            return Verdict(self.config.penalty, False, {"answer": "", "f1": 0.0, "em": 0.0, "format_error": 1.0})
        score = max(f1(given, truth) for truth in truths)
        exact = float(any(words(given) == words(truth) for truth in truths))
        return Verdict(score, bool(exact), {"answer": given, "f1": score, "em": exact, "format_error": 0.0})
