"""Makes the Transformers rollout server known to verl under the name `transformers`, for policies and for teachers."""

from __future__ import annotations

from verl.workers.config import DistillationTeacherModelConfig
from verl.workers.rollout import base, replica

ROLLOUT_NAME = "transformers"


def register_rollout() -> None:
    """Register server and adapter, and have verl take it for a teacher; doing it twice is harmless."""
    base._ROLLOUT_REGISTRY[(ROLLOUT_NAME, "async")] = "verl_plugins.cpu.rollout.ServerAdapter"
    replica.RolloutReplicaRegistry.register(ROLLOUT_NAME, _load_replica)

    accept_as_teacher()


def accept_as_teacher() -> None:
    """verl names the servers that can tell the log-probs of a prompt's tokens, and this one can, too."""
    known = DistillationTeacherModelConfig._validate_topk_logprobs
    if getattr(known, "__module__", "") == __name__:
        return

    def check(self: DistillationTeacherModelConfig, use_topk: bool, topk: int | None) -> None:
        if self.inference.name != ROLLOUT_NAME:
            known(self, use_topk=use_topk, topk=topk)

    DistillationTeacherModelConfig._validate_topk_logprobs = check


def _load_replica() -> type[replica.RolloutReplica]:
    from verl_plugins.cpu.rollout import TransformersReplica

    return TransformersReplica
