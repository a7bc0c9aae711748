"""Mode separate_async is composed with one override on the CPU, and what verl asserts is a sentence beforehand."""

from __future__ import annotations

import pytest

from verl_plugins.composition.compose import compose
from verl_plugins.composition.needs import check
from verl_plugins.errors import CompositionError

MODE = "trainer.v1.trainer_mode=separate_async"
P = "trainer.v1.separate_async.parameter_sync_step"
MINI = "actor_rollout_ref.actor.ppo_mini_batch_size"
SERVERS = "actor_rollout_ref.rollout.n_gpus_per_node"
GPUS = (
    "actor_rollout_ref.rollout.nnodes=1",
    f"{SERVERS}=2",
    "actor_rollout_ref.rollout.checkpoint_engine.backend=nccl",
    f"{P}=1",
    "data.train_batch_size=64",
    f"{MINI}=64",
    "actor_rollout_ref.model.path=somewhere",
    "data.train_files=a.parquet",
    "data.val_files=b.parquet",
)


def composed(*overrides: str, preset: str = "cpu"):
    found = compose("grpo", preset, [MODE, *overrides])
    check(found)
    return found.config


def test_the_mode_alone_is_enough_on_a_cpu():
    config = composed()
    assert config.actor_rollout_ref.hybrid_engine is False
    assert config.ray_kwargs.ray_init.num_gpus == 2, "one for the rank, one for the server"
    engine = config.actor_rollout_ref.rollout.checkpoint_engine
    assert (engine.backend, engine.custom_backend_module) == ("gloo", "verl_plugins.cpu.weights")


def test_ranks_and_servers_are_counted():
    config = composed("trainer.n_gpus_per_node=2", f"{SERVERS}=3")
    assert config.ray_kwargs.ray_init.num_gpus == 5


def test_what_is_asked_for_stays():
    config = composed("actor_rollout_ref.hybrid_engine=true", "ray_kwargs.ray_init.num_gpus=7")
    assert config.actor_rollout_ref.hybrid_engine is True
    assert config.ray_kwargs.ray_init.num_gpus == 7


@pytest.mark.parametrize("mode", ["sync", "colocate_async"])
def test_other_modes_are_as_before(mode):
    config = compose("grpo", "cpu", [f"trainer.v1.trainer_mode={mode}"]).config
    assert config.actor_rollout_ref.hybrid_engine is True
    assert config.ray_kwargs.ray_init.num_gpus == 1


def test_several_updates_a_step():
    config = composed(f"{P}=4", f"{MINI}=4")
    assert config.data.train_batch_size == 4 * config.actor_rollout_ref.actor.ppo_mini_batch_size


def test_on_gpus_it_is_composed_with_an_engine_for_them():
    config = composed(*GPUS, preset="1gpu")
    assert config.actor_rollout_ref.hybrid_engine is True


@pytest.mark.parametrize(
    ("preset", "overrides", "parts"),
    [
        ("cpu", [f"{P}=2"], [f"{P}=2", f"{MINI}=16", f"set {MINI}=8"]),
        ("cpu", [f"{P}=3"], [f"{P}=3", f"set {P}=1 {MINI}=16"]),
        ("cpu", [f"{MINI}=8"], [f"{MINI}=8", f"{P}=1", f"set {MINI}=16"]),
        ("cpu", [f"{SERVERS}=0"], [f"{SERVERS} is 0", "nnodes"]),
        ("cpu", ["ray_kwargs.ray_init.num_gpus=1"], ["num_gpus is 1", "num_gpus=2"]),
        ("cpu", ["actor_rollout_ref.rollout.checkpoint_engine.backend=naive"], ["'naive'", "backend=nccl"]),
        ("1gpu", [*GPUS, "actor_rollout_ref.rollout.checkpoint_engine.backend=naive"], ["'naive'", "backend=nccl"]),
        ("1gpu", [*GPUS, "actor_rollout_ref.rollout.nnodes=0"], ["actor_rollout_ref.rollout.nnodes is 0"]),
        (
            "1gpu",
            [*GPUS, "actor_rollout_ref.rollout.tensor_model_parallel_size=4"],
            ["tensor_model_parallel_size=4", "actor_rollout_ref.rollout.n_gpus_per_node", "=2"],
        ),
        (
            "1gpu",
            [*GPUS, "reward.reward_model.enable=true", "reward.reward_model.model_path=x"],
            ["reward.reward_model.enable_resource_pool=True"],
        ),
        ("cpu", ["actor_rollout_ref.rollout.full_determinism=true"], ["full_determinism", "separate_async"]),
    ],
)
def test_what_cannot_run_is_refused(preset, overrides, parts, sentence):
    with pytest.raises(CompositionError) as error:
        composed(*overrides, preset=preset)
    sentence(error.value, *parts)
