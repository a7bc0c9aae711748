"""From rollouts to the advantage: the part of the trainer behind `shape_rewards` to `observe`, and health metrics."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1 import trainer_base

from verl_plugins.batch import Batch
from verl_plugins.bridge.additions import store_additions
from verl_plugins.bridge.loss import LOSS_STAGES, ROW_FIELD
from verl_plugins.bridge.queue import is_padding
from verl_plugins.bridge.rollout import METRICS_FIELD
from verl_plugins.bridge.rows import MAX_TOKENS, OFFSET, ROLLOUT_N, TRUNCATED
from verl_plugins.bridge.sending import SendsRows
from verl_plugins.bridge.valuing import KnowsValues
from verl_plugins.diagnostics.budget import rollout_budget
from verl_plugins.diagnostics.health import group_health, lag_health, policy_health, reward_parts, signal_health
from verl_plugins.tokens import row_number

HEALTH_FIELDS = ("responses", "verdict", "rollout_log_probs", "extra_fields", ROLLOUT_N, MAX_TOKENS)
HEALTH_FIELDS += (TRUNCATED, OFFSET)
"""What nothing but the metrics of every step reads; columns that do not exist in a run are left out."""


class EstimatesAdvantage(SendsRows, KnowsValues):
    """Mixed into one of verl's trainers."""

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict, **kwargs: Any) -> KVBatchMeta:
        """Rows in an order of their own (not that of arrival), rewards shaped, rows dropped, then verl's balancing."""
        self._columns = set()
        with self.clock():
            batch = self._shape_and_select(batch)
        with self._group_size(), self._keep_order():
            return super()._balance_batch(batch, metrics, **kwargs)

    def _shape_and_select(self, batch: KVBatchMeta) -> KVBatchMeta:
        batch.reorder(sorted(range(len(batch)), key=lambda row: _row_order(batch.keys[row])))
        self._note_weights(batch)
        self._full = self._open(batch.keys)
        self.plugins.hook.shape_rewards(run=self.run, batch=self._full)
        self.plugins.hook.select_rows(run=self.run, batch=self._full)
        if self._full.written:
            batch = self._store(batch, self._full)
        kept = [key for key, dropped in zip(batch.keys, self._full.dropped.tolist(), strict=True) if not dropped]
        if self._full.additions:
            batch = store_additions(batch, self._full, self.tokenizer.eos_token_id, self.rows.__getitem__)
            kept = sorted([*kept, *batch.keys[len(self._full) :]], key=_row_order)
        if kept != batch.keys:
            batch = batch.select_keys(kept)
        self._past = {new.key: new.past.old_log_probs for new in self._full.additions if new.past is not None}
        self._rows_per_prompt = self._resized(kept)
        return batch

    def _resized(self, kept: Sequence[str]) -> int | None:
        """Rows of each prompt where the stage has changed their number; None where rows are not responses of a step."""
        prompts = len(set(self._full.uid))
        if len(kept) == len(self._full) or len(kept) % prompts or self._past or bool(self._full.turn.any()):
            return None
        return len(kept) // prompts

    def _keep_order(self) -> Any:
        """With one rank there is nothing to balance, and verl's partitioning is slow for what it then returns."""
        if self.data_parallel_size > 1:
            return nullcontext()
        one_part = lambda lengths, k_partitions, equal_size: [list(range(len(lengths)))]  # noqa: E731
        return patch.object(trainer_base, "get_seqlen_balanced_partitions", one_part)

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
        if any(self.plugins.implements(stage) for stage in LOSS_STAGES):
            self._batch.put(ROW_FIELD, torch.tensor([row_number(key) for key in self._batch.keys]))
        if self._batch.written:
            batch = self._store(batch, self._batch)
        fields = [name for name in HEALTH_FIELDS if name in self._columns_of(batch)]
        self._updates.append((self._full, self._beside.submit(self._measure_health, self._batch, fields)))
        return batch

    def _measure_health(self, batch: Batch, fields: Sequence[str]) -> dict[str, float]:
        """In a thread while the actors update: fetching what nothing but metrics reads takes longer than all stages."""
        start = time.perf_counter()
        batch.full.prefetch(*fields)
        metrics = group_health(batch.full) | signal_health(batch) | policy_health(batch) | reward_parts(batch.full)
        metrics |= self._group_metrics(batch.full) | rollout_budget(batch.full, self.run.account.take())
        if self.trainer_mode != "sync":
            metrics |= lag_health(batch)
        return metrics | {"timing_s/health": time.perf_counter() - start}

    def _estimate(self, original: Any, data: Any, batch_keys: list[str], **kwargs: Any) -> Any:
        """In the place of verl's function: the same result, from the stage `estimate_advantage`."""
        with self.clock():
            return self._estimate_by_stage(original, data, batch_keys, kwargs)

    def _estimate_by_stage(self, original: Any, data: Any, batch_keys: list[str], kwargs: dict[str, Any]) -> Any:
        # By key: stages see the same order on any number of ranks, over which verl's balancing spreads the rows.
        real = [row for row, key in enumerate(batch_keys) if not is_padding(key)]
        rows = torch.tensor(sorted(real, key=lambda row: _row_order(batch_keys[row])))
        keys = [batch_keys[row] for row in rows.tolist()]
        known = {name: values[rows] for name, values in data.batch.items()}
        known["rm_scores"] = known.pop("token_level_rewards")
        if self._prompt_log_probs:
            known["prompt_log_probs"] = torch.stack([self._prompt_log_probs[key] for key in keys])
        known |= {name: torch.stack([of[key] for key in keys]) for name, of in self._statistics.items()}
        if "hidden_states" in self.needs:
            known["hidden_states"] = None if self._hidden is None else self._hidden.of(keys)
        known |= self._known_values(rows)
        changed = bool(self._full.dropped.any()) or self._full.additions
        full = self._full if changed else None
        self._batch = batch = self._open(keys, known, full)

        def verls_estimator() -> Tensor:
            with self._assigned_values(data, rows, batch):
                original(data, batch_keys=batch_keys, **kwargs)
            return data.batch["advantages"][rows]

        self.defaults.estimator = verls_estimator
        advantages = self.plugins.hook.estimate_advantage(run=self.run, batch=batch)
        whole = torch.zeros_like(data.batch["token_level_rewards"])
        whole[rows] = advantages.to(whole.dtype) * batch.response_mask
        data.batch["advantages"] = whole
        if "returns" not in data.batch:
            data.batch["returns"] = whole
        batch._fields["advantages"] = whole[rows]
        return data

    def _group_metrics(self, batch: Batch) -> dict[str, float]:
        """What `rollout_group` logged in the workers, averaged over groups."""
        if not self.plugins.implements("rollout_group"):
            return {}
        logged: dict[str, list[float]] = {}
        for fields in batch.extra("extra_fields"):
            for key, value in fields.get(METRICS_FIELD, {}).items():
                logged.setdefault(key, []).append(value)
        return {key: float(np.mean(values)) for key, values in logged.items()}


def _row_order(key: str) -> tuple[str, int, int]:
    uid, session, turn = key.rsplit("_", 2)
    return uid, int(session), int(turn)
