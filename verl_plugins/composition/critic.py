"""Plugins that read or train verl's value model (the critic): that there is one, and how many heads it has."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf, open_dict

from verl_plugins.composition.manager import Plugins
from verl_plugins.composition.refusals import ESTIMATOR, FSDP, has_critic
from verl_plugins.errors import CompositionError

HEADS = "num_value_heads"
"""Key of the value model's configuration under which the engine finds the number of its heads."""


def check(config: DictConfig, plugins: Plugins) -> None:
    """Enter the number of heads that a plugin asks for, and refuse what has no critic to act on.

    Raises:
        CompositionError: names the key and what would be right.
    """
    acting = [name for name, _ in plugins.of_stage("value_loss")]
    for plugin in plugins:
        why = "needs values" if "values" in plugin.needs else "acts in the stage value_loss"
        if ("values" in plugin.needs or plugin.name in acting) and not has_critic(config):
            raise CompositionError(
                f"plugin {plugin.name!r} {why}, and no value model is trained ({ESTIMATOR}="
                f"{config.algorithm.adv_estimator}, critic.enable={config.critic.enable}): set {ESTIMATOR}=gae"
            )
    asking = [plugin for plugin in plugins if plugin.value_heads > 1]
    if len(asking) > 1:
        one, other = asking[:2]
        raise CompositionError(
            f"plugins {one.name!r} and {other.name!r} both give the value model heads ({one.value_heads} and "
            f"{other.value_heads}): leave one out, as in ~plugins.{other.name}"
        )
    for plugin in asking:
        _give_heads(config, plugin.name, plugin.value_heads)


def _give_heads(config: DictConfig, name: str, count: int) -> None:
    critic = config.critic
    who = f"plugin {name!r} gives the value model {count} heads"
    if critic.strategy not in FSDP:
        raise CompositionError(
            f"{who}, which takes verl's FSDP engine, and critic.strategy is {critic.strategy!r}: choose "
            "model_engine=dp with the strategy fsdp2"
        )
    if rank := critic.model.get("lora_rank"):
        raise CompositionError(
            f"{who}, which are trained whole, and critic.model.lora_rank={rank} trains adapters only: set "
            "critic.model.lora_rank=0"
        )
    with open_dict(config):
        OmegaConf.update(config, f"critic.model.override_config.{HEADS}", count, force_add=True)
