"""verl's actor worker with plugins in it: the loss, additional terms and the optimiser step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.device import get_device_name
from verl.utils.metric import Metric
from verl.workers.engine_workers import ActorRolloutRefWorker

from verl_plugins.bridge import census, gap, heads, parting, probe
from verl_plugins.bridge.defaults import ActorDefaults
from verl_plugins.bridge.hidden import TakesStates
from verl_plugins.bridge.joined import JoinedMetrics
from verl_plugins.bridge.logits import shape
from verl_plugins.bridge.loss import LOSS_STAGES, STEP_KEY, PluginLoss
from verl_plugins.composition.blame import crossing

STAGES = (heads.STAGE, *LOSS_STAGES, "optimizer_step")


class PluginActorWorker(ActorRolloutRefWorker):
    """One rank of the actor."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        if get_device_name() == "cpu":
            from verl_plugins.cpu.engine import register_engine
            from verl_plugins.cpu.platform import unpin_offloading

            register_engine()
            unpin_offloading()
        super().init_model()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def set_plugins(self, section: dict[str, dict[str, Any]], seed: int) -> None:
        """Build this process's plugins and put them into model, loss and optimiser step; once, after `init_model`."""
        plugins = census.build(section, f"actor worker {torch.distributed.get_rank()}")
        engine = self.actor.engine
        metrics = JoinedMetrics()
        distillation = omega_conf_to_dataclass(self.distillation_config) if self.distillation_enabled else None
        loss = PluginLoss(plugins, omega_conf_to_dataclass(self.config.actor), seed, metrics, distillation)
        actor = EngineActor(engine, loss, metrics)
        self.plugins = plugins
        if any(gap.NAME in plugin.needs for plugin in plugins):
            gap.tell_gaps(engine)
        shape(plugins, *[part.engine.module for part in (self.actor, self.ref) if part is not None])
        if wishes := [plugin.hidden_wish() for plugin in plugins if "hidden_states" in plugin.needs]:
            TakesStates(engine, wishes)
        if not any(plugins.implements(stage) for stage in STAGES):
            return
        if plugins.implements(heads.STAGE):
            loss.head_losses = heads.HeadLosses(engine, plugins, loss.described)
        plugins.add_fallback(ActorDefaults(engine.optimizer_step))
        self.actor.set_loss_fn(loss)
        engine.optimizer_step = actor.optimizer_step
        engine.train_batch = partial(actor.train_batch, engine.train_batch)
        self.actor.train_mini_batch = partial(actor.train_mini_batch, self.actor.train_mini_batch)

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

    def __init__(self, engine: Any, loss: PluginLoss, metrics: JoinedMetrics) -> None:
        self._engine, self._loss, self._metrics = engine, loss, metrics
        self._owner = ""
        self._data: TensorDict | None = None

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
        for key, value in metrics.items():
            self._metrics.add(f"plugins/{self._owner}/{key}", value, "mean")

    def parameters(self) -> list[Tensor]:
        return probe.trained(self._engine.module)

    def logits(self, tokens: int, at: Iterable[Tensor] | None = None) -> Tensor:
        return probe.logits(self._engine, self._data, tokens, at)

    def gather(self, values: Tensor) -> Tensor:
        return probe.gather(values)

    def distillation_gradient(self) -> list[Tensor]:
        return probe.gradient(self._engine, self._data, self._loss, self._loss.distilling())

    def gradients(self, name: str, parameters: Sequence[Tensor]) -> dict[float, list[Tensor]]:
        return parting.gradients(self._engine, self._data, self._loss, name, parameters)

    def optimizer_step(self) -> float:
        """What the engine calls: the stage, whose last implementation is the engine's own step."""
        with crossing():
            grad_norm = self._loss.plugins.hook.optimizer_step(actor=self)
        self._loss.next_mini_batch()
        return grad_norm

    def train_batch(self, train_batch: Callable[..., dict], data: TensorDict, *args: Any, **kwargs: Any) -> dict:
        """The engine's mini-batch; every rank enters, also pipeline stages that never call the loss."""
        self._loss.enter_step(int(tu.get_non_tensor_data(data, key=STEP_KEY, default=0)))
        self._data = data
        try:
            output = train_batch(data, *args, **kwargs)
        finally:
            self._data = None
        self._metrics.close_mini_batch(self._engine.get_data_parallel_group())
        return output

    def train_mini_batch(self, train_mini_batch: Callable[..., TensorDict | None], data: TensorDict) -> Any:
        """The worker's whole update."""
        return with_metrics(train_mini_batch(data=data), self._metrics)


def with_metrics(output: TensorDict | None, metrics: JoinedMetrics) -> TensorDict | None:
    """What a worker says of its update; its metrics, where this rank reports any, joined by those of the plugins."""
    own = {key: _metric(reduce, values) for key, (reduce, values) in metrics.take().items()}
    if output is not None and own:
        tu.assign_non_tensor(output, metrics={**tu.get(output, "metrics"), **own})
    return output


def _metric(reduce: str, values: Sequence[float]) -> Metric:
    """verl's container, which the driver reduces."""
    metric = Metric(reduce)
    metric.extend(list(values))
    return metric
