"""Score an answer by mathematical equality with the ground truth, 1 for right and 0 for wrong.

What the final answer is, is said in `final_answer.py`; how it is compared, in `compare.py`. The reason of each verdict
is kept: its share over the responses is a metric.
"""

from __future__ import annotations

from dataclasses import dataclass

from verl_plugins.hookspecs import hookimpl
from verl_plugins.plugin import Plugin, setting
from verl_plugins.reward.comparer import REASONS, Comparer
from verl_plugins.services import Answer, Verdict


class MathVerify(Plugin):
    """Right or wrong by mathematical equality: the default scorer of presets, which any other scorer replaces."""

    name = "math_verify"
    paper = "https://github.com/huggingface/Math-Verify"

    @dataclass
    class Config:
        max_characters: int = setting(
            2000, "how far from the end of a response marks other than boxes and tags are looked for", ge=1
        )
        cache_size: int = setting(16384, "pairs of answer and truth whose verdict is remembered", ge=0)
        workers: int = setting(4, "processes that compare answers, for each of verl's reward workers", ge=1)
        deadline: float = setting(5.0, "seconds a comparison may take before its process is killed", gt=0)
        memory_mb: int = setting(1024, "the most memory (address space) a process may take, in MiB", ge=256)
        calculations: bool = setting(
            True, "whether `8 + 19` is the answer 27; set it to false where that is the question"
        )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.comparer = Comparer(
            config.workers,
            config.deadline,
            config.memory_mb,
            config.max_characters,
            config.cache_size,
            config.calculations,
        )

    def start_scoring(self) -> None:
        self.comparer.pool.start()

    @hookimpl(trylast=True)
    def score_answer(self, answer: Answer) -> Verdict:
        found = self.comparer.verify(answer.text, answer.ground_truth)
        parts = {
            "answer": found.form,
            "reason": found.reason,
            "verifier_error": float(found.reason == "error"),
            "verifier_timeout": float(found.reason == "time-out"),
        }
        for reason in REASONS:
            if reason not in ("error", "time-out"):
                parts[reason.replace(" ", "_")] = float(found.reason == reason)
        return Verdict(found.score, found.correct, parts)
