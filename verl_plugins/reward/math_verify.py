"""Score an answer by mathematical equality with the ground truth (Math-Verify), 1 for right and 0 for wrong.

Two equal strings are right without any parsing. An answer that cannot be parsed is wrong; an exception of the parser
is counted apart from a wrong answer (`verifier_error`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache

from verl_plugins.hookspecs import hookimpl
from verl_plugins.plugin import Plugin, setting
from verl_plugins.services import Answer, Verdict


def is_equal(answer: str, truth: str) -> bool:
    """Whether the last expression in `answer` equals `truth`, which may be LaTeX without its dollar signs."""
    from math_verify import parse, verify

    # Both time-outs rely on signals, which work in the main thread only; reward workers score in others.
    # Bare LaTeX is read up to its first command: 2\sqrt{3} would be 2.
    return verify(parse(f"${truth}$", parsing_timeout=None), parse(answer, parsing_timeout=None), timeout_seconds=None)


class MathVerify(Plugin):
    """Right or wrong by Math-Verify: the default scorer of presets, which any other scorer replaces."""

    name = "math_verify"
    paper = "https://github.com/huggingface/Math-Verify"

    @dataclass
    class Config:
        max_characters: int = setting(2000, "longer answers are cut to their end before they are parsed", ge=1)
        cache_size: int = setting(16384, "pairs of answer and truth whose verdict is remembered", ge=0)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        for name in ("math_verify.parser", "math_verify.grader"):
            logging.getLogger(name).setLevel(logging.ERROR)  # each call would warn that its time-out is off
        self._is_equal = lru_cache(maxsize=config.cache_size)(is_equal)

    @hookimpl(trylast=True)
    def score_answer(self, answer: Answer) -> Verdict:
        text, truth = answer.text.strip(), str(answer.ground_truth).strip()
        if text == truth:
            return Verdict(1.0, True, {"answer": text, "verifier_error": 0.0})
        try:
            correct = self._is_equal(text[-self.config.max_characters :], truth)
        except Exception:
            return Verdict(0.0, False, {"answer": text, "verifier_error": 1.0})
        return Verdict(float(correct), correct, {"answer": text, "verifier_error": 0.0})
