"""verl's `separate_async`: rollout servers beside the training, which get new weights from a checkpoint engine.

One global step has `trainer.v1.separate_async.parameter_sync_step` updates, each with whole groups of
`actor.ppo_mini_batch_size` prompts; the servers get the weights after the last of them and never wait for the training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import ray
import torch
from omegaconf import OmegaConf
from verl.experimental.separation.engine_workers import DetachActorWorker
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1 import trainer_separate_async
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync
from verl.utils.device import get_device_name

from verl_plugins.bridge.actor import PluginActorWorker
from verl_plugins.bridge.trainer import Stages


class PluginDetachActorWorker(PluginActorWorker, DetachActorWorker):
    """An actor with plugins whose weights can be put aside."""

    @property
    def copy_handler(self) -> Callable[[torch.nn.Module], Any]:
        """verl's copy to the CPU is the live memory where the device is the CPU: restoring it would restore nothing."""
        save = super().copy_handler
        return save if get_device_name() != "cpu" else lambda module: copied(save(module))


def copied(saved: Any) -> Any:
    """What verl puts aside of a model, with memory of its own."""
    if isinstance(saved, torch.Tensor):
        return saved.clone()
    if isinstance(saved, dict):
        return {name: copied(value) for name, value in saved.items()}
    return tuple(map(copied, saved)) if type(saved) is tuple else saved


class PluginTrainerSeparateAsync(Stages, PPOTrainerSeparateAsync):
    """verl's `separate_async` trainer with plugins."""

    worker_class = PluginDetachActorWorker

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        if Role.RefPolicy in self.role_worker_mapping:
            self.role_worker_mapping[Role.RefPolicy] = ray.remote(self.worker_class)

    def _setup(self) -> None:
        """verl 0.9.1 passes `flush=True` to a logger where there are no hybrid replicas, which is a TypeError."""
        logger = trainer_separate_async.logger
        plain = lambda message, **_: type(logger).info(logger, message)  # noqa: E731
        with patch.object(logger, "info", plain):
            super()._setup()
        self._shape_served_logits(OmegaConf.to_container(self.config.plugins))

    @property
    def serving(self) -> Any:
        """The servers beside the training, which hybrid replicas join and leave; not there yet during the set-up."""
        return getattr(self, "standalone_server_manager", self.llm_server_manager)

    @property
    def _one_server(self) -> bool:
        return super()._one_server and not self._enable_hybrid_replicas

    @contextmanager
    def awake_replicas(self) -> Iterator[None]:
        """The separate servers always answer, with the weights of the last transfer."""
        yield
