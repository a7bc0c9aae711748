"""verl's task runner, in the driver process, with our trainers and agent-loop manager."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from verl.trainer.main_ppo import TaskRunnerV1
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

from verl_plugins.bridge.rollout import PluginAgentLoopManager
from verl_plugins.bridge.separate import PluginTrainerSeparateAsync
from verl_plugins.bridge.trainer import PluginTrainerColocateAsync, PluginTrainerSync
from verl_plugins.cpu import vllm

TRAINERS = {
    "sync": PluginTrainerSync,
    "colocate_async": PluginTrainerColocateAsync,
    "separate_async": PluginTrainerSeparateAsync,
}


class PluginTaskRunner(TaskRunnerV1.__ray_metadata__.modified_class):
    """Runs one training."""

    def __init__(self, reporter: Any = None, signals: Any = None) -> None:
        super().__init__()
        self._reporter, self._signals = reporter, signals

    def init_agent_loop_manager(self) -> None:
        self.trainer.reporter, self.trainer.signals = self._reporter, self._signals
        self.agent_loop_manager = PluginAgentLoopManager.create(
            config=self.config,
            llm_client=self.trainer.get_llm_client(),
            teacher_client=self.trainer.get_teacher_client(),
            reward_loop_worker_handles=self.trainer.get_reward_handles(),
        )

    def run(self, config: Any) -> None:
        with patch.dict(TRAINER_REGISTRY, TRAINERS):
            try:
                super().run(config)
            finally:
                self._close_servers(config)

    def _close_servers(self, config: Any) -> None:
        """vLLM on the CPU has processes beneath Ray's, which end in order only if it ends them itself."""
        if config.actor_rollout_ref.rollout.name != "vllm" or config.trainer.device != "cpu" or self.trainer is None:
            return
        for manager in self.trainer._rollout_server_managers():
            vllm.shut_down(manager.server_handles)
