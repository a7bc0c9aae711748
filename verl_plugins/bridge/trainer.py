"""verl's V1 trainers with the stages in them.

The mode keeps verl's own name (`sync`, `colocate_async`): verl compares it in several places.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import ray
import torch
import transfer_queue as tq
from omegaconf import OmegaConf
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1 import trainer_base
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.debug import marked_timer

from verl_plugins.batch import Batch
from verl_plugins.bridge import census
from verl_plugins.bridge.actor import PluginActorWorker
from verl_plugins.bridge.additions import store_additions
from verl_plugins.bridge.defaults import DriverDefaults
from verl_plugins.bridge.drawing import DrawsPrompts
from verl_plugins.bridge.loss import STEP_KEY
from verl_plugins.bridge.queue import QueueSource, is_padding, write_fields
from verl_plugins.bridge.rollout import METRICS_FIELD
from verl_plugins.bridge.rows import MAX_TOKENS, ROLLOUT_N
from verl_plugins.bridge.run import DriverRun
from verl_plugins.bridge.saving import SavesState
from verl_plugins.bridge.validation import fast_validation_metrics
from verl_plugins.cpu.registration import ROLLOUT_NAME
from verl_plugins.diagnostics.budget import rollout_budget
from verl_plugins.diagnostics.health import Watch, group_health, policy_health, reward_parts, signal_health
from verl_plugins.errors import DataError

POLL_SECONDS = 0.04
"""How often the driver looks for finished rollouts; verl's default of 2 s would dominate short steps."""

FORWARD_FIELDS = ("input_ids", "position_ids", "loss_mask", "routed_experts", "multi_modal_inputs")
LOSS_FIELDS = ("prompts", "responses", "response_mask", "old_log_probs", "advantages", "ref_log_prob")
LOSS_FIELDS += ("rollout_is_weights", "teacher_ids", "teacher_logprobs")
STEP_FIELDS = ("entropy", "returns", "values", "rollout_log_probs")
HEALTH_FIELDS = ("responses", "verdict", "rollout_log_probs", "extra_fields", ROLLOUT_N, MAX_TOKENS)
"""What verl's engine and loss read, and the metrics of every step; columns that do not exist in a run are left out."""


class Stages(DrawsPrompts, SavesState):
    """The stages, mixed into one of verl's trainers."""

    def __init__(self, config: Any) -> None:
        self.plugins = census.build(OmegaConf.to_container(config.plugins), "driver")
        self.defaults = DriverDefaults()
        self.plugins.add_fallback(self.defaults)
        self.needs = frozenset().union(*[plugin.needs for plugin in self.plugins])
        self.seed = int(config.data.seed)
        self.run = DriverRun(self)
        self.reporter: Any = None
        self.watch = Watch()
        self._full: Batch | None = None
        self._batch: Batch | None = None
        self._rows_per_prompt: int | None = None
        self._prompt_log_probs: dict[str, Tensor] = {}
        self._columns: set[str] = set()
        self._shipped: set[str] = set()
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="health")
        self._health: Future[dict[str, float]] | None = None
        self._awake = self._stopped = False
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
                self.role_worker_mapping[role] = ray.remote(PluginActorWorker)

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

    # From rollouts to the advantage

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict, **kwargs: Any) -> KVBatchMeta:
        """Rows in an order of their own (not that of arrival), rewards shaped, rows dropped, then verl's balancing."""
        with self.clock():
            batch = self._shape_and_select(batch)
        with self._group_size(), self._keep_order():
            return super()._balance_batch(batch, metrics, **kwargs)

    def _shape_and_select(self, batch: KVBatchMeta) -> KVBatchMeta:
        batch.reorder(sorted(range(len(batch)), key=lambda row: _row_order(batch.keys[row])))
        self._full = self._open(batch.keys)
        self.plugins.hook.shape_rewards(run=self.run, batch=self._full)
        self.plugins.hook.select_rows(run=self.run, batch=self._full)
        if self._full.written:
            batch = self._store(batch, self._full)
        kept = [key for key, dropped in zip(batch.keys, self._full.dropped.tolist(), strict=True) if not dropped]
        if self._full.additions:
            batch = store_additions(batch, self._full)
            kept = sorted([*kept, *batch.keys[len(self._full) :]], key=_row_order)
        if kept != batch.keys:
            batch = batch.select_keys(kept)
        prompts = len(set(self._full.uid))
        resized = len(kept) != len(self._full) and not len(kept) % prompts
        self._rows_per_prompt = len(kept) // prompts if resized else None
        return batch

    def _keep_order(self) -> Any:
        """With one rank there is nothing to balance, and verl's partitioning is slow for what it then returns."""
        if self.data_parallel_size > 1:
            return nullcontext()
        one_part = lambda lengths, k_partitions, equal_size: [list(range(len(lengths)))]  # noqa: E731
        return patch.object(trainer_base, "get_seqlen_balanced_partitions", one_part)

    @contextmanager
    def _group_size(self) -> Iterator[None]:
        """verl sizes mini-batches as prompts times `rollout.n`; a prompt may have fewer rows now, or more."""
        rollout = self.config.actor_rollout_ref.rollout
        before = rollout.n
        rollout.n = self._rows_per_prompt or before
        try:
            yield
        finally:
            rollout.n = before

    def _open(self, keys: Sequence[str], known: dict[str, Any] | None = None, full: Batch | None = None) -> Batch:
        source = QueueSource(keys, "train", known)
        budget = self.config.data.max_response_length
        return Batch(source, tokenizer=self.tokenizer, budget=budget, full=full)

    def _store(self, meta: KVBatchMeta, batch: Batch) -> KVBatchMeta:
        """Ship the fields plugins have put, for all rows of `meta`."""
        mask = tq.kv_batch_get(keys=meta.keys, partition_id=meta.partition_id, select_fields=["response_mask"])
        fields, batch.written = batch.written, {}
        self._shipped |= fields.keys()
        place = {key: row for row, key in enumerate(meta.keys)}
        rows = torch.tensor([place[key] for key in batch.keys])
        stored = write_fields(meta, rows, fields, mask["response_mask"])
        stored.tags, stored.extra_info = meta.tags, meta.extra_info
        return stored

    def _for_workers(self, batch: KVBatchMeta, *fields: str) -> KVBatchMeta:
        """Send workers what a forward pass reads, the given fields, and what plugins put or declare in `needs`.

        The other columns (messages, dataset rows, …) cost more to send than all of these together.
        """
        wanted = {*FORWARD_FIELDS, *fields, *self._shipped, *(self.needs & {*self._columns_of(batch), *STEP_FIELDS})}
        if self.processor is None:
            wanted.discard("multi_modal_inputs")
        batch.fields = sorted(wanted & {*self._columns, *(batch.fields or [])})
        return batch

    def _columns_of(self, batch: KVBatchMeta) -> set[str]:
        """What the rows have when they come from the rollout; the same in every step."""
        if not self._columns:
            self._columns = set(tq.kv_batch_get(keys=batch.keys[:1], partition_id=batch.partition_id).keys())
        return self._columns

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch = super()._compute_old_log_prob(self._for_workers(batch), metrics)
        if "prompt_log_probs" in self.needs:
            self._read_prompt_log_probs(batch)
        return batch

    def _compute_ref_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        return super()._compute_ref_log_prob(self._for_workers(batch), metrics)

    def _read_prompt_log_probs(self, batch: KVBatchMeta) -> None:
        """Keep the prompts' log-probs: verl overwrites the field when it scores the reference policy."""
        fields = ["log_probs", "prompts"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        lengths = data["prompts"].offsets().diff() - 1
        padded = data["log_probs"].to_padded_tensor(0)[:, : int(lengths.max())]
        values = torch.where(torch.arange(padded.shape[1]) < lengths[:, None], padded, 0.0)
        self._prompt_log_probs = dict(zip(batch.keys, values, strict=True))

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """verl's own stage (KL in the reward, rollout correction), with the estimator given by the stage."""
        original = trainer_base.compute_advantage_for_multi_trajectories
        estimate = partial(self._estimate, original)
        with patch.object(trainer_base, "compute_advantage_for_multi_trajectories", estimate):
            batch = super()._compute_advantage(batch, metrics)
        with self.clock():
            return self._observe(batch)

    def _observe(self, batch: KVBatchMeta) -> KVBatchMeta:
        self.plugins.hook.observe(run=self.run, batch=self._batch)
        if self._batch.written:
            batch = self._store(batch, self._batch)
        fields = [name for name in HEALTH_FIELDS if name in self._columns_of(batch)]
        self._health = self._beside.submit(self._measure_health, self._batch, fields)
        return batch

    def _measure_health(self, batch: Batch, fields: Sequence[str]) -> dict[str, float]:
        """In a thread while the actors update: fetching what nothing but metrics reads takes longer than all stages."""
        start = time.perf_counter()
        batch.full.prefetch(*fields)
        metrics = group_health(batch.full) | signal_health(batch) | policy_health(batch) | reward_parts(batch.full)
        metrics |= self._group_metrics(batch.full) | rollout_budget(batch.full, self.run.account.take())
        return metrics | {"timing_s/health": time.perf_counter() - start}

    def _estimate(self, original: Any, data: Any, batch_keys: list[str], **kwargs: Any) -> Any:
        """In the place of verl's function: the same result, from the stage `estimate_advantage`."""
        with self.clock():
            return self._estimate_by_stage(original, data, batch_keys, kwargs)

    def _estimate_by_stage(self, original: Any, data: Any, batch_keys: list[str], kwargs: dict[str, Any]) -> Any:
        rows = torch.tensor([row for row, key in enumerate(batch_keys) if not is_padding(key)])
        keys = [batch_keys[row] for row in rows.tolist()]
        known = {name: values[rows] for name, values in data.batch.items()}
        known["rm_scores"] = known.pop("token_level_rewards")
        if self._prompt_log_probs:
            known["prompt_log_probs"] = torch.stack([self._prompt_log_probs[key] for key in keys])
        changed = bool(self._full.dropped.any()) or self._full.additions
        full = self._full if changed else None
        self._batch = batch = self._open(keys, known, full)

        def verls_estimator() -> Tensor:
            original(data, batch_keys=batch_keys, **kwargs)
            return data.batch["advantages"][rows]

        self.defaults.estimator = verls_estimator
        advantages = self._checked(self.plugins.hook.estimate_advantage(run=self.run, batch=batch), batch)
        whole = torch.zeros_like(data.batch["token_level_rewards"])
        whole[rows] = advantages.to(whole.dtype) * batch.response_mask
        data.batch["advantages"] = whole
        if "returns" not in data.batch:
            data.batch["returns"] = whole
        batch._fields["advantages"] = whole[rows]
        return data

    @staticmethod
    def _checked(advantages: Tensor, batch: Batch) -> Tensor:
        if advantages.shape != batch.response_mask.shape:
            raise DataError(
                f"estimate_advantage returned shape {tuple(advantages.shape)}; expected [rows, tokens] "
                f"{tuple(batch.response_mask.shape)}, see batch.to_tokens"
            )
        if not bool(torch.isfinite(advantages).all()):
            row = int((~torch.isfinite(advantages)).any(1).nonzero()[0])
            raise DataError(f"estimate_advantage returned a value that is not finite for row {batch.keys[row]}")
        return advantages

    def _group_metrics(self, batch: Batch) -> dict[str, float]:
        """What `rollout_group` logged in the workers, averaged over groups."""
        if not self.plugins.implements("rollout_group"):
            return {}
        logged: dict[str, list[float]] = {}
        for fields in batch.extra("extra_fields"):
            for key, value in fields.get(METRICS_FIELD, {}).items():
                logged.setdefault(key, []).append(value)
        return {key: float(np.mean(values)) for key, values in logged.items()}

    def _drop_from_queue(self) -> None:
        dropped = [key for key, gone in zip(self._full.keys, self._full.dropped.tolist(), strict=True) if gone]
        if dropped:
            tq.kv_clear(keys=dropped, partition_id="train")

    # The update and the end of the step

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch.extra_info[STEP_KEY] = self.global_steps
        with self._group_size():
            batch = super()._update_actor(self._for_workers(batch, *LOSS_FIELDS), metrics)
        prefix = "actor/plugins/"
        for key in [key for key in metrics if key.startswith(prefix)]:
            metrics[key.removeprefix("actor/")] = metrics.pop(key)
        return batch

    def _compute_metrics(self, batch: KVBatchMeta, metrics: dict, *args: Any, **kwargs: Any) -> None:
        with self.clock():
            metrics.update(self._health.result())
            self._drop_from_queue()
        super()._compute_metrics(batch, metrics, *args, **kwargs)
        metrics.update(self.run.take_metrics())
        self.plugins.hook.on_step_end(run=self.run, metrics=metrics)
        metrics.update(self.run.take_metrics())
        if self.reporter is not None:
            self.reporter.step(self.global_steps, self.total_training_steps, metrics)
            for sentence in self.watch.look(metrics):
                self.reporter.note(f"warning: {sentence}")

    def _validate(self) -> dict[str, float]:
        with fast_validation_metrics():
            metrics = super()._validate()
        self.plugins.hook.on_validation_end(run=self.run, metrics=metrics)
        if self.reporter is not None:
            self.reporter.validation(self.global_steps, metrics)
        return metrics

    def fit(self, agent_loop_manager: Any) -> None:
        if self.global_steps > 0 and self.reporter is not None:
            self.reporter.note(f"resuming after step {self.global_steps} from {self._checkpoint_folder()}")
        super().fit(agent_loop_manager)
        if self.config.trainer.get("val_only", False):
            return
        self.global_steps -= 1  # verl has counted on to the step after the last
        if self._stopped and self.config.trainer.save_freq > 0 and self._saved_step != self.global_steps:
            self._save_checkpoint()  # verl saves at a last step only when the step began as one
        self.plugins.hook.on_train_end(run=self.run)
        if self.reporter is not None:
            self.reporter.end(self.global_steps, self.run.take_metrics())

    def stop(self, reason: str) -> None:
        """End training after this step."""
        self._stopped = self.global_steps < self.total_training_steps
        self.total_training_steps = self.global_steps
        if self.reporter is not None:
            self.reporter.note(f"stopping after step {self.global_steps}: {reason}")

    # Rollout servers between steps

    def get_llm_client(self) -> Any:
        """verl's client; a single server of ours is asked directly instead of through a load balancer."""
        client = super().get_llm_client()
        servers = self.llm_server_manager.server_handles
        if self.config.actor_rollout_ref.rollout.name != ROLLOUT_NAME or len(servers) != 1:
            return client
        from verl_plugins.cpu.client import CLIENTS

        return self.llm_server_manager.get_client(client_cls=CLIENTS[type(client)], server=servers[0])

    def on_init_end(self) -> None:
        super().on_init_end()
        self._awake = True

    def on_sample_end(self) -> None:
        super().on_sample_end()
        self._awake = False

    def on_step_end(self) -> None:
        super().on_step_end()
        self._awake = True

    @contextmanager
    def awake_replicas(self) -> Iterator[None]:
        """Rollout servers that answer, with the current weights, also while the actor is being trained."""
        if self._awake:
            yield
            return
        interrupted = self.trainer_mode != "sync"
        self.checkpoint_manager.update_weights(self.global_steps)
        if interrupted:
            self.checkpoint_manager.resume_generation_replicas()
        try:
            yield
        finally:
            if interrupted:
                self.checkpoint_manager.abort_replicas()
            self.checkpoint_manager.sleep_replicas()


def _row_order(key: str) -> tuple[str, int, int]:
    uid, session, turn = key.rsplit("_", 2)
    return uid, int(session), int(turn)


class PluginTrainerSync(Stages, PPOTrainerSync):
    """verl's `sync` trainer with plugins."""


class PluginTrainerColocateAsync(Stages, PPOTrainerColocateAsync):
    """verl's `colocate_async` trainer with plugins."""


TRAINERS = {"sync": PluginTrainerSync, "colocate_async": PluginTrainerColocateAsync}
