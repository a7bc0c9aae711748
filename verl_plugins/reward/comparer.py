"""Verdicts on answers, for any process and from any thread; comparing is done in processes that can be killed.

    from verl_plugins.reward import verify
    verify(r"Hence it is \\boxed{0.5}.", r"\\frac12")     # Scored(correct=True, reason='equal value', answer='0.5', …)

Text is searched and brought into its normal form here; nothing is read as mathematics outside of the worker processes
(`pool.py`): a few characters keep a computer algebra system busy for hours or fill the memory.
"""

from __future__ import annotations

import logging
import math
import re
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from cachetools import LRUCache, cached

from verl_plugins.reward import words
from verl_plugins.reward.final_answer import LAST, final_answer, marked_answer
from verl_plugins.reward.normal_form import normal_form
from verl_plugins.reward.pool import DeadlinePassed, Pool, WorkerDied

logger = logging.getLogger(__name__)

RIGHT = ("equal text", "equal value")
REASONS = (*RIGHT, "not equal", "no final answer", "not understood", "no ground truth", "error", "time-out")
"""Why an answer is right or wrong; one of them is the reason of each verdict."""
WORK = "verl_plugins.reward.judging:load"
LONGEST = 2000
"""Longer answers and truths are compared as texts only."""
WHOLE_NUMBER = re.compile("0|-?[1-9][0-9]*")
"""Written in the one usual way: two of them are equal only if they are the same string."""

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
CALCULATION = re.compile(rf"{NUMBER.pattern}(?:\s*(?:[-+*×·⋅÷−]|\\(?:times|cdot|div))\s*{NUMBER.pattern})+")
"""With plain numbers, and not a fraction or a power, which are values as they stand."""


@dataclass(frozen=True)
class Scored:
    """The verdict on an answer."""

    correct: bool
    reason: str
    """One of `REASONS`."""
    answer: str = ""
    """The final answer as it is written; "" if there is none."""
    form: str = ""
    """The final answer in its normal form; equal ones are the same text."""
    what: str = ""
    """What was not understood, or the error."""

    @property
    def score(self) -> float:
        return float(self.correct)


class Comparer:
    """Processes that compare, and a memory of what they found.

    Args:
        workers: processes; none starts before `start` of the pool or the first comparison that needs one.
        deadline: seconds per comparison.
        memory_mb: the most address space of a process.
        max_characters: how far from the end of a response marks other than boxes and tags are looked for.
        cache_size: comparisons that are remembered.
        calculations: whether `8 + 19` is the answer 27, where it is all that is said or marked as the answer.
    """

    def __init__(
        self,
        workers: int = 1,
        deadline: float = 5.0,
        memory_mb: int = 1024,
        max_characters: int = LAST,
        cache_size: int = 16384,
        calculations: bool = True,
    ) -> None:
        self.pool = Pool(WORK, workers, deadline, memory_mb << 20)
        self.max_characters, self.calculations = max_characters, calculations
        # With the condition, threads that bring the same pair wait for the first instead of hanging as well.
        self._remembered = cached(LRUCache(cache_size), condition=threading.Condition())(self._ask)

    def verify(self, text: str, truth: Any) -> Scored:
        """Whether the final answer of the response `text` is `truth`.

        Raises:
            PluginError: the processes cannot be started.
        """
        answer = final_answer(text, self.max_characters)
        expected = ground_truth(truth)
        if answer is None:
            return Scored(False, "no final answer" if expected is not None else "no ground truth")
        found = self.compare(answer, truth)
        if found.correct and NUMBER.fullmatch(expected) and self._is_the_question(text, found):
            return replace(found, correct=False, reason="not equal", what="a calculation that is not carried out")
        return found

    def _is_the_question(self, text: str, found: Scored) -> bool:
        """Whether a calculation stands for its result: nowhere if so set, else not where the text goes on after it."""
        if not CALCULATION.fullmatch(found.form.replace("(", "").replace(")", "")):
            return False
        goes_on = re.search(r"[^\W\d_]{2}", text.rpartition(found.answer)[2])
        return not self.calculations or bool(goes_on and not marked_answer(text, self.max_characters)[0])

    def compare(self, answer: str, truth: Any) -> Scored:
        """Whether an answer, which is not searched for in a longer text, is `truth`.

        Raises:
            PluginError: the processes cannot be started.
        """
        answer = answer.strip()
        form, expected = normal_form(answer), ground_truth(truth)
        if expected is None:
            return Scored(False, "no ground truth", answer, form)
        if not form:
            return Scored(False, "no final answer")
        if form == expected:
            return Scored(True, "equal text", answer, form)
        if WHOLE_NUMBER.fullmatch(form) and WHOLE_NUMBER.fullmatch(expected):
            return Scored(False, "not equal", answer, form)
        if max(len(form), len(expected)) > LONGEST:
            return Scored(False, "not understood", answer, form, f"longer than {LONGEST} characters")
        reason, what = self._remembered(form, expected)
        return Scored(reason in RIGHT, reason, answer, form, what)

    def plainly(self, text: str, truth: Any) -> bool:
        """What plain Math-Verify says of the end of a response; an error or time-out is a no.

        Raises:
            PluginError: the processes cannot be started.
        """
        try:
            reply = self.pool.ask({"text": text[-self.max_characters :], "expected": str(truth)})
        except (DeadlinePassed, WorkerDied):
            return False
        return reply["correct"]

    def _ask(self, form: str, expected: str) -> tuple[str, str]:
        try:
            reply = self.pool.ask({"answer": form, "truth": expected})
        except DeadlinePassed as error:
            logger.warning("math_verify: timeout (%s), scoring %r", error, form[-200:])
            return "time-out", str(error)
        except WorkerDied as error:
            reply = {"reason": "error", "what": str(error)}
        if reply["reason"] == "error":
            logger.warning("math_verify: error (%s), scoring %r", reply["what"], form[-200:])
        return reply["reason"], reply.get("what", "")


def ground_truth(truth: Any) -> str | None:
    """A ground truth in normal form; None where there is none, or a word such as "proof" that stands for none."""
    if truth is None or (isinstance(truth, float) and math.isnan(truth)):
        return None
    text = str(truth).strip()
    marked, answer = marked_answer(text)
    if marked:
        text = answer or ""
    form = normal_form(text)
    return form if form and words.is_answer(text) else None


@cache
def _comparer(workers: int, deadline: float) -> Comparer:
    return Comparer(workers, deadline)


def verify(text: str, truth: Any, *, deadline: float = 5.0) -> Scored:
    """The verdict on one response: whether its final answer equals `truth`.

    The first call starts a worker process, which takes some seconds and ends with this process; an answer that is not
    compared within `deadline` seconds has the reason `time-out`.

    Raises:
        PluginError: the worker process cannot be started.
    """
    return _comparer(1, deadline).verify(text, truth)


def verify_all(pairs: Iterable[tuple[str, Any]], *, workers: int = 4, deadline: float = 5.0) -> list[Scored]:
    """The verdicts on pairs of response and ground truth, in order, compared by several worker processes.

    Raises:
        PluginError: the worker processes cannot be started.
    """
    comparer = _comparer(workers, deadline)
    with ThreadPoolExecutor(workers) as threads:
        return list(threads.map(lambda pair: comparer.verify(*pair), pairs))
