"""Score an answer by mathematical equality with the ground truth (Math-Verify), 1 for right and 0 for wrong.

Equal strings are right and different whole numbers wrong without any parsing. All else is compared in processes that
can be killed (`pool.py`): a few characters keep a computer algebra system busy for hours or fill the memory. An answer
without an expression is wrong. So is one whose comparison raises an exception or ends its process (`verifier_error`) or
passes the deadline (`verifier_timeout`); both are counted apart.
"""

from __future__ import annotations

import logging
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cachetools import LRUCache, cached

from verl_plugins.hookspecs import hookimpl
from verl_plugins.plugin import Plugin, setting
from verl_plugins.reward import verifier
from verl_plugins.reward.pool import DeadlinePassed, Pool, WorkerDied
from verl_plugins.services import Answer, Verdict

logger = logging.getLogger(__name__)

WHOLE_NUMBER = re.compile("0|-?[1-9][0-9]*")
"""Written in the one usual way: two of them are equal only if they are the same string."""


class Comparison(NamedTuple):
    """What is known of an answer."""

    correct: bool
    extracted: str
    """The expression that was compared, as LaTeX or a number; "" if none was found or the comparison did not end."""
    error: bool = False
    timeout: bool = False


class Comparer:
    """Math-Verify in processes of its own, and a memory of what they found: for any process, from any thread.

    Args:
        workers: processes; none starts before `start` or the first comparison.
        deadline: seconds per comparison.
        memory_mb: the most address space of a process.
        max_characters: longer answers are cut to their end.
        cache_size: comparisons that are remembered.
    """

    def __init__(
        self,
        workers: int = 1,
        deadline: float = 5.0,
        memory_mb: int = 1024,
        max_characters: int = 2000,
        cache_size: int = 16384,
    ) -> None:
        self.pool = Pool(Path(verifier.__file__), workers, deadline, memory_mb << 20)
        self.max_characters = max_characters
        # With the condition, threads that bring the same pair wait for the first instead of hanging as well.
        self._remembered = cached(LRUCache(cache_size), condition=threading.Condition())(self._compare)

    def compare(self, answer: str, truth: str) -> Comparison:
        """Whether the last expression in `answer` equals `truth`, which may be LaTeX without its dollar signs.

        Raises:
            PluginError: the processes cannot be started.
        """
        answer, truth = answer.strip(), truth.strip()
        if answer == truth:
            return Comparison(True, answer)
        answer = answer[-self.max_characters :]
        if WHOLE_NUMBER.fullmatch(answer) and WHOLE_NUMBER.fullmatch(truth):
            return Comparison(answer == truth, answer)
        return self._remembered(answer, truth)

    def _compare(self, answer: str, truth: str) -> Comparison:
        try:
            reply = self.pool.ask({"answer": answer, "truth": truth})
        except DeadlinePassed as error:
            logger.warning("math_verify: timeout (%s), scoring %r", error, answer[-200:])
            return Comparison(False, "", timeout=True)
        except WorkerDied as error:
            reply = {"correct": False, "answer": "", "error": str(error)}
        if "error" in reply:
            logger.warning("math_verify: error (%s), scoring %r", reply["error"], answer[-200:])
        return Comparison(reply["correct"], reply["answer"], error="error" in reply)


class MathVerify(Plugin):
    """Right or wrong by Math-Verify: the default scorer of presets, which any other scorer replaces."""

    name = "math_verify"
    paper = "https://github.com/huggingface/Math-Verify"

    @dataclass
    class Config:
        max_characters: int = setting(2000, "longer answers are cut to their end before they are parsed", ge=1)
        cache_size: int = setting(16384, "pairs of answer and truth whose verdict is remembered", ge=0)
        workers: int = setting(4, "processes that compare answers, for each of verl's reward workers", ge=1)
        deadline: float = setting(5.0, "seconds a comparison may take before its process is killed", gt=0)
        memory_mb: int = setting(1024, "the most memory (address space) a process may take, in MiB", ge=256)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.comparer = Comparer(
            config.workers, config.deadline, config.memory_mb, config.max_characters, config.cache_size
        )

    def start_scoring(self) -> None:
        self.comparer.pool.start()

    @hookimpl(trylast=True)
    def score_answer(self, answer: Answer) -> Verdict:
        found = self.comparer.compare(answer.text, str(answer.ground_truth))
        parts = {"answer": found.extracted, "verifier_error": float(found.error)}
        return Verdict(float(found.correct), found.correct, {**parts, "verifier_timeout": float(found.timeout)})
