"""verl's V1 trainers with the stages in them.

The mode keeps verl's own name (`sync`, `colocate_async`): verl compares it in several places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray
import transfer_queue as tq
from omegaconf import OmegaConf
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.debug import marked_timer

from verl_plugins.batch import Batch
from verl_plugins.bridge import census
from verl_plugins.bridge.actor import PluginActorWorker
from verl_plugins.bridge.defaults import DriverDefaults
from verl_plugins.bridge.drawing import DrawsPrompts
from verl_plugins.bridge.estimating import EstimatesAdvantage
from verl_plugins.bridge.failures import Failures, collect, explains
from verl_plugins.bridge.late import Lookout
from verl_plugins.bridge.loss import STEP_KEY
from verl_plugins.bridge.run import DriverRun
from verl_plugins.bridge.saving import SavesState
from verl_plugins.bridge.sending import LOSS_FIELDS
from verl_plugins.bridge.serving import ServesRollouts
from verl_plugins.bridge.validation import fast_validation_metrics
from verl_plugins.diagnostics.health import Watch
from verl_plugins.errors import PluginError, RunError

ADDED = ("rollout/responses", "rollout/tokens", "health/generated_tokens")
"""Metrics that count: those of a step's updates are added up."""
POLL_SECONDS = 0.04
"""How often the driver looks for finished rollouts; verl's default of 2 s would dominate short steps."""


class Stages(DrawsPrompts, EstimatesAdvantage, ServesRollouts, SavesState):
    """The stages, mixed into one of verl's trainers."""

    worker_class = PluginActorWorker

    def __init__(self, config: Any) -> None:
        self.plugins = census.build(OmegaConf.to_container(config.plugins), "driver")
        self.defaults = DriverDefaults()
        self.plugins.add_fallback(self.defaults)
        self.needs = frozenset().union(*[plugin.needs for plugin in self.plugins])
        self.seed = int(config.data.seed)
        self.run = DriverRun(self)
        self.reporter: Any = None
        self.signals: Any = None
        self.watch = Watch()
        self._full: Batch | None = None
        self._batch: Batch | None = None
        self._rows_per_prompt: int | None = None
        self._past: dict[str, np.ndarray] = {}
        """Old log-probs of the rows of earlier steps, by their keys in this one."""
        self._prompt_log_probs: dict[str, Tensor] = {}
        self._statistics: dict[str, dict[str, Tensor]] = {}
        """What the pass for the old log-probs computed besides, by name and by row key."""
        self._columns: set[str] = set()
        self._begun_with: dict[str, int] = {}
        self._shipped: set[str] = set()
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="health")
        self._updates: list[tuple[Batch, Future[dict[str, float]]]] = []
        """Of each update of the step: all its rows, and their health metrics."""
        self._stopped = self._told_of_gradient = self._told_of_skipping = False
        self._agents: list[Any] = []
        self._failures = Failures()
        self._told: set[str] = set()
        """Causes of failed sessions that the terminal has shown."""
        self.timing_raw: dict[str, float] = {}
        super().__init__(config)

    # Setting up

    def _build_replay_buffer(self) -> Any:
        replay_buffer = super()._build_replay_buffer()
        replay_buffer.poll_interval = min(replay_buffer.poll_interval, POLL_SECONDS)
        return replay_buffer

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in (Role.Actor, Role.ActorRollout, Role.ActorRolloutRef):
            if role in self.role_worker_mapping:
                self.role_worker_mapping[role] = ray.remote(self.worker_class)

    @property
    def data_parallel_size(self) -> int:
        """Ranks over which the actor's rows are split."""
        info = self.actor_rollout_wg._dispatch_info
        if "actor" not in info:
            info["actor"] = self.actor_rollout_wg._query_dispatch_info("actor")
        return max(info["actor"]) + 1

    def clock(self) -> Any:
        """Counts what happens inside as time of the stages: `timing_s/stages`, summed over the step."""
        return marked_timer("stages", self.timing_raw)

    # The update and the end of the step

    def _finish_updates(self) -> dict[str, float]:
        """Health metrics of the step's updates, averaged where there are several; dropped rows leave the queue."""
        updates, self._updates = self._updates, []
        found: dict[str, list[float]] = {}
        for full, health in updates:
            for key, value in health.result().items():
                found.setdefault(key, []).append(value)
            found.setdefault("health/update_skipped", []).append(float(full.update_skipped))
            dropped = [key for key, gone in zip(full.keys, full.dropped.tolist(), strict=True) if gone]
            if dropped:
                tq.kv_clear(keys=dropped, partition_id="train")
        return {key: float(_together(key)(values)) for key, values in found.items()}

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        if self._full.update_skipped:
            self._tell_skipped()
            return batch
        batch.extra_info[STEP_KEY] = self.global_steps
        with self._group_size():
            batch = super()._update_actor(self._for_workers(batch, *LOSS_FIELDS), metrics)
        prefix = "actor/plugins/"
        for key in [key for key in metrics if key.startswith(prefix)]:
            metrics[key.removeprefix("actor/")] = metrics.pop(key)
        self._look_at_update(metrics)
        return batch

    def _look_at_update(self, metrics: Mapping[str, Any]) -> None:
        """A loss that is no number ends the run; a gradient alone is said once, since verl leaves such steps out.

        Raises:
            RunError: the loss is not finite.
        """
        if not math.isfinite(float(metrics.get("actor/loss", 0.0))):
            raise RunError(
                f"step {self.global_steps}: the actor's loss is {float(metrics['actor/loss'])}, though no plugin's "
                f"part of "
                "it was; look at old log-probs, advantages and the weights of the importance correction in verl.log"
            )
        if not math.isfinite(float(metrics.get("actor/grad_norm", 0.0))) and not self._told_of_gradient:
            self._told_of_gradient = True
            if self.reporter is not None:
                self.reporter.note(
                    f"warning: step {self.global_steps}: the gradient norm is not finite, and verl leaves out the "
                    "optimiser steps where it is; lower the learning rate, or look at actor/grad_norm in metrics.jsonl"
                )

    def _tell_skipped(self) -> None:
        if self.reporter is not None and not self._told_of_skipping:
            self._told_of_skipping = True
            self.reporter.note(
                f"step {self.global_steps} is not trained on, since a plugin found nothing to learn from in it; "
                "health/update_skipped counts such steps"
            )

    def _update_critic(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        if self._full.update_skipped:
            return batch
        batch.extra_info[STEP_KEY] = self.global_steps
        with self._group_size():
            batch = super()._update_critic(batch, metrics)
        for key in [key for key in metrics if key.startswith("critic/plugins/")]:
            metrics[key.removeprefix("critic/")] = metrics.pop(key)
        return batch

    def _compute_metrics(self, batch: KVBatchMeta, metrics: dict, *args: Any, **kwargs: Any) -> None:
        with self.clock():
            metrics.update(self._finish_updates())
        super()._compute_metrics(batch, metrics, *args, **kwargs)
        metrics.update(self.run.take_metrics())
        metrics["rollout/failed_sessions"] = self._tell_failures()
        self.plugins.hook.on_step_end(run=self.run, metrics=metrics)
        metrics.update(self.run.take_metrics())
        if self.reporter is not None:
            self.reporter.step(self.global_steps, self.total_training_steps, metrics)
            for sentence in self.watch.look(metrics):
                self.reporter.note(f"warning: {sentence}")
        if not self.config.trainer.get("rollout_data_dir"):
            self.mark_checkpoint()
        if self.signals is not None and self.signals.asked is not None:
            self.stop("asked to by a signal")

    def _validate(self) -> dict[str, float]:
        with fast_validation_metrics(), self._first_cause():
            metrics = super()._validate()
        self._tell_failures()
        self.plugins.hook.on_validation_end(run=self.run, metrics=metrics)
        if self.reporter is not None:
            self.reporter.validation(self.global_steps, metrics)
        return metrics

    def fit(self, agent_loop_manager: Any) -> None:
        if self.reporter is not None:
            self.reporter.begin(self.global_steps)
            if self.global_steps > 0:
                self.reporter.note(f"resuming after step {self.global_steps} from {self._checkpoint_folder()}")
        if self.signals is not None:
            self.signals.saves = self.config.trainer.save_freq > 0
        self._agents = agent_loop_manager.agent_loop_workers
        say = print if self.reporter is None else self.reporter.note
        with self._first_cause(), Lookout(self._agents, say):
            super().fit(agent_loop_manager)
        if self.config.trainer.get("val_only", False):
            return
        self.global_steps -= 1  # verl has counted on to the step after the last
        if self._stopped and self.config.trainer.save_freq > 0 and self._saved_step != self.global_steps:
            self._save_checkpoint()  # verl saves at a last step only when the step began as one
            self.mark_checkpoint()
        if self.signals is not None and self.signals.asked is not None:
            return  # training has not ended, this command has
        self.plugins.hook.on_train_end(run=self.run)
        if self.reporter is not None:
            self.reporter.end(self.global_steps, self.run.take_metrics())

    def _tell_failures(self) -> float:
        """The share of sessions that failed since the last time; a cause is said when it first comes."""
        failures, self._failures = Failures.together([self._failures, collect(self._agents)]), Failures()
        if self.reporter is not None and not failures.causes.keys() <= self._told:
            self.reporter.note(f"warning: {failures.sentence()}")
        self._told |= failures.causes.keys()
        return failures.failed / failures.asked if failures.asked else 0.0

    def refuse_to_draw_for_ever(self) -> None:
        """verl draws prompts anew for those that fail; where none comes through, that would not end.

        Raises:
            RunError: with the first cause.
        """
        self._failures = Failures.together([self._failures, collect(self._agents)])
        if self._failures.causes and not self._failures.finished:
            raise RunError(self._failures.sentence())

    @contextmanager
    def _first_cause(self) -> Iterator[None]:
        """What verl says when no session came back is replaced by why."""
        try:
            yield
        except PluginError:
            raise
        except Exception as error:
            failures = Failures.together([self._failures, collect(self._agents)])
            if not explains(failures, error):
                raise
            raise RunError(failures.sentence()) from error

    def stop(self, reason: str) -> None:
        """End training after this step."""
        self._stopped = self.global_steps < self.total_training_steps
        self.total_training_steps = self.global_steps
        if self.reporter is not None:
            self.reporter.note(f"stopping after step {self.global_steps}: {reason}")


def _together(key: str) -> Callable[[Sequence[float]], Any]:
    """How the values of a step's updates become one: what is counted is added up."""
    if key.startswith("timing_s/") or key in ADDED:
        return sum
    return max if key.endswith("_max") else np.mean


class PluginTrainerSync(Stages, PPOTrainerSync):
    """verl's `sync` trainer with plugins."""


class PluginTrainerColocateAsync(Stages, PPOTrainerColocateAsync):
    """verl's `colocate_async` trainer with plugins."""
