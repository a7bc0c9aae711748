"""A teacher (`distillation.enabled`): devices of its own, a server that can tell log-probs, the student's tokens."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from math import prod

from omegaconf import DictConfig, OmegaConf, open_dict

from verl_plugins.errors import CompositionError

SECTION = "distillation"
MODELS = f"{SECTION}.teacher_models"
SINGLE = "teacher_model"
"""verl's name for the teacher where there is one; it drops it where others are named."""
LOGICAL = "ray_kwargs.ray_init.num_gpus"
PARALLEL = ("tensor_model_parallel_size", "data_parallel_size", "pipeline_model_parallel_size")
SERVERS = ("vllm", "sglang", "transformers")
"""Those that tell the log-probs of tokens that are there."""


def is_on(config: DictConfig) -> bool:
    """Whether the run has a teacher."""
    return bool(OmegaConf.select(config, f"{SECTION}.enabled"))


def devices(config: DictConfig) -> int:
    """Devices of the teachers, beside those of the training; 0 without one."""
    if not is_on(config):
        return 0
    return int(config.distillation.nnodes or 0) * int(config.distillation.n_gpus_per_node or 0)


def models(config: DictConfig) -> Iterator[tuple[str, DictConfig]]:
    """Key and section of every teacher."""
    named = OmegaConf.select(config, MODELS)
    for name in named:
        if name != SINGLE or len(named) == 1:
            yield f"{MODELS}.{name}", named[name]


def settle(config: DictConfig, asked: Collection[str]) -> None:
    """On a CPU: a logical GPU of Ray's for each device of a teacher."""
    there = config.ray_kwargs.ray_init.get("num_gpus")
    if config.trainer.device == "cpu" and devices(config) and LOGICAL not in asked and there is not None:
        with open_dict(config):
            config.ray_kwargs.ray_init.num_gpus = int(there) + devices(config)


def check(config: DictConfig) -> None:
    """Refuse what verl finds out minutes later.

    Raises:
        CompositionError: names the key and a value that fits.
    """
    if not is_on(config):
        return
    for name in ("nnodes", "n_gpus_per_node"):
        if int(config.distillation[name] or 0) < 1:
            raise CompositionError(
                f"{SECTION}.{name} is {config.distillation[name]}: teachers have devices of their own, set "
                f"{SECTION}.nnodes and {SECTION}.n_gpus_per_node to what they have"
            )
    for key, section in models(config):
        _check_server(key, section, devices(config))


def _check_server(key: str, section: DictConfig, there: int) -> None:
    inference = section.inference
    size = prod(int(inference.get(name) or 1) for name in PARALLEL)
    if inference.name not in SERVERS:
        raise CompositionError(
            f"{key}.inference.name is {inference.name!r}, and a teacher's server must tell the log-probs of tokens "
            f"that are there: set it to one of {', '.join(SERVERS)}"
        )
    if there % size or (inference.name == "transformers" and size > 1):
        raise CompositionError(
            f"{key}.inference.{PARALLEL[0]}={inference[PARALLEL[0]]}: a server of the teacher has {size} devices "
            f"(tensor, data and pipeline parallel), which does not fit {inference.name} on {there} "
            f"({SECTION}.nnodes times {SECTION}.n_gpus_per_node): set {key}.inference.{PARALLEL[0]}=1"
        )
