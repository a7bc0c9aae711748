"""A plugin that compares what rollout server and actor make of the same tokens; installed by the tests."""

from __future__ import annotations

from typing import Any

import torch

from verl_plugins import Plugin, hookimpl

PROBES = 16


class Agreement(Plugin):
    name = "agreement"
    needs = frozenset({"old_log_probs", "rollout_log_probs"})

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.questions: list[Any] = []
        self.answers: list[list[int]] = []
        self.before: torch.Tensor | None = None

    @hookimpl
    def observe(self, run, batch):
        difference = (batch.rollout_log_probs - batch.old_log_probs)[batch.response_mask].abs()
        run.log({"difference": difference.max(), "moved": self.moved(run, batch), **self.generated(run)})

    def moved(self, run, batch) -> float:
        """By how much the last update changed log-probs: what a server with stale weights would be off by."""
        if not self.questions:
            rows = range(0, len(batch), len(batch) // PROBES)
            self.questions = [run.dataset[batch.prompt_id[row].item()]["raw_prompt"] for row in rows]
            self.answers = [batch.responses[row, : batch.lengths[row]].tolist() for row in rows]
        now = torch.cat(run.score(self.questions, self.answers))
        before, self.before = self.before, now
        return 0.0 if before is None else float((now - before).abs().max())

    def generated(self, run) -> dict[str, float]:
        """Asked twice with the same seeds; and the log-probs reported with the answers against the actor's."""
        questions = [question for question in self.questions[:4] for _ in range(4)]
        seeds = run.rng("generate").bit_generator  # run.generate draws its seeds from this one
        state = seeds.state
        first = sum(run.generate(self.questions[:4], n=4), [])
        seeds.state = state
        again = sum(run.generate(self.questions[:4], n=4), [])
        answers = [answer.token_ids for answer in first]
        repeated = [one == other.token_ids for one, other in zip(answers, again, strict=True)]
        reported = torch.cat([torch.tensor(answer.log_probs) for answer in first])
        return {
            "repeated": sum(repeated) / len(repeated),
            "distinct": len({tuple(answer) for answer in answers}),
            "generated_difference": float((reported - torch.cat(run.score(questions, answers))).abs().max()),
        }
