"""What the preset `cpu` needs before a run starts: its model and its task, made once and kept in a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from verl_plugins.composition.cache import cache_folder
from verl_plugins.composition.settings import typed
from verl_plugins.cpu.model import ModelSettings
from verl_plugins.cpu.task import TaskSettings
from verl_plugins.cpu.warmup import WarmupSettings
from verl_plugins.cpu.warmup import prepare as prepare_files
from verl_plugins.errors import CompositionError

if TYPE_CHECKING:
    from omegaconf import DictConfig


def prepare(config: DictConfig) -> None:
    """Make, or find, model and data of `config.cpu` and enter their paths where the user has not named others."""
    from omegaconf import OmegaConf

    section = OmegaConf.to_container(config.get("cpu", {}), resolve=True)
    made = prepare_files(
        cache_folder(),
        typed(ModelSettings, section.get("model"), "cpu.model"),
        typed(TaskSettings, section.get("task"), "cpu.task"),
        typed(WarmupSettings, section.get("warmup"), "cpu.warmup"),
    )
    chosen = {
        "actor_rollout_ref.model.path": made.model_path,
        "data.train_files": made.train_file,
        "data.val_files": made.val_file,
    }
    missing = {key for key in chosen if OmegaConf.is_missing(*_parent(config, key))}
    for key in missing:
        OmegaConf.update(config, key, str(chosen[key]))
    if OmegaConf.is_missing(config.critic.model, "path"):
        config.critic.model.path = config.actor_rollout_ref.model.path
    if "actor_rollout_ref.model.path" in missing and not config.data.filter_overlong_prompts:
        for key in ("data.train_files", "data.val_files"):
            if key not in missing:
                check_prompts(key, OmegaConf.select(config, key), config.data)


def check_prompts(key: str, files: str | list[str], data: DictConfig) -> None:
    """Refuse prompts of the user's that verl would cut: the model reads one token a byte, so their length is known.

    Raises:
        CompositionError: if a prompt is longer than `data.max_prompt_length`.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet

    for file in [files] if isinstance(files, str) else files:
        if not file.endswith(".parquet"):
            continue
        schema = pyarrow.parquet.read_schema(file)
        kind = schema.field(data.prompt_key).type if data.prompt_key in schema.names else None
        if kind is None or not pa.types.is_list(kind) or not pa.types.is_struct(kind.value_type):
            raise CompositionError(
                f"{key}: {file} has no column {data.prompt_key!r} of chat messages, which `verl-plugins data convert` "
                "makes"
            )
        prompts = pyarrow.parquet.read_table(file, columns=[data.prompt_key]).column(0).combine_chunks()
        sizes = pc.binary_length(pc.struct_field(prompts.flatten(), "content"))
        lengths = np.bincount(pc.list_parent_indices(prompts), weights=sizes, minlength=1)
        longest = int(lengths.max())
        if longest > data.max_prompt_length:
            raise CompositionError(
                f"{key}: row {int(lengths.argmax()) + 1} of {file} has a prompt of {longest} tokens (bytes, for this "
                f"model) and data.max_prompt_length is {data.max_prompt_length}: set data.max_prompt_length={longest}, "
                "or data.filter_overlong_prompts=true to leave such rows out"
            )


def _parent(config: DictConfig, key: str) -> tuple[DictConfig, str]:
    from omegaconf import OmegaConf

    parent, _, leaf = key.rpartition(".")
    return OmegaConf.select(config, parent), leaf
