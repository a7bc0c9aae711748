"""A plugin that implements every stage and writes down what it sees; installed by the tests as a third party would.

Every stage but three: it trains with vLLM, too, where nobody may shape logits (`test_logits.py` does), without a critic
(`test_ravl.py` has one) and without a teacher (`test_dhkd.py` has one).
"""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from verl_plugins import DataError, Plugin, Verdict, hookimpl, setting
from verl_plugins.hookspecs import STAGES

IMPLEMENTED = tuple(stage for stage in STAGES if stage not in ("shape_logits", "value_loss", "distillation_loss"))
SHORT, LONG = 2, 12
"""Response budgets of even and odd prompts."""
TARGETS = ["1", "23", "456\n"]
TEMPERATURE = 0.7
DROPPED = 7
"""The session of each group that is left out of the update."""


class EveryStage(Plugin):
    name = "every_stage"
    needs = frozenset({"entropy", "current_entropy", "old_log_probs", "prompt_log_probs", "rollout_log_probs"})

    @dataclass
    class Config:
        folder: str = setting("", "Where records and tensors are written.")
        queue: bool = setting(False, "Whether the queue is looked at, which only a training has.")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.folder = Path(config.folder)
        self.counter = itertools.count()
        self.left_out: list[str] = []
        self.updates = np.zeros(4, dtype=np.int64)
        self.total = torch.zeros(2, dtype=torch.float64)

    def record(self, stage: str, **facts: Any) -> None:
        """One line: stage, process, its title, the order of the call within the process, facts."""
        role = Path("/proc/self/cmdline").read_text().split("\0")[0].split(".")[0]
        line = {"stage": stage, "pid": os.getpid(), "role": role, "order": next(self.counter), **facts}
        with (self.folder / f"{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def dump(self, name: str, **tensors: Any) -> None:
        torch.save(tensors, self.folder / f"{name}.pt")

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "total": self.total, "names": ["a", "b"], "nested": {"x": [1, 2.5, None]}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates, self.total = state["updates"], state["total"]

    # Driver

    @hookimpl
    def select_prompts(self, run, count):
        chosen = run.rng().choice(len(run.dataset), size=count, replace=False)
        self.record("select_prompts", step=run.step, ids=chosen.tolist(), flying=run.in_flight().tolist())
        return chosen

    @hookimpl
    def prepare_prompts(self, run, prompts):
        for prompt in prompts:
            prompt.max_tokens = LONG if prompt.id % 2 else SHORT
            prompt.row["hint"] = f"h{prompt.id}"
            prompt.row["digits"] = sum(character.isdigit() for character in prompt.messages[0]["content"])
        self.record("prepare_prompts", step=run.step, ids=[prompt.id for prompt in prompts])

    @hookimpl
    def shape_rewards(self, run, batch):
        before = batch.scores
        batch.rewards = 2 * before
        run.log({"shaped": batch.scores.mean()})
        self.record(
            "shape_rewards",
            step=run.step,
            update=run.update,
            lag=[sorted(set(values.tolist())) for values in (batch.lag, batch.lag_steps)],
            rows=len(batch),
            groups=len(batch.groups),
            doubled=torch.equal(batch.scores, 2 * before),
            verdicts=torch.equal(batch.correct.float(), before),
            hints=batch.extra("hint") == [f"h{prompt_id}" for prompt_id in batch.prompt_id.tolist()],
            budgets=bool((batch.lengths <= torch.where(batch.prompt_id % 2 == 1, LONG, SHORT)).all()),
            truncated=int(batch.truncated.sum()),
            kinds=sorted(set(batch.extra("kind"))),
            characters=batch.extra("characters").tolist() == [len(text) for text in batch.text],
        )

    @hookimpl
    def select_rows(self, run, batch):
        batch.put("number", torch.arange(len(batch)).float())
        batch.drop(batch.session == DROPPED)
        self.left_out += [key for key, gone in zip(batch.keys, batch.dropped.tolist(), strict=True) if gone]
        self.record("select_rows", step=run.step, rows=len(batch), sessions=sorted(set(batch.session.tolist())))

    @hookimpl
    def estimate_advantage(self, run, batch):
        advantage = batch.scores - batch.groups.mean(batch.scores)
        numbers = torch.arange(len(batch.full)).float()
        self.record(
            "estimate_advantage",
            step=run.step,
            rows=len(batch),
            full=len(batch.full),
            numbered=torch.equal(batch.extra("number"), batch.from_full(numbers)),
            shapes=[list(batch.responses.shape), list(batch.entropy.shape), list(batch.old_log_probs.shape)],
            entropy=float(batch.entropy.sum() / batch.response_mask.sum()),
            rollout_difference=float((batch.rollout_log_probs - batch.old_log_probs).abs().max()),
        )
        batch.put("weight", advantage)
        self.ask_the_policy(run, batch)
        return batch.to_tokens(advantage)

    def ask_the_policy(self, run, batch):
        prompts = [run.dataset[prompt_id]["raw_prompt"] for prompt_id in (3, 4, 5)]
        generated = run.generate(prompts, n=3)
        flat = [answer for group in generated for answer in group]
        asked = [prompt for prompt in prompts for _ in range(3)]
        self.dump(
            f"policy_{run.step}",
            prompts=batch.extra("prompts"),
            prompt_lengths=batch.prompt_lengths,
            responses=batch.responses,
            lengths=batch.lengths,
            old_log_probs=batch.old_log_probs,
            prompt_log_probs=batch.prompt_log_probs,
            log_probs=run.log_probs(batch),
            tempered=run.log_probs(batch, temperature=TEMPERATURE),
            questions=[prompt[0]["content"] for prompt in prompts],
            scores=run.score(prompts, TARGETS),
            generated=[(answer.token_ids, answer.log_probs, answer.text) for answer in flat],
            rescored=run.score(asked, [answer.token_ids for answer in flat]),
        )

    @hookimpl
    def observe(self, run, batch):
        batch.put("seen", batch.advantages + 1)
        self.total += torch.tensor([1.0, float(batch.scores.sum())], dtype=torch.float64)
        self.record(
            "observe",
            step=run.step,
            advantages=torch.equal(batch.advantages, batch.to_tokens(batch.extra("weight"))),
            in_flight=len(run.in_flight()),
        )

    @hookimpl
    def prepare_validation(self, run, prompts):
        asked = [prompt.messages[-1]["content"] for prompt in prompts]
        self.record("prepare_validation", step=run.step, ids=[prompt.id for prompt in prompts], asked=asked)

    @hookimpl
    def on_validation_end(self, run, metrics):
        self.record("on_validation_end", step=run.step, scores=sorted(metrics))

    @hookimpl
    def on_step_end(self, run, metrics):
        run.log({"end": run.step})
        metrics["plugins/every_stage/added"] = 1.0
        self.record("on_step_end", step=run.step, loss=float(metrics["actor/loss"]), **self.left_behind())
        if run.step == 2:
            run.stop("enough")

    def left_behind(self) -> dict[str, Any]:
        """How many rows were left out so far, and which of them are still in the queue."""
        if not self.config.queue:
            return {}
        import transfer_queue as tq  # here: the module itself is imported where verl must not be

        kept = set(tq.kv_list("train")["train"]) & set(self.left_out)
        return {"left_out": len(self.left_out), "kept": sorted(kept)}

    @hookimpl
    def on_train_end(self, run):
        self.record("on_train_end", step=run.step)

    # Agent-loop worker

    @hookimpl
    async def rollout_group(self, run, prompt, sample):
        rollouts = await sample(5) + await sample(3)
        run.log({"extra_rollouts": 3})
        self.record(
            "rollout_group",
            step=run.step,
            id=prompt.id,
            size=len(rollouts),
            hint=prompt.row["hint"],
            scores=[rollout.score for rollout in rollouts],
            lengths=[len(rollout.response_ids) for rollout in rollouts],
            info=sorted(rollouts[0].info),
        )
        return rollouts

    # Reward worker

    @hookimpl
    def score_answer(self, answer):
        if answer.data_source != "verl_plugins/arithmetic":
            raise DataError(f"data source {answer.data_source}")
        correct = answer.text.strip() == str(answer.ground_truth)
        info = answer.extra_info
        self.record(
            "score_answer",
            text=answer.text,
            truth=str(answer.ground_truth),
            extra=sorted(info),
            split=info.get("split"),
        )
        return Verdict(float(correct), correct, {"characters": len(answer.text), "kind": "exact"})

    # Actor worker

    @hookimpl
    def policy_loss(self, tokens):
        tokens.log({"rows": len(tokens.log_probs)}, reduce="sum")
        seen, weight = tokens.extra("seen"), tokens.extra("weight")
        mask = tokens.response_mask
        self.record(
            "policy_loss",
            step=tokens.step,
            place=[tokens.mini_batch, tokens.micro_batch],
            rows=len(weight),
            finite=bool(torch.isfinite(tokens.log_probs).all()),
            put_per_row=torch.allclose(weight[:, None] * mask, tokens.advantages),
            put_per_token=torch.allclose(seen * mask, (tokens.advantages + 1) * mask),
            numbers=sorted(tokens.extra("number").int().tolist()),
            entropy=float((tokens.entropy * mask).sum() / mask.sum()),
            gradient=tokens.log_probs.requires_grad,
            on_policy=float((tokens.log_probs - tokens.old_log_probs)[mask].abs().max()),
        )
        return -tokens.advantages * (tokens.log_probs - tokens.old_log_probs).exp()

    @hookimpl
    def loss_terms(self, tokens):
        tokens.log({"terms": 1.0})
        self.record("loss_terms", step=tokens.step, shape=list(tokens.log_probs.shape))
        return {"pull": 1e-3 * tokens.log_probs**2}

    @hookimpl(wrapper=True)
    def optimizer_step(self, actor):
        gradients = [parameter.grad for parameter in actor.module.parameters() if parameter.grad is not None]
        before = [parameter.detach().clone() for parameter in actor.module.parameters()]
        norm = yield
        changed = [not torch.equal(a, b) for a, b in zip(before, actor.module.parameters(), strict=True)]
        self.updates[0] += 1
        actor.log({"norm": float(norm)})
        self.record(
            "optimizer_step",
            step=actor.step,
            mini_batch=actor.mini_batch,
            gradients=len(gradients),
            changed=sum(changed),
            rate=actor.optimizer.param_groups[0]["lr"],
            norm=float(norm),
        )
        return norm
