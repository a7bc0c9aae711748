"""verl's actor worker with plugins in it: the loss, additional terms and the optimiser step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.device import get_device_name
from verl.utils.metric import Metric
from verl.workers.engine_workers import ActorRolloutRefWorker

from verl_plugins.bridge import census
from verl_plugins.bridge.defaults import ActorDefaults
from verl_plugins.bridge.loss import PluginLoss

STAGES = ("policy_loss", "loss_terms", "optimizer_step")


class PluginActorWorker(ActorRolloutRefWorker):
    """One rank of the actor."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        if get_device_name() == "cpu":
            from verl_plugins.cpu.platform import unpin_offloading

            unpin_offloading()
        super().init_model()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def set_plugins(self, section: dict[str, dict[str, Any]], seed: int) -> None:
        """Build this process's plugins and put them into loss and optimiser step; once, after `init_model`."""
        plugins = census.build(section, f"actor worker {torch.distributed.get_rank()}")
        engine = self.actor.engine
        loss = PluginLoss(plugins, omega_conf_to_dataclass(self.config.actor), seed, torch.distributed.get_rank())
        actor = EngineActor(engine, loss)
        self.plugins = plugins
        if not any(plugins.implements(stage) for stage in STAGES):
            return
        plugins.add_fallback(ActorDefaults(engine.optimizer_step))
        self.actor.set_loss_fn(loss)
        engine.optimizer_step = actor.optimizer_step
        engine.train_batch = partial(actor.train_batch, engine.train_batch)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def plugin_state(self) -> dict[str, dict[str, Any]]:
        """State of every plugin of this process, by name."""
        return {plugin.name: plugin.state_dict() for plugin in self.plugins}

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def load_plugin_state(self, states: dict[str, dict[str, Any]]) -> None:
        """Restore what `plugin_state` returned."""
        for plugin in self.plugins:
            if plugin.name in states:
                plugin.load_state_dict(states[plugin.name])


class EngineActor:
    """The actor as `optimizer_step` sees it (`verl_plugins.services.Actor`)."""

    def __init__(self, engine: Any, loss: PluginLoss) -> None:
        self._engine, self._loss = engine, loss
        self._metrics: dict[str, float] = {}
        self._owner = ""

    @property
    def module(self) -> torch.nn.Module:
        return self._engine.module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._engine.optimizer

    @property
    def step(self) -> int:
        return self._loss.step

    @property
    def mini_batch(self) -> int:
        return self._loss.mini_batch

    def scoped(self, owner: str) -> EngineActor:
        """The same actor in the hands of plugin `owner`."""
        other = object.__new__(EngineActor)
        other.__dict__.update(self.__dict__, _owner=owner)
        return other

    def log(self, metrics: Mapping[str, float]) -> None:
        self._metrics.update({f"plugins/{self._owner}/{key}": float(value) for key, value in metrics.items()})

    def optimizer_step(self) -> float:
        """What the engine calls: the stage, whose last implementation is the engine's own step."""
        grad_norm = self._loss.plugins.hook.optimizer_step(actor=self)
        self._loss.next_mini_batch()
        return grad_norm

    def train_batch(self, train_batch: Callable[..., dict], *args: Any, **kwargs: Any) -> dict:
        """The engine's mini-batch, its metrics joined by what the optimiser step logged."""
        output = train_batch(*args, **kwargs)
        if output is not None:
            output["metrics"].update({name: Metric("mean", value) for name, value in self._metrics.items()})
        self._metrics.clear()
        return output
