"""What `bridge/` and `cpu/` rely on in verl, TransferQueue and Ray: an upgrade shows at once what moved."""

from __future__ import annotations

import ast
import asyncio
import functools
import importlib
import inspect
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transfer_queue as tq
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager
from verl.trainer.ppo.core_algos import agg_loss, compute_policy_loss_vanilla
from verl.trainer.ppo.v1 import trainer_base
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ
from verl.workers.config import ActorConfig

import verl_plugins
from verl_plugins.bridge import RUN_VARIABLE, rows
from verl_plugins.bridge.defaults import clipped_loss
from verl_plugins.bridge.runner import TRAINERS
from verl_plugins.bridge.sending import FORWARD_FIELDS, LOSS_FIELDS
from verl_plugins.composition.compose import compose
from verl_plugins.cpu.model import make_tokenizer
from verl_plugins.cpu.registration import ROLLOUT_NAME
from verl_plugins.tokens import Tokens

PACKAGE = Path(verl_plugins.__file__).parent

TRAINER, AGENT, LOOP = "verl.trainer.ppo.v1.trainer_base", "verl.trainer.ppo.v1.agent_loop_tq", "verl.experimental"
AGENT_LOOP, SERVER = f"{LOOP}.agent_loop.agent_loop", "verl.workers.rollout.llm_server"
PADDING, DICTS = "verl.workers.utils.padding", "verl.utils.tensordict_utils"
PLATFORM, REPLICA = "verl.plugin.platform.platform_manager", "verl.workers.rollout.replica"
DISTILLATION, TEACHER = "verl.trainer.distillation.losses", f"{LOOP}.teacher_loop.teacher_manager"
ENGINE, WORKERS = "verl.workers.engine.fsdp.transformer_impl", "verl.workers.engine_workers"

SYMBOLS: list[tuple[str, str, str | None]] = [
    # module, attribute, parameters we pass or override, in verl's order (None: not called, or not a function)
    ("verl", "DataProto", None),
    ("verl.protocol", "DataProto", "batch non_tensor_batch meta_info"),
    ("verl.protocol", "DataProtoFuture.get", "self"),
    # the task runner and the trainers
    ("verl.trainer.main_ppo", "TaskRunnerV1.__ray_metadata__.modified_class.run", "self config"),
    ("verl.trainer.main_ppo", "TaskRunnerV1.__ray_metadata__.modified_class.init_agent_loop_manager", "self"),
    ("verl.trainer.constants_ppo", "get_ppo_ray_runtime_env", "config"),
    ("verl.trainer.ppo.utils", "Role.Actor", None),
    ("verl.trainer.ppo.utils", "Role.ActorRollout", None),
    ("verl.trainer.ppo.utils", "Role.ActorRolloutRef", None),
    ("verl.trainer.ppo.utils", "Role.Critic", None),
    ("verl.trainer.ppo.utils", "create_rl_sampler", "data_config dataset"),
    ("verl.trainer.ppo.metric_utils", "bootstrap_metric", "data subset_size reduce_fns n_bootstrap seed"),
    ("verl.trainer.ppo.metric_utils", "calc_maj_val", "data vote_key val_key"),
    ("verl.utils.debug", "marked_timer", "name timing_raw"),
    ("verl.trainer.ppo.utils", "need_critic", "config"),
    ("verl.trainer.ppo.utils", "need_reference_policy", "config"),
    ("verl.trainer.ppo.v1.trainer_sync", "PPOTrainerSync", "config"),
    ("verl.trainer.ppo.v1.trainer_colocate_async", "PPOTrainerColocateAsync", "config"),
    (TRAINER, "TRAINER_REGISTRY", None),
    (TRAINER, "get_seqlen_balanced_partitions", "seqlen_list k_partitions equal_size"),
    (TRAINER, "compute_advantage_for_multi_trajectories", "data batch_keys adv_estimator"),
    (TRAINER, "PPOTrainer.fit", "self agent_loop_manager"),
    (TRAINER, "PPOTrainer._build_replay_buffer", "self"),
    (TRAINER, "PPOTrainer._init_dataloader", "self"),
    (TRAINER, "PPOTrainer._init_resource_pool_mgr", "self"),
    (TRAINER, "PPOTrainer._load_checkpoint", "self"),
    (TRAINER, "PPOTrainer._save_checkpoint", "self"),
    (TRAINER, "PPOTrainer._next_train_batch", "self num_prompts"),
    (TRAINER, "PPOTrainer._balance_batch", "self batch metrics logging_prefix keep_minibatch"),
    (TRAINER, "PPOTrainer._compute_old_log_prob", "self batch metrics"),
    (TRAINER, "PPOTrainer._compute_advantage", "self batch metrics"),
    (TRAINER, "PPOTrainer._update_actor", "self batch metrics"),
    (TRAINER, "PPOTrainer._update_critic", "self batch metrics"),
    (TRAINER, "PPOTrainer._compute_values", "self batch metrics"),
    (TRAINER, "response_from_nested", "tensor response_mask"),
    (TRAINER, "PPOTrainer._compute_metrics", "self batch metrics timing_raw global_steps epoch"),
    (TRAINER, "PPOTrainer._validate", "self"),
    (TRAINER, "PPOTrainer.get_llm_client", "self"),
    (TRAINER, "PPOTrainer.get_teacher_client", "self"),
    (TRAINER, "PPOTrainer.get_reward_handles", "self"),
    (TRAINER, "PPOTrainer.on_init_end", "self"),
    (TRAINER, "PPOTrainer.on_sample_end", "self"),
    (TRAINER, "PPOTrainer.on_step_end", "self"),
    ("verl.trainer.ppo.v1.replay_buffer", "ReplayBuffer", "trainer_mode poll_interval"),
    ("verl.checkpoint_engine", "CheckpointEngineManager.update_weights", "self global_steps"),
    ("verl.checkpoint_engine", "CheckpointEngineManager.sleep_replicas", "self"),
    ("verl.checkpoint_engine", "CheckpointEngineManager.resume_generation_replicas", "self"),
    # the actor
    ("verl.single_controller.base.decorator", "register", "dispatch_mode"),
    ("verl.single_controller.base.decorator", "Dispatch.ONE_TO_ALL", None),
    (WORKERS, "ActorRolloutRefWorker.init_model", "self"),
    (WORKERS, "ActorRolloutRefWorker.compute_log_prob", "self data"),
    (WORKERS, "ActorRolloutRefWorker.update_actor", "self data"),
    (WORKERS, "TrainingWorker.set_loss_fn", "self loss_fn"),
    (ENGINE, "FSDPEngine.optimizer_step", "self"),
    (ENGINE, "FSDPEngine.train_batch", "self data loss_function"),
    (ENGINE, "FSDPEngine.infer_batch", "self data loss_function"),
    (
        ENGINE,
        "FSDPEngineWithLMHead.prepare_model_outputs",
        "self output output_args micro_batch logits_processor_func",
    ),
    (ENGINE, "FSDPEngine.forward_backward_batch", "self data loss_function forward_only"),
    (ENGINE, "FSDPEngine.get_data_parallel_group", "self"),
    (ENGINE, "FSDPEngine._gather_and_unpad_packed", "self tensor pad_size"),
    (ENGINE, "CPUOffloadPolicy", "pin_memory"),
    ("verl.utils.fsdp_utils", "FSDPModule", None),
    ("verl.utils.fsdp_utils", "fsdp_version", "model"),
    ("verl.utils.device", "get_device_id", ""),
    (DICTS, "index_select_tensor_dict", "batch indices"),
    ("verl.trainer.ppo.core_algos", "POLICY_LOSS_REGISTRY", None),
    ("verl.trainer.ppo.core_algos", "agg_loss", "loss_mat loss_mask loss_agg_mode"),
    (
        "verl.trainer.ppo.core_algos",
        "compute_policy_loss_vanilla",
        "old_log_prob log_prob advantages response_mask loss_agg_mode config rollout_is_weights",
    ),
    ("verl.workers.utils.losses", "ppo_loss", "config model_output data dp_group"),
    # the critic
    (WORKERS, "TrainingWorker", "config"),
    (WORKERS, "TrainingWorker.train_batch", "self data"),
    (WORKERS, "TrainingWorker.infer_batch", "self data"),
    (ENGINE, "FSDPEngineWithValueHead._build_module", "self"),
    ("verl.utils.model", "load_valuehead_model", "local_path torch_dtype model_config trust_remote_code"),
    ("verl.utils.device", "get_vendor", ""),
    ("verl.utils.torch_functional", "masked_mean", "values mask"),
    ("verl.workers.config", "CriticConfig", None),
    ("verl.workers.utils.losses", "value_loss", "config model_output data dp_group"),
    ("verl.utils.metric", "AggregationType.SUM", None),
    ("verl.utils.metric", "Metric", "aggregation value"),
    ("verl.workers.config", "ActorConfig", "strategy clip_ratio clip_ratio_low clip_ratio_high policy_loss"),
    ("verl.workers.config", "HFModelConfig", None),
    ("verl.workers.config", "RolloutConfig", None),
    (PADDING, "response_from_nested", "tensor response_mask"),
    (PADDING, "no_padding_2_padding", "tensor data"),
    (PADDING, "response_to_nested", "tensor response_mask"),
    # agent loop and reward
    (AGENT, "logger", None),
    (AGENT, "apply_greedy_sampling_params", "params"),
    (AGENT, "AgentLoopManagerTQ", "args kwargs"),
    (AGENT, "AgentLoopManagerTQ.create", None),
    (AGENT, "AgentLoopWorkerTQ.__ray_metadata__.modified_class._run_prompt", "self prompt sampling_params trajectory"),
    (AGENT, "AgentLoopWorkerTQ.__ray_metadata__.modified_class._agent_loop_postprocess", "self output validate kwargs"),
    (AGENT_LOOP, "AgentLoopWorker", "config llm_client teacher_client reward_loop_worker_handles"),
    (AGENT_LOOP, "AgentLoopWorker._run_agent_loop", "self sampling_params trajectory agent_name trace kwargs"),
    (AGENT_LOOP, "AgentLoopWorker._compute_score", "self outputs kwargs"),
    (
        AGENT_LOOP,
        "AgentLoopWorker._compute_teacher_logprobs",
        "self output prompt_ids response_ids validate sample_kwargs",
    ),
    (AGENT_LOOP, "AgentLoopWorker._compute_multi_modal_inputs", "self output input_ids"),
    (AGENT_LOOP, "AgentLoopWorker._compute_position_ids", "self input_ids attention_mask multi_modal_inputs"),
    (AGENT_LOOP, "AgentLoopOutput.as_dict", "self"),
    (AGENT_LOOP, "DictConfigWrap", "config"),
    (AGENT_LOOP, "AgentLoopBase._cap_text_prompt_length", "self prompt_ids"),
    (AGENT_LOOP, "_agent_loop_registry", None),
    (AGENT_LOOP, "register", "agent_name"),
    (f"{LOOP}.agent_loop.tool_agent_loop", "AgentState.TERMINATED", None),
    (f"{LOOP}.agent_loop.tool_agent_loop", "ToolAgentLoop._call_tool", "self tool_call tools_kwargs agent_data"),
    (f"{LOOP}.agent_loop.tool_agent_loop", "ToolAgentLoop._handle_generating_state", "self agent_data sampling_params"),
    (f"{LOOP}.agent_loop.tool_agent_loop", "ToolAgentLoop._handle_processing_tools_state", "self agent_data"),
    (AGENT_LOOP, "ToolListWrap", "tools"),
    (f"{LOOP}.agent_loop.single_turn_agent_loop", "SingleTurnAgentLoop.run", "self sampling_params kwargs"),
    (f"{LOOP}.reward_loop.reward_manager.naive", "NaiveRewardManager", "config tokenizer compute_score"),
    (f"{LOOP}.reward_loop.reward_manager.naive", "NaiveRewardManager.run_single", "self data"),
    (f"{LOOP}.reward_loop", "RewardLoopWorker.compute_score_batch", "self data"),
    # tables of data
    (DICTS, "get_tensordict", "tensor_dict"),
    (DICTS, "get_non_tensor_data", "data key default"),
    (DICTS, "assign_non_tensor", "tensor_dict kwargs"),
    (DICTS, "assign_non_tensor_data", "tensor_dict key val"),
    (DICTS, "list_of_dict_to_tensordict", "list_of_dicts"),
    ("verl.utils.dataset.rl_dataset", "collate_fn", "data_list"),
    ("transfer_queue", "kv_list", "partition_id"),
    ("transfer_queue", "kv_clear", "keys partition_id"),
    ("transfer_queue", "kv_batch_get", "keys partition_id select_fields"),
    ("transfer_queue", "kv_batch_put", "keys partition_id fields"),
    ("transfer_queue", "async_kv_batch_put", "keys partition_id fields tags"),
    ("transfer_queue", "KVBatchMeta", "keys tags partition_id fields extra_info"),
    ("transfer_queue", "KVBatchMeta.select_keys", "self keys_to_select"),
    ("transfer_queue", "KVBatchMeta.reorder", "self indexes"),
    # settings, platform and rollout server
    ("verl.utils.config", "omega_conf_to_dataclass", "config"),
    ("verl.utils.config", "validate_config", "config use_reference_policy use_critic"),
    ("verl.utils.device", "auto_set_device", "config"),
    ("verl.utils.device", "get_device_name", ""),
    ("verl.utils.torch_dtypes", "PrecisionType.to_dtype", "precision"),
    ("verl.utils.distributed", "initialize_global_process_group_ray", "timeout_second backend"),
    ("verl.plugin.platform", "get_platform", ""),
    ("verl.plugin.platform.platform_base", "PlatformBase", None),
    (PLATFORM, "PlatformRegistry.register", "platform"),
    (PLATFORM, "set_platform", "platform"),
    # separate_async
    ("verl.trainer.ppo.v1", "trainer_separate_async.logger", None),
    ("verl.trainer.ppo.v1.trainer_separate_async", "PPOTrainerSeparateAsync._setup", "self"),
    ("verl.trainer.ppo.v1.trainer_separate_async", "PPOTrainerSeparateAsync._init_resource_pool_mgr", "self"),
    ("verl.experimental.separation.engine_workers", "DetachActorWorker.copy_handler", None),
    ("verl.checkpoint_engine.base", "CheckpointEngineRegistry.register", "backend"),
    ("verl.checkpoint_engine.base", "CheckpointEngine.prepare", "self"),
    ("verl.checkpoint_engine.base", "CheckpointEngine.build_topology", "rollout_world_size metadata"),
    ("verl.checkpoint_engine.base", "CheckpointEngine.init_process_group", "self"),
    ("verl.checkpoint_engine.base", "CheckpointEngine.finalize", "self"),
    ("verl.checkpoint_engine.base", "CheckpointEngine.send_weights", "self weights global_steps"),
    ("verl.checkpoint_engine.base", "CheckpointEngine.receive_weights", "self global_steps"),
    ("verl.workers.rollout.utils", "ensure_async_iterator", "iterable"),
    # the tool of the preset lookup
    ("verl.experimental.agent_loop.tool_parser", "ToolParser.register", "name"),
    ("verl.experimental.agent_loop.tool_parser", "ToolParser.extract_tool_calls", "self responses_ids tools"),
    ("verl.experimental.agent_loop.tool_parser", "FunctionCall", None),
    ("verl.tools.base_tool", "BaseTool.create", "self instance_id kwargs"),
    ("verl.tools.base_tool", "BaseTool.execute", "self instance_id parameters kwargs"),
    ("verl.tools.base_tool", "BaseTool.release", "self instance_id kwargs"),
    ("verl.tools.schemas", "ToolResponse", None),
    # the engine of a CPU
    ("verl.workers.engine.base", "EngineRegistry._engines", None),
    ("verl.workers.engine.base", "EngineRegistry.register", "model_type backend device vendor"),
    ("verl.workers.engine.fsdp.transformer_impl", "FSDPEngineWithLMHead.prepare_model_inputs", "self micro_batch"),
    (
        "verl.workers.engine.fsdp.transformer_impl",
        "FSDPEngineWithLMHead.prepare_model_outputs",
        "self output output_args micro_batch logits_processor_func",
    ),
    ("verl.workers.rollout.base", "_ROLLOUT_REGISTRY", None),
    ("verl.workers.rollout.base", "BaseRollout", "config model_config device_mesh"),
    ("verl.workers.rollout.base", "BaseRollout.resume", "self tags"),
    ("verl.workers.rollout.base", "BaseRollout.release", "self"),
    ("verl.workers.rollout.base", "BaseRollout.update_weights", "self weights kwargs"),
    (REPLICA, "RolloutReplica", "replica_rank config model_config"),
    (REPLICA, "RolloutReplica.launch_servers", "self"),
    (REPLICA, "RolloutReplica.max_concurrency", None),
    (REPLICA, "RolloutReplicaRegistry.register", "name loader"),
    (REPLICA, "TokenOutput", "token_ids log_probs stop_reason extra_fields"),
    (SERVER, "LLMServerManager.get_client", "self client_cls kwargs"),
    (SERVER, "LLMServerClient", "config load_balancer_handle"),
    (SERVER, "LLMServerClient.generate", "self request_id prompt_ids sampling_params"),
    (SERVER, "LLMServerClient._acquire_server", "self request_id extra"),
    (SERVER, "LLMServerClient._release_server", "self server_id request_id"),
    (SERVER, "FullyAsyncLLMServerClient", "config load_balancer_handle"),
    # Ray
    ("ray", "init", "address num_cpus num_gpus include_dashboard runtime_env"),
    ("ray", "get_actor", "name"),
    # a teacher
    ("verl.trainer.distillation", "distillation_ppo_loss", "config distillation_config model_output data dp_group"),
    (DISTILLATION, "compute_topk_loss", "config distillation_config data student_logits data_format"),
    (DISTILLATION, "distillation_loss", "config distillation_config model_output data"),
    ("verl.workers.config", "DistillationConfig", None),
    ("verl.workers.config", "DistillationTeacherModelConfig._validate_topk_logprobs", "self use_topk topk"),
    (ENGINE, "FSDPEngineWithLMHead.forward_step", "self micro_batch loss_function forward_only"),
    (REPLICA, "RolloutMode", None),
    (REPLICA, "RolloutReplica.init_colocated", "self resource_pool"),
    ("ray", "remote", None),
    ("ray", "is_initialized", ""),
    ("ray", "get_runtime_context", ""),
    ("ray.util.scheduling_strategies", "NodeAffinitySchedulingStrategy", "node_id soft"),
    ("ray._raylet", "ActorClassID.from_random", None),
    ("ray._raylet", "ActorClassID.size", None),
    ("ray._raylet", "Config.initialize", None),
    ("ray._raylet", "NodeID.from_random", None),
    ("ray.actor", "ActorClassID", None),
    ("ray._private.state", "state.actor_table", "actor_id job_id actor_state_name"),
    ("ray.core.generated", "common_pb2.ActorDiedErrorContext", None),
    ("verl.utils.model", "load_valuehead_model", None),
    ("ray.scripts.scripts", "start", None),
]

FIELDS: list[tuple[str, str, str]] = [
    # module, function, names of queue fields, tags and settings of a batch that its source must mention
    (TRAINER, "PPOTrainer._submit_batch_to_rollout", "uid is_prompt"),
    (TRAINER, "PPOTrainer._compute_old_log_prob", "temperature log_probs old_log_probs entropy response_mask"),
    (TRAINER, "PPOTrainer._compute_ref_log_prob", "log_probs ref_log_prob"),
    (TRAINER, "PPOTrainer._compute_advantage", "rm_scores token_level_rewards advantages returns rollout_is_weights"),
    (TRAINER, "PPOTrainer._update_actor", "mini_batch_size temperature calculate_entropy"),
    (TRAINER, "PPOTrainer._compute_metrics", "prompts responses num_turns min_global_steps max_global_steps"),
    (TRAINER, "PPOTrainer._validate", "rm_scores reward_model data_source extra_fields reward_extra_info"),
    (TRAINER, "PPOTrainer._balance_batch", "seq_len"),
    (TRAINER, "PPOTrainer._save_checkpoint", "global_step_ latest_checkpointed_iteration.txt data.pt w"),
    (AGENT, "AgentLoopWorkerTQ.__ray_metadata__.modified_class._run_prompt", "__rollout_n__ __do_sample__ finished"),
    (AGENT, "AgentLoopWorkerTQ.__ray_metadata__.modified_class.generate_sequences", "validate global_steps index"),
    ("verl.workers.utils.losses", "ppo_loss", "old_log_probs advantages response_mask rollout_is_weights loss_mode"),
    (PADDING, "no_padding_2_padding", "prompts responses"),
    (DISTILLATION, "compute_topk_loss", "teacher_logprobs teacher_ids"),
    (DISTILLATION, "compute_forward_kl_topk", "distillation_losses student_mass teacher_mass"),
    (TEACHER, "_get_teacher_sampling_params", "prompt_logprobs"),
    (TEACHER, "AsyncTeacherLLMServerManager.compute_teacher_logprobs_single", "prompt_ids prompt_logprobs"),
    (ENGINE, "FSDPEngineWithLMHead.prepare_model_inputs", "temperature temperature_rmpad use_remove_padding"),
    (ENGINE, "FSDPEngine.forward_backward_batch", "loss_mask"),
    ("verl.workers.engine.utils", "prepare_micro_batches", "use_dynamic_bsz micro_batch_size_per_gpu"),
    (f"{LOOP}.reward_loop.reward_manager.naive", "NaiveRewardManager.run_single", "responses attention_mask acc"),
]

SETTINGS = [
    "plugins",
    "actor_rollout_ref.actor.calculate_entropy",
    "actor_rollout_ref.actor.clip_ratio_c",
    "actor_rollout_ref.actor.kl_loss_coef",
    "actor_rollout_ref.actor.loss_agg_mode",
    "actor_rollout_ref.actor.policy_loss.loss_mode",
    "actor_rollout_ref.actor.use_kl_loss",
    "actor_rollout_ref.model.path",
    "actor_rollout_ref.rollout.calculate_log_probs",
    "actor_rollout_ref.rollout.checkpoint_engine",
    "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes",
    "actor_rollout_ref.rollout.dtype",
    "actor_rollout_ref.rollout.full_determinism",
    "actor_rollout_ref.rollout.load_format",
    "actor_rollout_ref.rollout.max_model_len",
    "actor_rollout_ref.rollout.max_num_seqs",
    "actor_rollout_ref.rollout.n",
    "actor_rollout_ref.rollout.name",
    "actor_rollout_ref.rollout.response_length",
    "actor_rollout_ref.rollout.seed",
    "actor_rollout_ref.rollout.temperature",
    "actor_rollout_ref.rollout.tensor_model_parallel_size",
    "actor_rollout_ref.rollout.top_k",
    "actor_rollout_ref.rollout.top_p",
    "actor_rollout_ref.rollout.val_kwargs.n",
    "algorithm.rollout_correction.bypass_mode",
    "algorithm.use_kl_in_reward",
    "data.gen_batch_size",
    "data.max_response_length",
    "data.seed",
    "data.train_batch_size",
    "data.train_files",
    "data.val_files",
    "ray_kwargs.ray_init",
    "reward.reward_manager.module.path",
    "reward.reward_manager.name",
    "reward.reward_manager.source",
    "reward.reward_model.enable",
    "trainer.default_local_dir",
    "trainer.device",
    "trainer.nnodes",
    "trainer.resume_from_path",
    "trainer.resume_mode",
    "trainer.use_v1",
    "trainer.v1.colocate_async",
    "trainer.v1.sync",
    "trainer.v1.trainer_mode",
]


def attribute(module: str, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), importlib.import_module(module))


def tree_of(subject: Any) -> ast.Module:
    return ast.parse(textwrap.dedent(inspect.getsource(subject)))


def strings(tree: ast.AST) -> set[str]:
    """All string constants, parts of formatted ones included."""
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


class TestSymbols:
    """Every name of verl, TransferQueue and Ray that we use exists and takes what we give it."""

    @pytest.mark.parametrize(("module", "path", "parameters"), SYMBOLS, ids=[f"{m}:{p}" for m, p, _ in SYMBOLS])
    def test_symbol(self, module: str, path: str, parameters: str | None) -> None:
        found = attribute(module, path)
        if parameters is None:
            return
        expected, taken = parameters.split(), list(inspect.signature(found).parameters)
        assert set(expected) <= set(taken), f"{module}.{path} takes {taken}"
        assert [name for name in taken if name in expected] == expected

    @pytest.mark.parametrize(("module", "path", "names"), FIELDS, ids=[path for _, path, _ in FIELDS])
    def test_fields(self, module: str, path: str, names: str) -> None:
        mentioned = strings(tree_of(attribute(module, path)))
        assert set(names.split()) <= mentioned

    def test_settings(self) -> None:
        from omegaconf import OmegaConf

        config = compose("grpo", "1gpu", ()).config

        def exists(key: str) -> bool:
            parent, _, leaf = key.rpartition(".")
            section = OmegaConf.select(config, parent) if parent else config
            return section is not None and leaf in list(section)

        assert [key for key in SETTINGS if not exists(key)] == []

    def test_every_import_of_ours_is_in_the_table(self) -> None:
        """The table cannot fall behind the code."""
        known = {(module, path.split(".")[0]) for module, path, _ in SYMBOLS}
        known |= {(module.rpartition(".")[0], module.rpartition(".")[2]) for module, _, _ in SYMBOLS}
        missing = set()
        for file in [*(PACKAGE / "bridge").glob("*.py"), *(PACKAGE / "cpu").glob("*.py")]:
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FOREIGN:
                    missing |= {(node.module, alias.name) for alias in node.names} - known
        assert missing == set()

    def test_workers_read_no_field_that_they_are_not_sent(self) -> None:
        """Columns other than these stay in the queue when a batch goes to the actor."""
        read = subscripts(tree_of(attribute(ENGINE, "FSDPEngineWithLMHead")), {"micro_batch"})
        read |= subscripts(tree_of(attribute("verl.workers.utils.losses", "ppo_loss")), {"data"})
        read |= subscripts(tree_of(attribute(PADDING, "no_padding_2_padding")), {"data"})
        added_by_verl = {"temperature", "dp_size", "batch_num_tokens", "global_batch_size"}
        only_of_padded_tables = {"attention_mask"}
        assert read - added_by_verl - only_of_padded_tables <= {*FORWARD_FIELDS, *LOSS_FIELDS}


FOREIGN = ("verl", "ray", "transfer_queue")


def subscripts(tree: ast.AST, names: set[str]) -> set[str]:
    """Literal keys with which variables of these names are indexed or asked by `get`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in names:
            found |= strings(node.slice)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            owner = node.func.value
            if isinstance(owner, ast.Name) and owner.id in names and node.args:
                found |= strings(node.args[0])
    return found


class TestMode:
    """verl compares `trainer_mode` with "sync" at six places, and our trainers keep verl's names."""

    BRANCHES = {
        "_build_replay_buffer": "an asynchronous replay buffer unless sync",
        "_init_dataloader": "prompts are fetched one by one (gen_batch_size 1) unless sync",
        "_load_checkpoint": "the queue is restored unless sync",
        "_reissue_inflight_prompts": "nothing is in flight after a restart in sync",
        "_save_checkpoint": "the queue is saved unless sync",
        "_submit_batch_to_rollout": "prompts are kept in the queue unless sync",
    }

    def test_these_and_only_these(self) -> None:
        found = []
        for file in Path(trainer_base.__file__).parent.glob("*.py"):
            for function in functions(ast.parse(file.read_text())):
                for node in ast.walk(function):
                    if isinstance(node, ast.Compare) and "sync" in strings(node):
                        found.append((file.name, ast.unparse(node.left), function.name))
        assert sorted(found) == [("trainer_base.py", "self.trainer_mode", name) for name in sorted(self.BRANCHES)]

    def test_the_mode_is_the_configured_name(self) -> None:
        assert "self.trainer_mode = self.config.trainer.v1.trainer_mode" in inspect.getsource(trainer_base.PPOTrainer)

    @pytest.mark.parametrize("mode", sorted(TRAINERS))
    def test_our_trainer_takes_the_place_of_verls(self, mode: str) -> None:
        assert issubclass(TRAINERS[mode], trainer_base.TRAINER_REGISTRY[mode])


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


class TestEndOfTraining:
    """verl's fit returns after its last step without calling on_train_end, so ours calls the stage itself."""

    def test_fit(self) -> None:
        fit = next(f for f in functions(tree_of(trainer_base)) if f.name == "fit")
        loop = next(node for node in ast.walk(fit) if isinstance(node, ast.While))
        ends = [node for node in loop.body if isinstance(node, ast.If) and ast.unparse(node.test) == "is_last_step"]
        assert any(isinstance(node, ast.Return) for node in ends[-1].body)
        assert "on_train_end" not in ast.unparse(loop)
        assert ast.unparse(fit).count("self.on_train_end()") == 1


def worker() -> Any:
    """verl's agent-loop worker without its cluster."""
    made = object.__new__(AgentLoopWorkerTQ.__ray_metadata__.modified_class)
    made.processor, made.distillation_enabled, made.reward_loop_worker_handles = None, False, None
    return made


def session(turns: int, length: int = 5) -> list[AgentLoopOutput]:
    """A session's outputs as an agent loop makes them; the last one is scored."""
    outputs = [
        AgentLoopOutput(
            prompt_ids=list(range(3 + turn)),
            response_ids=list(range(10, 10 + length + turn)),
            response_mask=[1] * (length + turn),
            response_logprobs=[-0.5] * (length + turn),
            multi_modal_data={},
            mm_processor_kwargs={},
            mm_processor_output=None,
            num_turns=2,
            metrics={"generate_sequences": 0.1},
            extra_fields={"global_steps": 4, "min_global_steps": 3, "max_global_steps": 4, "turn_scores": []},
        )
        for turn in range(turns)
    ]
    outputs[-1].reward_score = 0.75
    outputs[-1].extra_fields["reward_extra_info"] = {"acc": 1.0, "score": 0.75}
    return outputs


def columns(session_id: int = 1) -> dict[str, Any]:
    """The columns that travel with a dataset row."""
    return {
        "uid": "17-4-0",
        "session_id": session_id,
        "global_steps": 4,
        rows.ROLLOUT_N: 8,
        rows.MAX_TOKENS: 16,
        "index": 0,
        "raw_prompt": [{"role": "user", "content": "1+1="}],
        "prompt": [{"role": "user", "content": "1+1="}],
        "data_source": "sums",
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra_info": {"index": 17},
        "dummy_tensor": torch.tensor([0], dtype=torch.uint8),
        "tools_kwargs": {},
        "interaction_kwargs": {},
        "hint": "a column that a plugin set",
    }


class TestRows:
    """What we store of a session is what verl stores, less the columns nobody reads, plus the verdict."""

    @pytest.fixture
    def stored(self, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        async def put(keys, partition_id, fields=None, tags=None) -> None:
            calls.append({"keys": keys, "partition": partition_id, "fields": fields, "tags": tags})

        monkeypatch.setattr(tq, "async_kv_batch_put", put)
        return calls

    @pytest.mark.parametrize("turns", [1, 2])
    def test_same_keys_fields_and_tags(self, stored: list[dict[str, Any]], turns: int) -> None:
        asyncio.run(worker()._agent_loop_postprocess(session(turns), False, **columns()))
        outputs = session(turns)
        for turn, output in enumerate(outputs):
            output.extra_fields["truncated"] = turn == 0
        ours = rows.session_rows(worker(), outputs, columns())
        asyncio.run(rows.Publisher().publish("train", ours, "17-4-0", "finished"))
        verls, mine, status = stored
        assert (mine["keys"], mine["partition"], mine["tags"]) == (verls["keys"], verls["partition"], verls["tags"])
        assert mine["fields"].batch_size == verls["fields"].batch_size
        extra, omitted = set(mine["fields"].keys()), set(verls["fields"].keys())
        assert extra - omitted == {rows.VERDICT, rows.TRUNCATED, rows.OFFSET}
        assert mine["fields"][rows.OFFSET].tolist() == [0] * turns
        assert omitted - extra <= set(rows.USELESS)
        asked = {rows.ROLLOUT_N: 8, rows.MAX_TOKENS: 16}
        assert {name: mine["fields"][name].tolist() for name in asked} == {k: [v] * turns for k, v in asked.items()}
        for name in (extra & omitted) - asked.keys():
            assert same(mine["fields"][name], verls["fields"][name]), name
        assert mine["fields"][rows.VERDICT].tolist() == [1.0] * turns
        assert mine["fields"][rows.TRUNCATED].tolist() == [turn == 0 for turn in range(turns)]
        assert status == {"keys": ["17-4-0"], "partition": "train", "fields": None, "tags": [{"status": "finished"}]}

    def test_without_a_verdict_the_score_is_kept(self) -> None:
        outputs = session(1)
        del outputs[0].extra_fields["reward_extra_info"]["acc"]
        outputs[0].extra_fields["truncated"] = False
        assert rows.session_rows(worker(), outputs, columns())[0].fields[rows.VERDICT] == 0.75


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and one.is_nested:
        return all(torch.equal(a, b) for a, b in zip(one.unbind(), other.unbind(), strict=True))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    return list(one) == list(other) if hasattr(one, "__iter__") else one == other


class TestClippedLoss:
    """The per-token default of `policy_loss`, aggregated, is verl's `vanilla` loss, gradient included."""

    CASES = {
        "default": {},
        "asymmetric": {"clip_ratio_low": 0.1, "clip_ratio_high": 0.4},
        "dual clip close": {"clip_ratio_c": 1.2},
        "dual clip out of reach": {"clip_ratio_c": 1000.0},
        "wide": {"clip_ratio_low": 1.0, "clip_ratio_high": 1.0},
        "one ratio": {"clip_ratio": 0.3, "clip_ratio_low": None, "clip_ratio_high": None},
    }

    @pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
    @pytest.mark.parametrize("case", sorted(CASES))
    def test_equal(self, case: str, mode: str) -> None:
        config = ActorConfig(strategy="fsdp2", rollout_n=8, ppo_micro_batch_size_per_gpu=1, **self.CASES[case])
        generator = torch.Generator().manual_seed(0)
        draw = functools.partial(torch.randn, 12, 9, generator=generator)
        old, new, advantages = draw(), draw().mul(2).requires_grad_(), draw()
        mask = torch.arange(9) < torch.randint(1, 10, (12, 1), generator=generator)
        expected, metrics = compute_policy_loss_vanilla(old, new, advantages, mask, mode, config)
        logged: dict[str, float] = {}
        tokens = Tokens(
            log_probs=new,
            old_log_probs=old,
            advantages=advantages,
            response_mask=mask,
            config=config,
            log=lambda owner, values, reduce: logged.update({f"{owner}/{k}": v for k, v in values.items()}),
        )
        loss = agg_loss(loss_mat=clipped_loss(tokens), loss_mask=mask, loss_agg_mode=mode)
        assert torch.equal(loss, expected)
        assert torch.equal(torch.autograd.grad(loss, new)[0], torch.autograd.grad(expected, new)[0])
        names = {"clip_fraction": "pg_clipfrac", "dual_clip_fraction": "pg_clipfrac_lower", "kl": "ppo_kl"}
        for ours, verls in names.items():
            assert logged[f"policy_loss/{ours}"] == pytest.approx(metrics[f"actor/{verls}"], abs=1e-6)

    @pytest.mark.parametrize("bound", [3.0, 1e30])
    def test_there_is_no_gradient_where_verl_clamps_the_ratio(self, bound: float) -> None:
        config = ActorConfig(strategy="fsdp2", rollout_n=8, ppo_micro_batch_size_per_gpu=1, clip_ratio_c=bound)
        new = torch.tensor([[-25.0, 25.0, 0.1], [-25.0, 25.0, 0.3]], requires_grad=True)
        old, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
        advantages = torch.tensor([[1.0], [-1.0]]).expand(2, 3)
        expected, _ = compute_policy_loss_vanilla(old, new, advantages, mask, "token-mean", config)
        tokens = Tokens(log_probs=new, old_log_probs=old, advantages=advantages, response_mask=mask, config=config)
        loss = agg_loss(loss_mat=clipped_loss(tokens), loss_mask=mask, loss_agg_mode="token-mean")
        assert torch.equal(loss, expected)
        assert torch.equal(torch.autograd.grad(loss, new)[0], torch.autograd.grad(expected, new)[0])


class TestRewardInput:
    """Sessions scored in one message are read by verl's reward manager as if each had come alone."""

    RESPONSES = ["7", "12", "", "a longer answer: 345", "9\n"]

    def outputs(self) -> list[SimpleNamespace]:
        tokenizer = make_tokenizer()
        return [
            SimpleNamespace(
                prompt_ids=tokenizer("3+4="[: 2 + number % 3])["input_ids"],
                response_ids=[*tokenizer(text)["input_ids"], tokenizer.eos_token_id],
                num_turns=2 + number,
                extra_fields={"tool_rewards": [number]},
            )
            for number, text in enumerate(self.RESPONSES)
        ]

    def scored(self, data: Any) -> list[tuple]:
        """What the reward function is given for each row, all rows being scored at the same time."""

        async def compute_score(data_source, solution_str, ground_truth, extra_info):
            await asyncio.sleep(0.01)
            info = extra_info["tool_rewards"], int(extra_info["num_turns"]), extra_info["index"]
            return {"score": 0.0, "seen": (data_source, solution_str, ground_truth, *info)}

        async def run() -> list[tuple]:
            manager = NaiveRewardManager(None, make_tokenizer(), compute_score)
            results = await asyncio.gather(*[manager.run_single(data[row : row + 1]) for row in range(len(data))])
            return [result["reward_extra_info"]["seen"] for result in results]

        return asyncio.run(run())

    def test_ragged_lengths(self) -> None:
        shared = columns()  # sessions of one group share the objects of their row
        outputs = self.outputs()
        together = self.scored(rows._reward_input(outputs, [dict(shared, session_id=n) for n in range(len(outputs))]))
        alone = [self.scored(rows._reward_input([output], [columns()]))[0] for output in outputs]
        expected = [("sums", text, "2", [n], 2 + n, 17) for n, text in enumerate(self.RESPONSES)]
        assert together == alone == expected

    def test_columns_that_only_some_rows_have(self) -> None:
        """A dataset's optional field, or what a loop adds to some of its sessions."""
        outputs = self.outputs()
        own = [{**columns(n), **({"clue": n} if n == 1 else {})} for n in range(len(outputs))]
        data = rows._reward_input(outputs, own)
        assert data.non_tensor_batch["clue"].tolist() == [1 if n == 1 else None for n in range(len(outputs))]
        assert data.non_tensor_batch.keys() == rows._reward_input(outputs[:1], own[:1]).non_tensor_batch.keys() | {
            "clue"
        }

    def test_lengths_and_masks_say_where_the_tokens_are(self) -> None:
        outputs = self.outputs()
        data = rows._reward_input(outputs, [columns(n) for n in range(len(outputs))])
        lengths = [(len(output.prompt_ids), len(output.response_ids)) for output in outputs]
        told = data.non_tensor_batch["prompt_len"], data.non_tensor_batch["response_len"]
        assert list(zip(*told, strict=True)) == lengths
        assert data.batch["attention_mask"].sum(1).tolist() == [sum(pair) for pair in lengths]
        width = data.batch["prompts"].shape[1]
        for row, output in enumerate(outputs):
            whole = data.batch["input_ids"][row][data.batch["attention_mask"][row].bool()]
            assert whole.tolist() == [*output.prompt_ids, *output.response_ids]
            assert data.batch["position_ids"][row, width] == len(output.prompt_ids)
        assert isinstance(data.non_tensor_batch["raw_prompt"], np.ndarray)


ENTRY = f"""
import json, sys
import verl
from verl.workers.rollout import replica
from verl.plugin.platform import get_platform
ours = sorted(name for name in sys.modules if name.split(".")[0] == "verl_plugins")
known = {ROLLOUT_NAME!r} in replica.RolloutReplicaRegistry._registry
print(json.dumps(dict(ours=ours, known=known, platform=get_platform().device_name)))
"""


def entry(**env: str) -> tuple[dict[str, Any], float]:
    """What a process that imports verl knows of us, and the seconds our entry point took it."""
    clean = {key: value for key, value in os.environ.items() if key not in (RUN_VARIABLE, "VERL_PLATFORM")}
    command = [sys.executable, "-X", "importtime", "-c", ENTRY]
    done = subprocess.run(command, capture_output=True, text=True, env={**clean, **env}, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    times = [line.split("|") for line in done.stderr.splitlines() if line.startswith("import time:")]
    ours = [float(own.split(":")[1]) for own, _, name in times if name.strip().split(".")[0] == "verl_plugins"]
    return json.loads(done.stdout.splitlines()[-1]), sum(ours) / 1e6


class TestEntryPoint:
    """verl loads our entry point in every process that imports it: cheap, and idle unless a run of ours asks."""

    def test_idle_without_a_run(self) -> None:
        found, seconds = entry()
        assert "verl_plugins.bridge.entry" in found["ours"]
        assert not any(name.startswith("verl_plugins.cpu") for name in found["ours"])
        assert not found["known"]
        assert seconds < 0.05

    def test_a_run_makes_server_and_platform_known(self) -> None:
        found, _ = entry(**{RUN_VARIABLE: "1", "VERL_PLATFORM": "cpu"})
        assert found["known"]
        assert found["platform"] == "cpu"
