"""What a composed run must satisfy before any process starts: fields that plugins need, and settings they exclude."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from verl_plugins.composition import critic, refusals, separate, sizes, teacher
from verl_plugins.composition.compose import Composed
from verl_plugins.composition.loggers import check_loggers
from verl_plugins.composition.look import reward
from verl_plugins.composition.manager import Plugins, build
from verl_plugins.composition.override import known_keys, one_line
from verl_plugins.errors import CompositionError, PluginError, nearest
from verl_plugins.plugin import Plugin

MODES = ("sync", "colocate_async", "separate_async")
NEEDS = (
    "current_entropy",
    "entropy",
    "hidden_states",
    "logits",
    "old_log_probs",
    "prompt_log_probs",
    "ref_log_probs",
    "rollout_log_probs",
    "rm_scores",
    "sum_pi_squared",
    "top2_gap",
    "uid",
    "values",
    "verdict",
)
"""Fields verl can be asked for; rm_scores, uid and verdict exist anyway, and are sent to the loss when needed."""


def check(composed: Composed) -> Plugins:
    """Build the plugins, switch on in verl what they need, and refuse what cannot work, in one sentence.

    Changes `composed.config` in place.
    """
    config = composed.config
    try:
        _check_trainer(config)
        check_loggers(config)
        _check_missing(config, prepared=composed.prepare is not None)
        config.plugins = composed.plugins  # interpolations resolved, the same in every process
        plugins = build(composed.plugins)
        if leaving := [*refusals.giving_way(composed, plugins), *reward.giving_way(config, plugins)]:
            config.plugins = {name: settings for name, settings in composed.plugins.items() if name not in leaving}
            plugins = build(composed.plugins)
        refusals.check(composed, plugins)
        _check_loss(config, plugins)
        critic.check(config, plugins)
        for plugin in plugins:
            for need in sorted(plugin.needs):
                _provide(config, need, plugin)
            _ask(plugin, config)
        sizes.check(config, composed.given)
    except OmegaConfBaseException as error:
        raise CompositionError(f"the composed configuration cannot be resolved: {one_line(error)}") from error
    return plugins


def _check_trainer(config: DictConfig) -> None:
    if not config.trainer.use_v1:
        raise CompositionError("trainer.use_v1 is false: plugins act in verl's V1 trainer, set trainer.use_v1=True")
    mode = config.trainer.v1.trainer_mode
    if mode not in MODES:
        raise CompositionError(f"trainer.v1.trainer_mode is {mode!r}{nearest(str(mode), MODES)}")
    separate.check(config)
    teacher.check(config)
    if mode != "sync" and config.actor_rollout_ref.rollout.full_determinism:
        raise CompositionError(
            f"actor_rollout_ref.rollout.full_determinism=True cannot hold with trainer.v1.trainer_mode={mode}, which "
            "interrupts generation whenever the step's prompts are ready: set trainer.v1.trainer_mode=sync"
        )
    rollout = config.actor_rollout_ref.rollout
    if rollout.full_determinism and rollout.name == "vllm" and config.trainer.device == "cpu":
        raise CompositionError(
            "actor_rollout_ref.rollout.full_determinism=True has vLLM use kernels that exist for GPUs only: set it to "
            "False, or choose the preset cpu"
        )
    if config.trainer.save_freq > 0 and config.trainer.get("max_actor_ckpt_to_keep") == 1:
        raise CompositionError(
            "trainer.max_actor_ckpt_to_keep=1 lets verl delete the old checkpoint before it marks the new one, and a "
            "kill in between leaves none: set trainer.max_actor_ckpt_to_keep=2 or more"
        )
    manager = OmegaConf.select(config, "actor_rollout_ref.rollout.agent.agent_loop_manager_class")
    if manager is not None:
        raise CompositionError(
            f"actor_rollout_ref.rollout.agent.agent_loop_manager_class is {manager!r}: leave it unset, because the "
            f"manager that calls the plugins takes this place"
        )


def _check_missing(config: DictConfig, *, prepared: bool) -> None:
    """Values marked `???` are the user's to give; model and data may still be made by the preset."""
    for key in sorted(key for key, value in known_keys(config).items() if isinstance(value, str) and value == "???"):
        optional = key.startswith("reward.reward_model.") and not config.reward.reward_model.enable
        made = prepared and key.startswith(MADE)
        if not (optional or made):
            raise CompositionError(f"{key} has no value: set it, as in {key}=…, or choose a preset that does")


def _check_loss(config: DictConfig, plugins: Plugins) -> None:
    mode = config.actor_rollout_ref.actor.policy_loss.loss_mode
    key = "actor_rollout_ref.actor.policy_loss.loss_mode"
    if mode != "vanilla" and plugins.implements("policy_loss"):
        name = plugins.of_stage("policy_loss")[0][0]
        raise CompositionError(
            f"{key} is {mode!r} and plugin {name!r} acts on the policy loss too: set {key}=vanilla or "
            f"leave the plugin out with ~plugins.{name}"
        )


MADE = ("data.", "actor_rollout_ref.model.", "critic.model.", "actor_rollout_ref.rollout.multi_turn.tool_config_path")
MADE += ("actor_rollout_ref.rollout.agent.agent_loop_config_path",)
"""Keys whose values presets make."""
OF_THE_PASS = ("entropy", "hidden_states", "old_log_probs", "prompt_log_probs", "sum_pi_squared", "top2_gap")
"""What the forward pass before the update computes."""


def _provide(config: DictConfig, need: str, plugin: Plugin) -> None:
    """Make verl compute one field, or say why it cannot."""
    actor = config.actor_rollout_ref.actor
    if need not in NEEDS:
        raise CompositionError(
            f"plugin {plugin.name!r} needs {need!r}, which verl cannot be asked for{nearest(need, NEEDS)}"
        )
    if need in OF_THE_PASS and config.algorithm.rollout_correction.bypass_mode:
        raise CompositionError(
            f"plugin {plugin.name!r} needs {need}, which algorithm.rollout_correction.bypass_mode=True leaves out "
            f"because it skips the forward pass before the update: set it to False"
        )
    if need == "sum_pi_squared" and config.actor_rollout_ref.model.use_fused_kernels:
        raise CompositionError(
            f"plugin {plugin.name!r} needs sum_pi_squared, and actor_rollout_ref.model.use_fused_kernels=True makes no "
            "logits to compute it from: set it to False"
        )
    if need == "top2_gap":
        refusals.check_logits(config, f"plugin {plugin.name!r} needs top2_gap, which is read off logits")
    if need == "logits":
        refusals.check_logits(config, f"plugin {plugin.name!r} needs logits (actor.logits)")
    if need == "hidden_states":
        refusals.check_hidden(config, plugin.name)
        plugin.hidden_wish()
    with open_dict(config):
        if need == "rollout_log_probs":
            config.actor_rollout_ref.rollout.calculate_log_probs = True
        elif need == "current_entropy":
            actor.calculate_entropy = True
        elif need == "ref_log_probs" and not (actor.use_kl_loss or config.algorithm.use_kl_in_reward):
            actor.use_kl_loss, actor.kl_loss_coef = True, 0.0


def _ask(plugin: Plugin, config: DictConfig) -> None:
    try:
        plugin.check(config)
    except PluginError:
        raise
    except Exception as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise CompositionError(f"plugin {plugin.name!r} could not check the configuration: {cause}") from error
