"""Rollout servers between steps: who answers, and when; the part of the trainer behind `run.generate`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from verl_plugins.bridge.logits import STAGE
from verl_plugins.cpu.registration import ROLLOUT_NAME


def seed_name(server: str) -> str:
    """What a rollout server calls the seed of one request; SGLang refuses a request with vLLM's name for it."""
    return "sampling_seed" if server == "sglang" else "seed"


class ServesRollouts:
    """Mixed into one of verl's trainers."""

    _awake = False

    def get_llm_client(self) -> Any:
        """verl's client; a single server of ours is asked directly instead of through a load balancer."""
        client = super().get_llm_client()
        if not self._one_server:
            return client
        from verl_plugins.cpu.client import CLIENTS

        return self.serving.get_client(client_cls=CLIENTS[type(client)], server=self.serving.server_handles[0])

    @property
    def serving(self) -> Any:
        """verl's manager of the servers that answer."""
        return self.llm_server_manager

    @property
    def _one_server(self) -> bool:
        return self.config.actor_rollout_ref.rollout.name == ROLLOUT_NAME and len(self.serving.server_handles) == 1

    def _shape_served_logits(self, section: dict[str, dict[str, Any]]) -> None:
        """Where plugins shape logits, the servers build them too; other servers than ours were refused."""
        if self.plugins.implements(STAGE):
            ray.get([server.set_plugins.remote(section) for server in self.serving.server_handles])

    def on_init_end(self) -> None:
        super().on_init_end()
        self._awake = True

    def on_sample_end(self) -> None:
        super().on_sample_end()
        self._awake = False

    def on_step_end(self) -> None:
        super().on_step_end()
        self._awake = True

    @contextmanager
    def awake_replicas(self) -> Iterator[None]:
        """Rollout servers that answer, with the current weights, also while the actor is being trained."""
        if self._awake:
            yield
            return
        interrupted = self.trainer_mode != "sync"
        self.checkpoint_manager.update_weights(self.global_steps)
        if interrupted:
            self.checkpoint_manager.resume_generation_replicas()
        try:
            yield
        finally:
            if interrupted:
                self.checkpoint_manager.abort_replicas()
            self.checkpoint_manager.sleep_replicas()
