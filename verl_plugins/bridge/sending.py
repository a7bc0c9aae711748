"""Which rows and which of their fields the workers get: the part of the trainer between driver, queue and workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transfer_queue as tq
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.workers.utils.padding import response_from_nested

from verl_plugins.batch import Batch
from verl_plugins.bridge import hidden
from verl_plugins.bridge.gap import WANTED
from verl_plugins.bridge.queue import QueueSource, write_fields
from verl_plugins.hidden import Wish

FORWARD_FIELDS = ("input_ids", "position_ids", "loss_mask", "routed_experts", "multi_modal_inputs")
LOSS_FIELDS = ("prompts", "responses", "response_mask", "old_log_probs", "advantages", "ref_log_prob")
LOSS_FIELDS += ("rollout_is_weights", "teacher_ids", "teacher_logprobs")
STEP_FIELDS = ("entropy", "returns", "values", "rollout_log_probs")
"""What verl's engine and loss read; columns that do not exist in a run are left out."""


STATISTICS = {"sum_pi_squared": "calculate_sum_pi_squared", "top2_gap": WANTED}
"""What the pass for the old log-probs computes only where a plugin needs it, and the word that asks for it."""


class SendsRows:
    """Mixed into one of verl's trainers; expects `plugins`, `needs`, `seed` and `clock`."""

    _hidden: hidden.ReadStates | None = None
    """Of the batch that is trained on; None in a step in which no plugin wished for any."""

    _begun_with: dict[str, int]
    """By row key: the step whose end the weights are of that began the response."""

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
        source = QueueSource(keys, "train", {**self._lags(keys), **(known or {})})
        budget = self.config.data.max_response_length
        return Batch(source, tokenizer=self.tokenizer, budget=budget, full=full)

    def _note_weights(self, batch: KVBatchMeta) -> None:
        """Remember which weights began each row; rows that come later are of the newest."""
        self._begun_with = {
            key: tag["min_global_steps"]
            for key, tag in zip(batch.keys, batch.tags, strict=True)
            if tag.get("min_global_steps") is not None
        }

    def _lags(self, keys: Sequence[str]) -> dict[str, Tensor]:
        newest = self.global_steps - 1
        steps = torch.tensor([newest - self._begun_with.get(key, newest) for key in keys])
        return {"__lag_steps__": steps, "__lag__": steps * self.parameter_sync_step + self.local_trigger_step}

    def _store(self, meta: KVBatchMeta, batch: Batch) -> KVBatchMeta:
        """Ship the fields plugins have put, for all rows of `meta`."""
        mask = tq.kv_batch_get(keys=meta.keys, partition_id=meta.partition_id, select_fields=["response_mask"])
        fields, batch.written = batch.written, {}
        self._shipped |= fields.keys() - {"values"}
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
        """What the rows of a step have when they come from the rollout."""
        if not self._columns:
            self._columns = set(tq.kv_batch_get(keys=batch.keys[:1], partition_id=batch.partition_id).keys())
        return self._columns

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch = self._for_workers(batch)
        wanted = [name for name in STATISTICS if name in self.needs]
        batch.extra_info.update({STATISTICS[name]: True for name in wanted})
        asked = hidden.ask(batch, self._wishes, self.global_steps, self.seed)
        batch = super()._compute_old_log_prob(batch, metrics)
        for word in (*(STATISTICS[name] for name in wanted), hidden.MEASURED_STEP):
            batch.extra_info.pop(word, None)
        self._statistics = self._read_statistics(batch, wanted)
        self._hidden = None if asked is None else hidden.read(batch, asked)
        self._restore_old_log_probs(batch.partition_id)
        if "prompt_log_probs" in self.needs:
            self._read_prompt_log_probs(batch)
        return batch

    @property
    def _wishes(self) -> list[Wish]:
        return [plugin.hidden_wish() for plugin in self.plugins if "hidden_states" in plugin.needs]

    def _restore_old_log_probs(self, partition: str) -> None:
        """Rows of earlier steps have again those of the policy that wrote them; verl asks the current one for all."""
        if not self._past:
            return
        rows = [torch.as_tensor(values, dtype=torch.float32) for values in self._past.values()]
        fields = {"old_log_probs": torch.nested.as_nested_tensor(rows, layout=torch.jagged)}
        tq.kv_batch_put(
            keys=[*self._past], partition_id=partition, fields=TensorDict(fields, batch_size=len(self._past))
        )

    def _compute_ref_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        return super()._compute_ref_log_prob(self._for_workers(batch), metrics)

    def _read_statistics(self, batch: KVBatchMeta, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """By name: [T] of each row, by its key."""
        if not names:
            return {}
        fields = [*names, "response_mask"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        padded = [response_from_nested(data[name], data["response_mask"]).to_padded_tensor(0) for name in names]
        return {name: dict(zip(batch.keys, values, strict=True)) for name, values in zip(names, padded, strict=True)}

    def _read_prompt_log_probs(self, batch: KVBatchMeta) -> None:
        """Keep the prompts' log-probs: verl overwrites the field when it scores the reference policy."""
        fields = ["log_probs", "prompts"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        lengths = data["prompts"].offsets().diff() - 1
        padded = data["log_probs"].to_padded_tensor(0)[:, : int(lengths.max())]
        values = torch.where(torch.arange(padded.shape[1]) < lengths[:, None], padded, 0.0)
        self._prompt_log_probs = dict(zip(batch.keys, values, strict=True))
