"""The mode `separate_async`: what a machine without GPUs needs for it, and what verl asserts minutes later."""

from __future__ import annotations

from collections.abc import Collection

from omegaconf import DictConfig, OmegaConf, open_dict

from verl_plugins.errors import CompositionError

MODE = "separate_async"
ROLLOUT = "actor_rollout_ref.rollout"
HYBRID = "actor_rollout_ref.hybrid_engine"
LOGICAL = "ray_kwargs.ray_init.num_gpus"
STEP = "trainer.v1.separate_async.parameter_sync_step"


def is_chosen(config: DictConfig) -> bool:
    """Whether the run is in this mode."""
    return config.trainer.v1.trainer_mode == MODE


def servers(config: DictConfig) -> int:
    """Devices of the servers beside the training, 0 in the other modes."""
    rollout = OmegaConf.select(config, ROLLOUT)
    return int(rollout.nnodes) * int(rollout.n_gpus_per_node) if is_chosen(config) else 0


def settle(config: DictConfig, given: Collection[str], asked: Collection[str]) -> None:
    """On a CPU: no servers beside the actor besides the separate ones, and a logical GPU of Ray's for each of those."""
    if not is_chosen(config) or config.trainer.device != "cpu":
        return
    with open_dict(config):
        if HYBRID not in given:
            OmegaConf.update(config, HYBRID, False)
        if LOGICAL not in asked and config.ray_kwargs.ray_init.get("num_gpus") is not None:
            config.ray_kwargs.ray_init.num_gpus = int(config.trainer.n_gpus_per_node) + servers(config)


def check(config: DictConfig) -> None:
    """Refuse what cannot be a run of this mode.

    Raises:
        CompositionError: names the key and a value that fits.
    """
    if not is_chosen(config):
        return
    _check_sizes(config)
    rollout = OmegaConf.select(config, ROLLOUT)
    for key in ("nnodes", "n_gpus_per_node"):
        if int(rollout.get(key) or 0) < 1:
            raise CompositionError(
                f"{ROLLOUT}.{key} is {rollout.get(key)}: in trainer.v1.trainer_mode={MODE} the rollout has machines of "
                f"its own, set {ROLLOUT}.nnodes and {ROLLOUT}.n_gpus_per_node to what they have"
            )
    if rollout.checkpoint_engine.backend == "naive":
        raise CompositionError(
            f"{ROLLOUT}.checkpoint_engine.backend is 'naive', which hands weights over inside one process, and in "
            f"trainer.v1.trainer_mode={MODE} the rollout has others: set {ROLLOUT}.checkpoint_engine.backend=nccl"
        )
    model = config.reward.reward_model
    if model.enable and not model.enable_resource_pool:
        raise CompositionError(
            f"reward.reward_model.enable_resource_pool is False: in trainer.v1.trainer_mode={MODE} the rollout never "
            "makes room for a reward model, set reward.reward_model.enable_resource_pool=True"
        )


def _check_sizes(config: DictConfig) -> None:
    updates, prompts = int(OmegaConf.select(config, STEP)), int(config.data.train_batch_size)
    key, size = "actor_rollout_ref.actor.ppo_mini_batch_size", int(config.actor_rollout_ref.actor.ppo_mini_batch_size)
    if updates * size == prompts:
        return
    fitting = f"{key}={prompts // updates}" if updates and not prompts % updates else f"{STEP}=1 {key}={prompts}"
    raise CompositionError(
        f"data.train_batch_size={prompts} is not {STEP}={updates} times {key}={size}, as many updates as a step of "
        f"trainer.v1.trainer_mode={MODE} has: set {fitting}"
    )
