"""My method: right is a response whose last word is the truth.

Words are what stands between spaces, without punctuation at their ends. A right response scores 1, another one `wrong`.
Nothing that the model wrote is parsed or evaluated.
"""

from dataclasses import dataclass

from verl_plugins import Answer, Plugin, Verdict, hookimpl, setting


def last_word(text: str) -> str:
    """The last word; empty where there is none."""
    return text.split()[-1].strip(".,:;!?*$") if text.split() else ""


class MyMethod(Plugin):
    """A comparison of words."""

    name = "my_method"

    @dataclass
    class Config:
        wrong: float = setting(0.0, "score of a response that is not right", le=1)

    @hookimpl
    def score_answer(self, answer: Answer) -> Verdict:
        correct = last_word(answer.text) == str(answer.ground_truth)
        return Verdict(1.0 if correct else self.config.wrong, correct, {"words": len(answer.text.split())})
