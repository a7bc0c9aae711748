"""Every process of a run says at start which code it has, and stops the run when that is not the driver's.

`census` asks processes of every kind on every node without a run, for `verl-plugins doctor --ray`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

from verl_plugins.bridge import RUN_VARIABLE
from verl_plugins.bridge.environment import DIGESTS_VARIABLE, of_this_run
from verl_plugins.commands.doctor import ANSWER
from verl_plugins.composition import manager
from verl_plugins.composition.identity import Identity, difference, identify
from verl_plugins.composition.manager import Plugins
from verl_plugins.composition.scratch import scratch
from verl_plugins.errors import CompositionError


def announce(section: Mapping[str, Any]) -> dict[str, str]:
    """The driver's digests, as the environment variable its workers compare themselves with."""
    return {DIGESTS_VARIABLE: json.dumps(identify(section, "driver").digests)}


def build(section: Mapping[str, Any], role: str) -> Plugins:
    """The plugins of a process of kind `role`, which is reported in the log.

    Raises:
        CompositionError: this process has another version of the package or of a plugin than the driver.
    """
    own = identify(section, role)
    print(f"verl_plugins: {own}", flush=True)
    if sentence := difference(json.loads(os.environ[DIGESTS_VARIABLE]), own):
        raise CompositionError(sentence)
    return manager.build(section)


KINDS = {
    "actor worker": "verl_plugins.bridge.actor",
    "agent-loop worker": "verl_plugins.bridge.rollout",
    "reward worker": "verl_plugins.bridge.reward",
}
"""Kinds of processes in which plugins live, and the module each of them runs."""
CENSUS_SECONDS = 180


def census(plugins: Iterable[str], address: str | None = None) -> Iterator[tuple[str, str | None]]:
    """Start one process of each kind on each node; yields who it is, and what is wrong with it or None."""
    names = sorted(plugins)
    expected = identify(names, "driver").digests
    with _cluster(address):
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        probe = ray.remote(num_cpus=0, max_retries=0)(_probe)
        asked = {}
        for node in [node for node in ray.nodes() if node["Alive"]]:
            for kind, module in KINDS.items():
                place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                asked[f"{kind} on node {node['NodeManagerHostname']}"] = probe.options(
                    scheduling_strategy=place
                ).remote(kind, module, names)
        for who, answer in asked.items():
            try:
                yield who, difference(expected, ray.get(answer, timeout=CENSUS_SECONDS))
            except Exception as error:
                lines = str(getattr(error, "cause", None) or error).strip().splitlines()
                yield who, lines[-1] if lines else type(error).__name__


def _probe(kind: str, module: str, names: list[str]) -> Identity:
    import_module(module)
    return identify(names, kind)


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """The given cluster, that of `RAY_ADDRESS`, or a node of our own; with the environment of a run.

    Ray reads the token of its cluster when it is imported, so nothing here may do that before the node starts.
    """
    from verl_plugins.cpu import head

    os.environ[RUN_VARIABLE] = "1"
    options = {"runtime_env": {"env_vars": of_this_run()}, "log_to_driver": False, "logging_level": "ERROR"}
    address = address or os.environ.get("RAY_ADDRESS")
    with ExitStack() as stack:
        own = None if address else stack.enter_context(head.started(stack.enter_context(scratch()), len(KINDS), 0))
        import ray

        ray.init(address or own.address, **options)
        try:
            yield
        finally:
            ray.shutdown()


if __name__ == "__main__":
    for answer in census(**json.loads(sys.argv[1])):
        print(ANSWER + json.dumps(answer), flush=True)
