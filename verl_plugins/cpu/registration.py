"""Makes the Transformers rollout server known to verl under the name `transformers`."""

from __future__ import annotations

from verl.workers.rollout import base, replica

ROLLOUT_NAME = "transformers"


def register_rollout() -> None:
    """Register server and adapter; doing it twice is harmless."""
    base._ROLLOUT_REGISTRY[(ROLLOUT_NAME, "async")] = "verl_plugins.cpu.rollout.ServerAdapter"
    replica.RolloutReplicaRegistry.register(ROLLOUT_NAME, _load_replica)


def _load_replica() -> type[replica.RolloutReplica]:
    from verl_plugins.cpu.rollout import TransformersReplica

    return TransformersReplica
