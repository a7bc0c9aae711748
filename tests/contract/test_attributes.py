"""Attributes and calls of verl's objects that ours rely on without importing them: a rename upstream shows at once."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
from verl.workers.rollout.llm_server import LLMServerManager

from verl_plugins.bridge.actor import PluginActorWorker
from verl_plugins.bridge.critic import PluginCriticWorker, ValueHeadsEngine
from verl_plugins.bridge.loops import SingleTurn, ToolLoop
from verl_plugins.bridge.reward import PluginRewardManager
from verl_plugins.bridge.rollout import PluginAgentLoopManager, PluginAgentLoopWorker
from verl_plugins.bridge.runner import TRAINERS, PluginTaskRunner
from verl_plugins.cpu.client import SingleServerClient, SingleServerFullyAsyncClient
from verl_plugins.cpu.rollout import ServerAdapter, TransformersReplica

DERIVED = [
    *TRAINERS.values(),
    PluginActorWorker,
    PluginCriticWorker,
    ValueHeadsEngine,
    PluginRewardManager,
    PluginAgentLoopManager,
    PluginAgentLoopWorker,
    SingleTurn,
    ToolLoop,
    PluginTaskRunner,
    SingleServerClient,
    SingleServerFullyAsyncClient,
    ServerAdapter,
    TransformersReplica,
]
"""Our classes that extend verl's."""
TRAINER, AGENT_LOOP = "verl.trainer.ppo.v1.trainer_base:PPOTrainer", "verl.experimental.agent_loop.agent_loop"
WORKERS, ENGINE = "verl.workers.engine_workers", "verl.workers.engine.fsdp.transformer_impl:FSDPEngine"
ATTRIBUTES: list[tuple[str, str]] = [
    # what we read of, or set on, objects of verl's that are not ours: (module:class, names)
    (TRAINER, "actor_rollout_wg critic_wg llm_server_manager checkpoint_manager replay_buffer role_worker_mapping"),
    (TRAINER, "train_dataloader train_dataloader_it train_dataset val_dataloader tokenizer processor trainer_mode"),
    (TRAINER, "use_critic critic_wg role_worker_mapping"),
    (TRAINER, "global_steps total_training_steps timing_raw config"),
    ("verl.single_controller.base.worker_group:WorkerGroup", "_dispatch_info"),
    ("verl.single_controller.base.worker:Worker", "_query_dispatch_info"),
    ("verl.checkpoint_engine:CheckpointEngineManager", "abort_replicas sleep_replicas resume_generation_replicas"),
    ("verl.trainer.ppo.v1.replay_buffer:ReplayBuffer", "poll_interval"),
    (f"{AGENT_LOOP}:AgentLoopBase", "continuous_token_builder ct_build_initial_tokens _cap_text_prompt_length"),
    (f"{AGENT_LOOP}:AgentLoopManager", "agent_loop_workers_class"),
    (f"{WORKERS}:ActorRolloutRefWorker", "actor ref config"),
    (f"{WORKERS}:TrainingWorker", "engine loss_fn train_mini_batch train_batch"),
    (ENGINE, "model_config get_data_parallel_group"),
    (ENGINE, "module optimizer optimizer_step train_batch infer_batch get_data_parallel_group"),
    (ENGINE, "ulysses_sequence_parallel_size ulysses_parallel_group"),
    (f"{ENGINE}WithLMHead", "prepare_model_outputs"),
    ("verl.workers.config:ActorConfig", "global_batch_info policy_loss loss_agg_mode clip_ratio_low"),
    ("verl.utils.metric:Metric", "aggregation values extend"),
]
CALLS: list[tuple[str, tuple[Any, ...], tuple[str, ...]]] = [
    # calls of their methods: positional arguments by number, names of the others
    ("verl.single_controller.base.worker:Worker._query_dispatch_info", (1,), ()),
    (f"{WORKERS}:TrainingWorker.train_mini_batch", (), ("data",)),
    (f"{ENGINE}.train_batch", (1,), ("loss_function",)),
    (f"{ENGINE}.optimizer_step", (), ()),
    (f"{ENGINE}.infer_batch", (1,), ("loss_function",)),
    ("verl.checkpoint_engine:CheckpointEngineManager.update_weights", (1,), ()),
    ("verl.checkpoint_engine:CheckpointEngineManager.abort_replicas", (), ()),
    ("verl.utils.tensordict_utils:assign_non_tensor", (1,), ("metrics",)),
    ("verl.utils.metric:Metric.extend", (1,), ()),
]


def found(path: str) -> Any:
    module, _, name = path.partition(":")
    cls, *member = name.split(".")
    plain = getattr(importlib.import_module(module), cls)
    plain = getattr(getattr(plain, "__ray_metadata__", None), "modified_class", plain)
    return functools.reduce(getattr, member, plain)


def tree(subject: Any) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(subject)))


def own(node: ast.AST, context: type) -> str | None:
    """X of `self.X`, or of an assignment in the class."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr if isinstance(node.ctx, context) else None
    return None


def defined(cls: type) -> set[str]:
    """Names that the source of a class and of its bases defines, sets on `self`, or annotates."""
    names = {"__dict__", "__class__"}
    for base in cls.__mro__[:-1]:
        names |= set(vars(base)) | set(vars(base).get("__annotations__", {}))
        try:
            nodes = list(ast.walk(tree(base)))
        except (OSError, TypeError):
            continue
        names |= {name for node in nodes if (name := own(node, ast.Store))}
    return names


def ours(cls: type) -> Iterator[type]:
    return (base for base in cls.__mro__ if base.__module__.startswith("verl_plugins."))


@pytest.mark.parametrize("cls", DERIVED, ids=lambda cls: cls.__name__)
def test_what_ours_read_of_themselves_is_there(cls: type) -> None:
    read = {name for base in ours(cls) for node in ast.walk(tree(base)) if (name := own(node, ast.Load))}
    assert read - defined(cls) == set()


def super_calls(cls: type) -> Iterator[tuple[str, ast.Call]]:
    for base in ours(cls):
        for node in ast.walk(tree(base)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value
                if isinstance(owner, ast.Call) and getattr(owner.func, "id", "") == "super":
                    yield node.func.attr, node


@pytest.mark.parametrize("cls", DERIVED, ids=lambda cls: cls.__name__)
def test_calls_of_what_ours_override_fit(cls: type) -> None:
    theirs = next(base for base in cls.__mro__ if not base.__module__.startswith("verl_plugins."))
    for name, call in super_calls(cls):
        method = inspect.unwrap(getattr(theirs, name))
        if any(isinstance(argument, ast.Starred) for argument in call.args) or name == "__init__":
            continue
        given = {word.arg: None for word in call.keywords if word.arg}
        bound = () if isinstance(inspect.getattr_static(theirs, name), (classmethod, staticmethod)) else (None,)
        inspect.signature(method).bind(*bound, *call.args, **given)


@pytest.mark.parametrize(("path", "names"), ATTRIBUTES, ids=[path.split(":")[1] for path, _ in ATTRIBUTES])
def test_attributes(path: str, names: str) -> None:
    assert set(names.split()) - defined(found(path)) == set()


@pytest.mark.parametrize(("path", "positional", "named"), CALLS, ids=[path.split(":")[1] for path, *_ in CALLS])
def test_calls(path: str, positional: tuple[Any, ...], named: tuple[str, ...]) -> None:
    bound = (None,) if "." in path.partition(":")[2] else ()
    inspect.signature(inspect.unwrap(found(path))).bind(*bound, *positional, **dict.fromkeys(named))


def test_the_server_manager_keeps_its_servers() -> None:
    assert "server_handles" in defined(LLMServerManager)


def test_a_renamed_attribute_would_be_noticed() -> None:
    assert "attribute_of_another_version" not in defined(PluginTaskRunner)
    assert {"config", "init_agent_loop_manager"} <= defined(PluginTaskRunner)
