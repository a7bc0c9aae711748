"""The critic's values on their way to the stages and back: the part of the trainer about them.

verl keeps the values of the states in which response tokens were chosen. The state behind the last token has one too,
which only a response that was cut off needs; it is kept here, as are the values of each head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import ray
import torch
import transfer_queue as tq
from omegaconf import OmegaConf
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1 import trainer_base
from verl.workers.utils.padding import response_from_nested

from verl_plugins.batch import Batch
from verl_plugins.bridge.critic import PluginCriticWorker


class KnowsValues:
    """Mixed into one of verl's trainers; expects `plugins` and `needs`."""

    _heads: Tensor
    """Nested [all rows, T, N]."""
    _ends: Tensor
    """[all rows, N]."""

    @property
    def _acts_on_critic(self) -> bool:
        return self.use_critic and ("values" in self.needs or self.plugins.implements("value_loss"))

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        if self._acts_on_critic:
            self.role_worker_mapping[Role.Critic] = ray.remote(PluginCriticWorker)

    def _set_critic_plugins(self, section: dict[str, Any]) -> None:
        if self._acts_on_critic:
            self.critic_wg.set_plugins(section, OmegaConf.to_container(self.config.critic, resolve=True))

    def _compute_values(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """verl's stage, with what it would drop; the values that it stores are the mean of the heads."""
        if not self._acts_on_critic:
            return super()._compute_values(batch, metrics)
        with patch.object(trainer_base, "response_from_nested", self._keep_heads):
            batch = super()._compute_values(batch, metrics)
        fields = TensorDict({"head_values": self._heads}, batch_size=len(batch))
        tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)
        return batch

    def _keep_heads(self, values: Tensor, response_mask: Tensor) -> Tensor:
        """Nested values [all rows, sequence] or [all rows, sequence, N] -> nested [all rows, T]."""
        whole = values.values().reshape(len(values.values()), -1)
        self._ends = whole[values.offsets()[1:] - 1]
        headed = torch.nested.nested_tensor_from_jagged(whole, values.offsets())
        self._heads = response_from_nested(headed, response_mask)
        return torch.nested.as_nested_tensor([row.mean(-1) for row in self._heads.unbind()], layout=torch.jagged)

    def _known_values(self, rows: Tensor) -> dict[str, Tensor]:
        """What `Batch` has of them besides `values`, of the rows at these places."""
        if not self._acts_on_critic:
            return {}
        return {"head_values": self._heads.to_padded_tensor(0)[rows], "bootstrap_values": self._ends[rows]}

    @contextmanager
    def _assigned_values(self, data: Any, rows: Tensor, batch: Batch) -> Iterator[None]:
        """verl's estimator sees the values that a plugin has assigned, and what follows the last token in its reward.

        With the discount g, r + g v - V is the same to the last bit whether g v is the next state's part or the
        reward's; masked tokens behind the last that was generated carry it on in both.
        """
        assigned, tensors = batch.take_assigned(), data.batch
        if (values := assigned.get("values")) is not None:
            tensors["values"][rows] = values.to(tensors["values"].dtype)
            batch.written["values"] = values
        rewards = tensors["token_level_rewards"]
        if (bootstrap := assigned.get("bootstrap")) is not None:
            places = torch.arange(rewards.shape[1]) * batch.response_mask
            followed = torch.zeros_like(rewards[rows])
            discounted = self.config.algorithm.gamma * bootstrap.to(rewards.dtype)
            followed.scatter_(1, places.amax(1, keepdim=True), discounted[:, None])
            tensors["token_level_rewards"] = rewards.index_add(0, rows, followed)
        try:
            yield
        finally:
            tensors["token_level_rewards"] = rewards
