"""Settings of verl with which plugins, or the preset, would do something else than what is asked: one sentence each."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable

from omegaconf import DictConfig, OmegaConf

from verl_plugins.composition import teacher
from verl_plugins.composition.compose import Composed
from verl_plugins.composition.manager import Plugins
from verl_plugins.errors import CompositionError, nearest
from verl_plugins.hookspecs import STAGES

ESTIMATORS = (
    "gae",
    "grpo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "rloo",
    "opo",
    "grpo_passk",
    "gpg",
    "rloo_vectorized",
    "grpo_vectorized",
    "optimal_token_baseline",
    "tir_optimal_token_baseline",
    "gdpo",
)
"""verl's own; more can be registered."""
ESTIMATOR = "algorithm.adv_estimator"
OF_THE_POLICY_LOSS = ("policy_loss", "loss_terms")
DISTILLATION = "distillation.distillation_loss"
ENGINE_KEYS = {
    "actor_rollout_ref.actor": ("strategy", "fsdp_config.strategy"),
    "actor_rollout_ref.ref": ("strategy", "fsdp_config.strategy"),
    "critic": ("strategy", "fsdp.strategy"),
}
"""Where verl reads the engine of each model from."""
FSDP = ("fsdp", "fsdp2")
ACTOR = "actor_rollout_ref.actor"
MODEL = "actor_rollout_ref.model"
CRITIC_MODEL = "critic.model.path"
PARTS = ("acc", "score", "equal_text", "equal_value", "not_equal", "no_final_answer", "not_understood")
PARTS += ("no_ground_truth", "verifier_error", "verifier_timeout")
"""Numbers among the parts of the default scorer's reward."""


def check(composed: Composed, plugins: Plugins) -> None:
    """Refuse them."""
    config = composed.config
    _check_distillation(config, plugins)
    _check_engines(config, composed.defaults)
    _check_critic(config, composed.defaults)
    _check_lora(config)
    _check_sglang(config)
    _check_profiling(config)
    _check_filter(config, plugins)
    _check_shaping(config, plugins)


def giving_way(composed: Composed, plugins: Plugins) -> list[str]:
    """Default estimators among the plugins that leave the advantage to the estimator of verl's that was asked for."""
    asked, stages = composed.config.algorithm.adv_estimator, plugins.of_stage("estimate_advantage")
    answering = {name: kind for name, kind in stages if kind != "wraps"}
    if asked not in ESTIMATORS and (close := difflib.get_close_matches(str(asked), ESTIMATORS, n=1)):
        raise CompositionError(f"{ESTIMATOR} is {asked!r}; did you mean {close[0]!r}?")
    if asked == "grpo" or not answering:
        return []
    chosen = ESTIMATOR in composed.given
    for name, kind in answering.items():
        stays = kind != "default" or any(key.startswith(f"plugins.{name}") for key in composed.asked)
        if stays or not chosen or _stages_of(name, plugins) != ["estimate_advantage"]:
            whose = "" if chosen else ", verl's default,"
            raise CompositionError(
                f"{ESTIMATOR}={asked}{whose} and plugin {name!r} both estimate the advantage: set {ESTIMATOR}=grpo to "
                f"have the plugin's and no value model, or leave the plugin out with ~plugins.{name}"
            )
        logging.getLogger(__name__).warning(f"{ESTIMATOR}={asked} is asked for: the default plugin {name!r} gives way")
    return list(answering)


def _stages_of(name: str, plugins: Plugins) -> list[str]:
    return [stage for stage in STAGES if any(name == acting for acting, _ in plugins.of_stage(stage))]


def _check_distillation(config: DictConfig, plugins: Plugins) -> None:
    if not teacher.is_on(config):
        for name, _ in plugins.of_stage("distillation_loss"):
            raise CompositionError(
                f"plugin {name!r} computes a distillation loss, and there is no teacher: set distillation.enabled=True "
                f"and {teacher.MODELS}.{teacher.SINGLE}.model_path=…, or leave the plugin out with ~plugins.{name}"
            )
        return
    for name, _ in plugins.of_stage("shape_logits"):
        raise CompositionError(
            f"distillation.enabled=True compares the teacher with logits that plugin {name!r} shapes for the student "
            f"alone (stage shape_logits): set distillation.enabled=False, or leave the plugin out with ~plugins.{name}"
        )
    for name in (name for stage in OF_THE_POLICY_LOSS for name, _ in plugins.of_stage(stage)):
        if not OmegaConf.select(config, f"{DISTILLATION}.use_task_rewards"):
            raise CompositionError(
                f"{DISTILLATION}.use_task_rewards=False leaves no policy loss for plugin {name!r}: set "
                f"{DISTILLATION}.use_task_rewards=true, or leave the plugin out with ~plugins.{name}"
            )
    for name, _ in plugins.of_stage("distillation_loss"):
        _check_heads(config, name)


def _check_heads(config: DictConfig, name: str) -> None:
    """A plugin computes the distillation loss: verl asks for it, from the teacher's top k, where the head is."""
    who = f"plugin {name!r} computes the distillation loss from what the output head reads, to make logits"
    check_logits(config, who)
    wanted = {f"{DISTILLATION}.loss_mode": "forward_kl_topk", f"{DISTILLATION}.use_policy_gradient": False}
    wanted |= {f"{section}.ulysses_sequence_parallel_size": 1 for section in (ACTOR, f"{ACTOR}.fsdp_config")}
    for key, right in wanted.items():
        if (chosen := OmegaConf.select(config, key)) not in (None, right):
            raise CompositionError(
                f"{key} is {chosen!r}, and plugin {name!r} computes the distillation loss itself, from whole rows and "
                f"the teacher's most probable tokens: set {key}={right}"
            )


def _check_shaping(config: DictConfig, plugins: Plugins) -> None:
    """Logits are shaped on all sides or on none: answers sampled from others would be another policy's."""
    key = "actor_rollout_ref.rollout.name"
    for name, _ in plugins.of_stage("shape_logits"):
        who = f"plugin {name!r} shapes logits (stage shape_logits)"
        check_logits(config, who)
        if (server := config.actor_rollout_ref.rollout.name) != "transformers":
            raise CompositionError(
                f"{who}, and {key}={server} would sample from unshaped ones: set {key}=transformers, this package's "
                f"server, or leave the plugin out with ~plugins.{name}"
            )


def check_logits(config: DictConfig, who: str) -> None:
    """Refuse, in the name of `who`, settings under which nobody sees the actor's logits.

    Raises:
        CompositionError: names the key and what would be right.
    """
    if config.actor_rollout_ref.model.get("use_fused_kernels"):
        raise CompositionError(
            f"{who}, and {MODEL}.use_fused_kernels=True never makes them: set {MODEL}.use_fused_kernels=False"
        )
    if (strategy := config.actor_rollout_ref.actor.strategy) not in FSDP:
        raise CompositionError(
            f"{who}, which are taken from verl's FSDP engine, and actor_rollout_ref.actor.strategy is {strategy!r}: "
            "choose model_engine=dp with the strategy fsdp2"
        )


def check_hidden(config: DictConfig, name: str) -> None:
    """Refuse, for plugin `name`, settings under which a rank does not see the states of whole responses.

    Raises:
        CompositionError: names the key and what would be right.
    """
    check_logits(config, f"plugin {name!r} needs hidden_states (batch.hidden)")
    key = "actor_rollout_ref.actor.ulysses_sequence_parallel_size"
    own = "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size"
    for one in (key, own):
        if (size := OmegaConf.select(config, one) or 1) > 1:
            raise CompositionError(
                f"plugin {name!r} needs hidden_states (batch.hidden), and with {one}={size} a rank has a part of each "
                f"sequence only: set {one}=1, or leave the plugin out with ~plugins.{name}"
            )


def _check_engines(config: DictConfig, defaults: DictConfig) -> None:
    """The engines of `model_engine` and the `strategy` keys, which verl reads in other places, must agree."""
    on_cpu = config.trainer.device == "cpu"
    wrong = {}
    for section, keys in ENGINE_KEYS.items():
        for key in (f"{section}.{key}" for key in keys):
            usual, chosen = OmegaConf.select(defaults, key), OmegaConf.select(config, key)
            fitting = ("fsdp2",) if on_cpu else FSDP if usual in FSDP else (usual,)
            if usual is not None and chosen not in fitting:
                wrong[key] = chosen, fitting[-1]
    if wrong:
        key, (chosen, _) = next(iter(wrong.items()))
        why = "PyTorch's first FSDP does not train on a CPU" if on_cpu else f"model_engine={config.model_engine}"
        mended = " ".join(f"{key}={fitting}" for key, (_, fitting) in wrong.items())
        raise CompositionError(f"{key} is {chosen!r}, which does not fit ({why}): set {mended}")


def has_critic(config: DictConfig) -> bool:
    """Whether verl trains a value model."""
    return config.algorithm.adv_estimator == "gae" if config.critic.enable is None else bool(config.critic.enable)


def _check_critic(config: DictConfig, defaults: DictConfig) -> None:
    if not has_critic(config) or OmegaConf.is_missing(config.critic.model, "path"):
        return
    if config.critic.model.path == defaults.critic.model.path:
        raise CompositionError(
            f"{CRITIC_MODEL} is {config.critic.model.path}, the example in verl's defaults, and a value model is "
            f"trained: set {CRITIC_MODEL}=…, or {ESTIMATOR} to one that needs none, such as grpo"
        )


def _check_lora(config: DictConfig) -> None:
    model = config.actor_rollout_ref.model
    if config.actor_rollout_ref.rollout.name != "transformers" or OmegaConf.select(model, "lora.merge"):
        return
    used = {"lora_rank": model.lora_rank, "lora.rank": OmegaConf.select(model, "lora.rank") or 0}
    used |= {"lora_adapter_path": model.get("lora_adapter_path")}
    if given := [f"{MODEL}.{key}={value}" for key, value in used.items() if value]:
        raise CompositionError(
            f"{given[0]}: the rollout server of the preset cpu takes whole weights, not adapters: set "
            f"{MODEL}.lora.merge=true"
        )


def _check_sglang(config: DictConfig) -> None:
    rollout = config.actor_rollout_ref.rollout
    if rollout.name == "sglang" and rollout.full_determinism:
        raise CompositionError(
            "actor_rollout_ref.rollout.full_determinism=True is for verl's vLLM servers only, and rollout.name is "
            "sglang: set it to False, or set actor_rollout_ref.rollout.name=vllm"
        )


def _check_filter(config: DictConfig, plugins: Plugins) -> None:
    """What groups are filtered by exists; verl's V1 trainer looks for it when the first groups have been rolled out."""
    section = config.algorithm.filter_groups
    if not (section and section.enable):
        return
    key, scoring = "algorithm.filter_groups.metric", [name for name, _ in plugins.of_stage("score_answer")]
    known = ("reward", *PARTS)
    if section.metric is None or (scoring == ["math_verify"] and section.metric not in known):
        hint = nearest(str(section.metric), known)
        raise CompositionError(
            f"{key} is {section.metric!r}, and groups are told apart by a number of the reward{hint}"
        )
    if section.max_num_gen_batches > 0:
        bound = "algorithm.filter_groups.max_num_gen_batches"
        raise CompositionError(
            f"{bound}={section.max_num_gen_batches} is not read by verl's V1 trainer, which draws until the batch is "
            f"full: set {bound}=0"
        )


def _check_profiling(config: DictConfig) -> None:
    """What verl's own command does before and after a training, and this package's does not."""
    if file := OmegaConf.select(config, "ray_kwargs.timeline_json_file"):
        raise CompositionError(
            f"ray_kwargs.timeline_json_file={file} is written by verl's own command only: leave it at null, and run "
            "`ray timeline` while the training runs"
        )
    steps: Iterable[int] | None = OmegaConf.select(config, "global_profiler.steps")
    if OmegaConf.select(config, "global_profiler.tool") == "nsys" and steps:
        raise CompositionError(
            "global_profiler.tool=nsys needs the task runner under Nsight in a Ray actor, and here it is the driver "
            "process: set global_profiler.tool=torch"
        )
