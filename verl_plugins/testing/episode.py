"""A few training steps without a trainer: the stages of one plugin in the order and the processes training has."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from omegaconf import DictConfig
from torch import Tensor

from verl_plugins.advantage.grpo import grpo_advantage
from verl_plugins.batch import Batch
from verl_plugins.bridge.defaults import DriverDefaults, WorkerDefaults
from verl_plugins.composition import outcome
from verl_plugins.composition.manager import Plugins
from verl_plugins.fields import TensorSource
from verl_plugins.hookspecs import STAGES
from verl_plugins.plugin import Plugin
from verl_plugins.services import Answer, Generated, Prompt, Prompts, Rollout, Verdict
from verl_plugins.testing.actor import ActorPart
from verl_plugins.testing.critic import CriticPart
from verl_plugins.testing.fakes import FakeRun
from verl_plugins.testing.record import Recorder, StageFailed, batch_inputs
from verl_plugins.testing.scenario import POLICY_FIELDS, TOKENIZER, Change, Scenario, World, stored_as
from verl_plugins.testing.states import invented
from verl_plugins.testing.table import Table

PROCESSES = ("driver", "agent_loop", "reward", "actor", "critic")
DISTURBED = ("old_log_probs", "log_probs", "entropy", "current_entropy", "rollout_log_probs", "ref_log_prob")
DISTURBED += ("sum_pi_squared", "top2_gap")
MORE_COLUMNS = 3


class GroupRun:
    """The run in `rollout_group`: this much and no more."""

    def __init__(self, run: FakeRun, prompt_id: int) -> None:
        self.config, self.step, self.tokenizer = run.config, run.step, run.tokenizer
        self.metrics: dict[str, float] = {}
        self._run, self._key = run, [run.seed, run.step, prompt_id]

    def log(self, metrics: Mapping[str, float]) -> None:
        self.metrics.update(metrics)

    def rng(self, name: str = "") -> np.random.Generator:
        return np.random.default_rng([*self._key, *name.encode()])

    async def generate(
        self,
        messages: Sequence[Mapping[str, str]],
        n: int = 1,
        *,
        temperature: float | None = None,
        max_tokens: int | None = None,
    ) -> list[Generated]:
        return self._run.generate([messages], n, temperature, max_tokens)[0]


class Episode:
    """Plays steps and records them.

    Args:
        make: builds one configured instance; every process has its own, as in training.
        change: what is different from the plain training.
        follow: an episode whose results (prompts, rows dropped, rewards, advantages, fields put) are continued with,
            whatever they are here: then a law is broken where it is broken, and not at all later stages as well.
        shared: one instance in all processes.
        watch: see `Recorder`.
    """

    def __init__(
        self,
        make: Callable[[], Plugin],
        scenario: Scenario,
        config: DictConfig,
        *,
        change: Change | None = None,
        follow: Episode | None = None,
        shared: bool = False,
        watch: bool = False,
    ) -> None:
        only = make() if shared else None
        self.plugins = {process: only or make() for process in PROCESSES}
        self.recorder = Recorder(watch=watch)
        self.choices: dict[tuple[int, str], Any] = {}
        """What training went on with: (step, stage) -> prompt ids, keys of dropped rows, or the rows."""
        self._scenario, self._config, self._follow = scenario, config, follow
        self._change = change or Change()
        self._world = World(scenario)
        self._calls = {
            process: Plugins([plugin], check=outcome.check)
            for process, plugin in self.plugins.items()
            if process not in ("actor", "critic")
        }
        self._own = {stage for stage in STAGES if self._calls["driver"].implements(stage)}
        self._defaults = DriverDefaults()
        self._calls["driver"].add_fallback(self._defaults)
        self._calls["agent_loop"].add_fallback(WorkerDefaults())
        self._needs = frozenset(self.plugins["driver"].needs)
        ranks = [self.plugins["actor"], *[make() for _ in range(1, self._change.ranks)]]
        self._actor = ActorPart(ranks, config, self._change, scenario.seed, self.recorder)
        critics = [self.plugins["critic"], *[make() for _ in range(1, self._change.ranks)]]
        self._critic = CriticPart(critics, config, self._change, scenario.seed, self.recorder)

    def play(self, steps: Sequence[int], *, end: bool = False) -> Episode:
        """Steps by number, from 1; `end` also ends the training."""
        for step in steps:
            self._step(step)
        if end and "on_train_end" in self._own:
            run = self._run(steps[-1])
            self._driver("on_train_end", run)
        return self

    def implements(self, stage: str) -> bool:
        """Whether the plugin does anything there."""
        return stage in self._own

    def weights(self) -> Any:
        """A copy of the actor's model and optimiser."""
        return self._actor.weights()

    def set_weights(self, weights: Any) -> None:
        """What verl restores by itself when a run is resumed."""
        self._actor.set_weights(weights)

    # One step

    def _step(self, step: int) -> None:
        run = self._run(step)
        prompts = self._prompts(run)
        rows = self._world.table(step, [self._group(run, prompt, place) for place, prompt in enumerate(prompts)])
        self._width = rows.width
        if self._change.pad:
            rows = rows.disturbed(DISTURBED).as_wide_as(rows.width + MORE_COLUMNS)
        rows, full = self._shaped(run, rows)
        rows, put = self._estimated(run, rows, full)
        if not full.update_skipped:
            self._critic.update(step, rows, set(), self._width)
            self._actor.update(step, rows, put | full.written.keys(), self._width)
        self._validate(run, full)
        if "on_step_end" in self._own:
            metrics = {
                "training/global_step": float(step),
                "actor/entropy": float(rows.columns["entropy"][rows.columns["response_mask"].bool()].mean()),
                "actor/grad_norm": 1.0,
                "actor/loss": 0.0,
                "actor/pg_loss": 0.0,
                "critic/score/mean": float(full.scores.mean()),
                "response_length/mean": float(full.lengths.float().mean()),
                "health/accuracy": float(full.correct.float().mean()),
                "health/mixed_groups": float(
                    (full.groups.any(full.correct) & full.groups.any(~full.correct)).float().mean()
                ),
            }
            self._driver("on_step_end", run, metrics=metrics)

    def _validate(self, run: FakeRun, full: Batch) -> None:
        """A few prompts that are not trained on, and a score of the step's."""
        if "prepare_validation" in self._own:
            prompts = [Prompt(place, copy.deepcopy(self._world.dataset[place])) for place in range(4)]
            self._driver("prepare_validation", run, prompts=Prompts(prompts))
            for prompt in prompts:
                self.recorder.note(run.step, "prepare_validation", f"the row of prompt {prompt.id}", prompt.row)
        if "on_validation_end" in self._own:
            score = {"val-core/scenario/acc/mean@1": float(full.correct.float().mean())}
            self._driver("on_validation_end", run, metrics=score)

    def _run(self, step: int) -> FakeRun:
        size = len(self._world.dataset)
        flying = [size - 2, size - 1] if step > 1 else []
        return FakeRun(self._world.dataset, self._config, step, self._scenario.seed, flying, TOKENIZER)

    def _driver(self, stage: str, run: FakeRun, **arguments: Any) -> Any:
        """Call a driver's stage and record what it logged and put."""
        batch: Batch | None = arguments.get("batch")
        put = dict(batch.written) if batch else {}
        result = self._watched("driver", stage, run=run, **arguments)
        self.recorder.note_metrics(run.step, stage, run.metrics)
        run.metrics = {}
        for name, values in (batch.written if batch else {}).items():
            if name != "rm_scores" and put.get(name) is not values:
                self._record(run, stage, f"field {name!r} of row", batch, values)
        return result

    def _watched(self, process: str, stage: str, **arguments: Any) -> Any:
        batch: Batch | None = arguments.get("batch")
        return self.recorder.call(self._calls[process], stage, batch_inputs(batch) if batch else {}, **arguments)

    def _record(self, run: FakeRun, stage: str, what: str, batch: Batch, values: Tensor) -> None:
        if values.dim() == 2:
            values = values.detach().masked_fill(~batch.response_mask, 0)[:, : self._width]
        self.recorder.note_rows(run.step, stage, what, batch.keys, values)

    def _continue_with(self, step: int, stage: str, choice: Any) -> Any:
        self.choices[step, stage] = choice
        return choice if self._follow is None else self._follow.choices[step, stage]

    def _rows_to_continue_with(self, step: int, stage: str, rows: Table, columns: Mapping[str, Any]) -> Table:
        """The rows with new columns: ours, or those of the episode that is followed."""
        rows = rows.with_columns(columns)
        followed = self._continue_with(step, stage, rows)
        return rows if followed is rows else rows.with_columns_of(followed, columns)

    # Prompts and rollouts

    def _prompts(self, run: FakeRun) -> list[Prompt]:
        count, ids = self._scenario.prompts, None
        if "select_prompts" in self._own:
            ids = self._driver("select_prompts", run, count=count)
        if ids is None:
            ids = self._world.default_choice(run.step, count)
        else:
            ids = [int(prompt_id) for prompt_id in ids]
            if flying := set(ids) & set(run.flying):
                self.recorder.fault("result", "select_prompts", f"gives {min(flying)}, which run.in_flight() names")
            self.recorder.note(run.step, "select_prompts", "the choice", ids)
        ids = self._continue_with(run.step, "select_prompts", ids)
        prompts = Prompts([Prompt(prompt_id, self._world.dataset[prompt_id]) for prompt_id in ids])
        if "prepare_prompts" in self._own:
            self._driver("prepare_prompts", run, prompts=prompts)
            for place, prompt in enumerate(prompts):
                self.recorder.note(
                    run.step,
                    "prepare_prompts",
                    f"the row of draw {place}, prompt {prompt.id}",
                    copy.deepcopy(prompt.row),
                )
        return list(prompts)

    def _group(self, run: FakeRun, prompt: Prompt, place: int) -> list[Rollout]:
        """The rollouts of one prompt."""
        if "rollout_group" not in self._own:
            return self._answers(run, prompt, place, range(prompt.group_size or self._scenario.group_size))
        started = 0

        async def sample(
            n: int | None = None,
            *,
            messages: list[dict[str, str]] | None = None,
            temperature: float | None = None,
            max_tokens: int | None = None,
            prefix: Sequence[int] = (),
        ) -> list[Rollout]:
            nonlocal started
            numbers = range(started, started + (n or prompt.group_size or self._scenario.group_size))
            started = numbers.stop
            return self._answers(run, prompt, place, numbers, max_tokens, prefix)

        own = GroupRun(run, prompt.id)
        rollouts = self._watched("agent_loop", "rollout_group", run=own, prompt=prompt, sample=sample)
        self.recorder.note_metrics(run.step, "rollout_group", own.metrics, f"prompt {prompt.id}")
        if rollouts is None:
            return self._answers(run, prompt, place, range(prompt.group_size or self._scenario.group_size))
        if not rollouts and not any(self._fails(place, number) for number in range(started)):
            raise StageFailed("rollout_group", "gives no rollouts")
        texts = [rollout.text for rollout in rollouts]
        self.recorder.note(run.step, "rollout_group", f"the group of prompt {prompt.id}", texts)
        return list(rollouts)

    def _answers(
        self,
        run: FakeRun,
        prompt: Prompt,
        place: int,
        numbers: Iterable[int],
        max_tokens: int | None = None,
        prefix: Sequence[int] = (),
    ) -> list[Rollout]:
        """Responses by number, scored; those that fail are missing."""
        budget = max_tokens or (prompt.max_tokens or self._scenario.tokens) - len(prefix)
        numbers = [number for number in numbers if not self._fails(place, number)]
        return [
            self._world.respond(prompt, place, run.step, number, budget, self._score, list(prefix))
            for number in numbers
        ]

    def _fails(self, place: int, number: int) -> bool:
        """A response of the last group is missing, or all but its first."""
        size = self._scenario.group_size
        return place == self._scenario.prompts - 1 and (number > 0 if self._change.lonely else number == size - 1 > 0)

    def _score(self, answer: Answer) -> Verdict | None:
        if "score_answer" not in self._own:
            return None
        verdict = self._watched("reward", "score_answer", answer=answer)
        if verdict is None:
            return None
        told = [float(verdict.score), bool(verdict.correct), dict(verdict.parts)]
        self.recorder.note(0, "score_answer", f"the verdict on {answer.text!r}", told)
        return verdict

    # Batches

    def _shaped(self, run: FakeRun, rows: Table) -> tuple[Table, Batch]:
        """Rewards shaped and rows dropped: the rows that are left, and the whole batch."""
        if self._change.shuffle:
            rows = rows.shuffled(run.step)
        full = self._batch(rows, self._needs & {"rollout_log_probs"}, run.step)
        if "shape_rewards" in self._own:
            self._driver("shape_rewards", run, batch=full)
            self._record(run, "shape_rewards", "the reward of row", full, full.rewards)
        if "select_rows" in self._own:
            self._driver("select_rows", run, batch=full)
            self._record(run, "select_rows", "the mark for dropping row", full, full.dropped)
            for new in full.additions:
                what = [new.response.tolist(), new.reward, new.correct, [] if new.past is None else new.past.columns]
                self.recorder.note(run.step, "select_rows", f"the added row {new.key}", what)
            self.recorder.note(run.step, "select_rows", "whether the update is skipped", full.update_skipped)
        dropped = {key for key, gone in zip(full.keys, full.dropped.tolist(), strict=True) if gone}
        added = [(full.keys[new.like], new) for new in full.additions]
        dropped, added = self._continue_with(run.step, "select_rows", (dropped, added))
        place = {key: row for row, key in enumerate(full.keys)}
        full.additions = [replace(new, like=place[key]) for key, new in added]
        rows = self._rows_to_continue_with(run.step, "shape_rewards", rows, full.written)
        rows = rows.with_additions(full.additions, self._world.dataset.__getitem__)
        return rows.rows([row for row, key in enumerate(rows.keys) if key not in dropped]), full

    def _estimated(self, run: FakeRun, rows: Table, full: Batch) -> tuple[Table, set[str]]:
        """The rows with their advantages and with what was put, and the names of the latter."""
        if self._change.shuffle:
            rows = rows.shuffled(run.step + 1)
        known = {"old_log_probs", *(self._needs & {*POLICY_FIELDS, "hidden_states"})}
        changed = bool(full.dropped.any()) or full.additions
        batch = self._batch(rows, known, run.step, full if changed else None)
        plain = batch.to_tokens(grpo_advantage(batch.scores, batch.groups))
        self._defaults.estimator = plain.clone
        if values := self._critic.known(run.step, rows):
            batch._fields.update(values)
            self._defaults.estimator = partial(self._critic.estimated, plain, batch)
        advantages = plain
        if "estimate_advantage" in self._own:
            advantages = self._driver("estimate_advantage", run, batch=batch)
            if advantages.masked_fill(batch.response_mask, 0).any():
                self.recorder.fault(
                    "result", "estimate_advantage", "gives an advantage that is not 0 outside the response mask"
                )
            if self._change.lonely:
                self._require_zero_for_lone_rows(batch, full, advantages)
            self._record(run, "estimate_advantage", "the advantage of row", batch, advantages)
        columns = {"advantages": advantages.detach().float() * batch.response_mask}
        rows = self._rows_to_continue_with(run.step, "estimate_advantage", rows, columns)
        batch._fields["advantages"] = rows.columns["advantages"]
        if "observe" in self._own:
            self._driver("observe", run, batch=batch)
        return self._rows_to_continue_with(run.step, "observe", rows, batch.written), set(batch.written)

    def _require_zero_for_lone_rows(self, batch: Batch, full: Batch, advantages: Tensor) -> None:
        lone = (batch.groups.count() == 1) & batch.from_full(full.groups.count() == 1)
        for row in (lone & advantages.any(1)).nonzero()[:1, 0].tolist():
            given = float(advantages[row].abs().max())
            self.recorder.fault(
                "lonely_group",
                "estimate_advantage",
                f"gives an advantage of size {given:.6g} to a response that has none to compare with",
            )

    def _batch(self, rows: Table, known: Sequence[str] | set[str], step: int, full: Batch | None = None) -> Batch:
        """A batch with tensors of its own, and those of the policy's fields that are known by then."""
        hidden = {"current_entropy", "log_probs", *map(stored_as, POLICY_FIELDS)} - set(map(stored_as, known))
        columns = {name: column for name, column in rows.copy().columns.items() if name not in hidden}
        if "hidden_states" in known:
            columns["hidden_states"] = invented(self.plugins["driver"].hidden_wish(), rows, step)
        source = TensorSource(rows.keys, columns)
        return Batch(source, tokenizer=TOKENIZER, budget=self._scenario.tokens, full=full)
