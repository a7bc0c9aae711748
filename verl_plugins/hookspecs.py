"""The stages of a training step, in the order they run: the map of the system.

A plugin implements the stages it needs, with any subset of the arguments, in any order. "First result" stages take the
answer of one plugin; the others call all. Any stage may be wrapped with `@hookimpl(wrapper=True)`. An implementation
marked `trylast` on a first-result stage is a default: any other plugin replaces it.

Driver process: all stages but eight. Agent-loop workers: `rollout_group`. Rollout servers and actor workers:
`shape_logits`. Reward workers: `score_answer`. Critic workers: `value_loss`. Actor workers: `distillation_loss`,
`policy_loss`, `loss_terms`, `optimizer_step`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from torch import Tensor

    from verl_plugins.batch import Batch
    from verl_plugins.distilled import Distilled
    from verl_plugins.services import Actor, Answer, Prompt, Prompts, Rollout, Run, Verdict
    from verl_plugins.tokens import Tokens
    from verl_plugins.values import Values

API_VERSION = 1
"""Grows when a stage changes in a way that breaks plugins written for an earlier one."""

PROJECT = "verl_plugins"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec(firstresult=True)
def select_prompts(run: Run, count: int) -> Sequence[int] | None:
    """Choose the `count` dataset rows (prompt ids, distinct) to ask next; default: verl's own shuffled pass."""


@hookspec
def prepare_prompts(run: Run, prompts: Prompts) -> None:
    """Edit the drawn training prompts in place: messages, prefill, group size, length budget, greedy or sampled."""


@hookspec(firstresult=True)
async def rollout_group(
    run: Run, prompt: Prompt, sample: Callable[..., Awaitable[list[Rollout]]]
) -> list[Rollout] | None:
    """Generate the responses of one draw of a prompt; `await sample(n)` rolls out and scores n without publishing."""


@hookspec(firstresult=True)
def shape_logits(logits: Tensor) -> Tensor | None:
    """The logits, [..., vocabulary], that the policy's softmax sees, before temperature, wherever it is evaluated."""


@hookspec(firstresult=True)
def score_answer(answer: Answer) -> Verdict | None:
    """Score one response; None leaves it to the next plugin and at last to verl's own reward function."""


@hookspec
def shape_rewards(run: Run, batch: Batch) -> None:
    """Change rewards with the whole batch in sight: `batch.rewards = …`; `batch.correct` keeps the raw verdict."""


@hookspec
def select_rows(run: Run, batch: Batch) -> None:
    """Drop or add rows before padding: `batch.drop(mask)`, `batch.add(…)`; `batch.full` keeps what was rolled out."""


@hookspec(firstresult=True)
def estimate_advantage(run: Run, batch: Batch) -> Tensor | None:
    """The advantage, [rows, tokens]; a wrapper re-weights whatever estimator the run has."""


@hookspec
def observe(run: Run, batch: Batch) -> None:
    """Learn from or log the outcomes of the step, after the advantage is known and before the actor is updated."""


@hookspec(firstresult=True)
def value_loss(values: Values) -> Tensor | None:
    """The critic's loss per token, [rows, tokens], before aggregation. Called once per micro-batch of its update."""


@hookspec(firstresult=True)
def distillation_loss(distilled: Distilled) -> Tensor | None:
    """Loss of each response token against the teacher, [tokens], in the place of verl's forward KL over its top k."""


@hookspec(firstresult=True)
def policy_loss(tokens: Tokens) -> Tensor | None:
    """Per-token loss, [rows, tokens], before aggregation; a wrapper re-weights it. Called once per micro-batch."""


@hookspec
def loss_terms(tokens: Tokens) -> dict[str, Tensor] | None:
    """Named per-token terms, [rows, tokens], aggregated like the policy loss, added to it and logged."""


@hookspec(firstresult=True)
def optimizer_step(actor: Actor) -> float | None:
    """The actor's optimiser step, gradients being accumulated; returns their norm. Usually wrapped, not replaced."""


@hookspec
def prepare_validation(run: Run, prompts: Prompts) -> None:
    """Edit the validation prompts in place: messages and prefill; training prompts go to `prepare_prompts`."""


@hookspec
def on_validation_end(run: Run, metrics: Mapping[str, float]) -> None:
    """The policy that step `run.step` left (0: the start) was validated; `metrics` are verl's, `val-core/…` and all."""


@hookspec
def on_step_end(run: Run, metrics: dict[str, Any]) -> None:
    """All metrics of the step are known, its checkpoint is saved: report, add metrics, or `run.stop(reason)`."""


@hookspec
def on_train_end(run: Run) -> None:
    """Training ended normally."""


FIRST_RESULT = ("select_prompts", "rollout_group", "shape_logits", "score_answer", "estimate_advantage", "policy_loss")
FIRST_RESULT += ("value_loss", "distillation_loss", "optimizer_step")
STAGES = (
    "select_prompts",
    "prepare_prompts",
    "rollout_group",
    "shape_logits",
    "score_answer",
    "shape_rewards",
    "select_rows",
    "estimate_advantage",
    "observe",
    "value_loss",
    "distillation_loss",
    "policy_loss",
    "loss_terms",
    "optimizer_step",
    "prepare_validation",
    "on_validation_end",
    "on_step_end",
    "on_train_end",
)
"""All stages in the order they run."""
