"""verl's critic worker with plugins in it: a value model with several heads, and its loss.

The number of heads is the model's own setting `num_value_heads`, which composition enters. With one head, engine and
loss are verl's to the last bit.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.single_controller.base.decorator import Dispatch, register
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils import model as models
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.device import get_device_name, get_vendor
from verl.utils.metric import AggregationType, Metric
from verl.utils.torch_functional import masked_mean
from verl.workers.config import CriticConfig
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithValueHead
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.padding import no_padding_2_padding

from verl_plugins.bridge import census
from verl_plugins.bridge.actor import with_metrics
from verl_plugins.bridge.defaults import CriticDefaults, clipped_value_losses
from verl_plugins.bridge.joined import JoinedMetrics
from verl_plugins.bridge.loss import STEP_KEY, of_masked_tokens
from verl_plugins.composition.blame import crossing
from verl_plugins.composition.critic import HEADS
from verl_plugins.composition.manager import Plugins
from verl_plugins.composition.refusals import FSDP
from verl_plugins.errors import RunError
from verl_plugins.values import Values


class ValueHeadsEngine(FSDPEngineWithValueHead):
    """verl's FSDP engine of a value model, with as many outputs per position as the model has heads."""

    head_weight: Tensor | None = None
    """[N,D] of the last forward pass with gradient, where there are several heads."""

    def _build_module(self) -> torch.nn.Module:
        """verl loads a model for token classification with one label; here it has one for each head."""
        heads, load = int(getattr(self.model_config.hf_config, HEADS, 1)), models.load_valuehead_model

        def load_heads(local_path: str, torch_dtype: Any, model_config: Any, trust_remote_code: bool) -> Any:
            model_config.num_labels = heads
            return load(local_path, torch_dtype, model_config, trust_remote_code)

        with patch.object(models, "load_valuehead_model", load_heads):
            module = super()._build_module()
        if heads > 1:
            output_layer(module).register_forward_hook(self._keep_weight)
        return module

    def _keep_weight(self, layer: torch.nn.Module, inputs: Any, output: Any) -> None:
        """A copy in single precision: behind the forward pass FSDP may have freed what was gathered."""
        self.head_weight = layer.weight.float().clone() if torch.is_grad_enabled() else None


def output_layer(module: torch.nn.Module) -> torch.nn.Linear:
    """The layer of a model for token classification that gives the values.

    Raises:
        RunError: it has none with a weight for each head.
    """
    for name in ("score", "classifier"):
        if isinstance(layer := getattr(module, name, None), torch.nn.Linear):
            return layer
    raise RunError(
        f"critic.model: {type(module).__name__} has no linear layer `score` or `classifier` to give it several heads: "
        "use a model that Transformers knows for token classification"
    )


def register_engine() -> None:
    """Make it the engine of value models in this process; doing it twice is harmless."""
    device = os.environ.get("VERL_ENGINE_DEVICE") or get_device_name()
    vendor = os.environ.get("VERL_ENGINE_VENDOR") or get_vendor()
    if (device, vendor) not in EngineRegistry._engines["value_model"]["fsdp"]:
        EngineRegistry.register(model_type="value_model", backend=list(FSDP), device=device, vendor=vendor)(
            ValueHeadsEngine
        )


class PluginCriticWorker(TrainingWorker):
    """One rank of the critic."""

    def __init__(self, config: Any) -> None:
        register_engine()
        super().__init__(config)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def set_plugins(self, section: dict[str, dict[str, Any]], critic: Any) -> None:
        """Build this process's plugins and put them into the loss; once, after `reset`."""
        self.plugins = census.build(section, f"critic worker {torch.distributed.get_rank()}")
        self.plugins.add_fallback(CriticDefaults())
        loss = PluginValueLoss(self.plugins, omega_conf_to_dataclass(critic), self.engine)
        self.set_loss_fn(loss)
        self.train_batch = partial(loss.train_batch, self.train_batch)

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


class PluginValueLoss:
    """Called by verl's engine for every micro-batch, in the place of `value_loss`."""

    def __init__(self, plugins: Plugins, config: CriticConfig, engine: Any) -> None:
        self.plugins, self.config = plugins, config
        self._engine, self._metrics = engine, JoinedMetrics()
        self.step = self.mini_batch = self.micro_batch = 0

    def __call__(
        self, model_output: dict[str, Tensor], data: TensorDict, dp_group: Any = None
    ) -> tuple[Tensor, dict[str, Any]]:
        with crossing():
            values = self._values(model_output["values"], of_masked_tokens(data))
            losses = self.plugins.hook.value_loss(values=values)
        self.micro_batch += 1
        mask, config = values.response_mask, self.config
        loss = agg_loss(
            loss_mat=losses,
            loss_mask=mask,
            loss_agg_mode=config.loss_agg_mode,
            dp_size=data["dp_size"],
            batch_num_tokens=max(int(data["batch_num_tokens"]), 1),
            global_batch_size=data["global_batch_size"],
            loss_scale_factor=config.loss_scale_factor,
        )
        return loss, self._verls_metrics(loss, values)

    def _values(self, predicted: Tensor, data: TensorDict) -> Values:
        known = data.select("returns", "response_mask").to_padded_tensor()
        predicted = no_padding_2_padding(predicted, data)
        predicted = predicted if predicted.dim() == 3 else predicted[..., None]
        return Values(
            values=predicted,
            old_values=data["head_values"].to_padded_tensor(0, output_size=predicted.shape),
            returns=known["returns"],
            response_mask=known["response_mask"],
            config=self.config,
            head_weight=getattr(self._engine, "head_weight", None),
            log=self._log,
            step=self.step,
            mini_batch=self.mini_batch,
            micro_batch=self.micro_batch,
        )

    def _verls_metrics(self, loss: Tensor, values: Values) -> dict[str, Any]:
        """Under verl's names, of all heads."""
        _, clipped = clipped_value_losses(values)
        mask = values.response_mask[..., None].expand_as(clipped)
        return {
            "critic/vf_loss": Metric(value=loss, aggregation=AggregationType.SUM),
            "critic/vf_clipfrac": float(masked_mean(clipped.float(), mask)),
            "critic/vpred_mean": float(masked_mean(values.values.detach(), mask)),
        }

    def train_batch(self, train_batch: Any, data: TensorDict) -> TensorDict | None:
        """The worker's mini-batch; every rank enters."""
        step = int(tu.get_non_tensor_data(data, key=STEP_KEY, default=0))
        self.mini_batch = self.mini_batch + 1 if step == self.step else 0
        self.step, self.micro_batch = step, 0
        output = train_batch(data)
        self._metrics.close_mini_batch(self._engine.get_data_parallel_group())
        return with_metrics(output, self._metrics)

    def _log(self, owner: str, metrics: Mapping[str, float], reduce: str) -> None:
        for key, value in metrics.items():
            self._metrics.add(f"plugins/{owner}/{key}", value, reduce)
