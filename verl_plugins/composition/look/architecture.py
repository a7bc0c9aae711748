"""The architecture of a model: whether verl's engine and the rollout can call it, told without importing torch."""

from __future__ import annotations

import ast
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, open_dict

from verl_plugins.errors import CompositionError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PATH = "actor_rollout_ref.model.path"
OVERRIDES = "actor_rollout_ref.model.override_config"
ENGINES = ("fsdp", "fsdp2")
OF_ENGINE = {"input_ids", "attention_mask", "position_ids"}
"""What verl's FSDP engine hands to a model."""
OF_ROLLOUT = {"past_key_values", "use_cache"}
"""What the server `transformers` hands to it besides."""


def look_at_architecture(found: PretrainedConfig, config: DictConfig, folder: Path) -> None:
    """Whether verl loads it as a causal language model, and whether engine and rollout can call it."""
    causal, reads_images = _classes("CAUSAL_LM"), _classes("IMAGE_TEXT_TO_TEXT")
    names = found.architectures or []
    if len(names) != 1:
        example = causal.get(found.model_type, "LlamaForCausalLM")
        raise CompositionError(
            f"{PATH}: config.json in {folder} names {len(names)} architectures and verl needs one: set "
            f"+{OVERRIDES}.architectures=[{example}]"
        )
    if getattr(found, "auto_map", None):
        return
    (name,) = names
    rollout = config.actor_rollout_ref.rollout.name
    if found.model_type in reads_images and found.model_type not in causal:
        if rollout == "transformers":
            raise CompositionError(
                f"{PATH}: {name} reads images, which the rollout 'transformers' cannot serve: set "
                "actor_rollout_ref.rollout.name=vllm or sglang, or choose a text model"
            )
        return
    proper = causal.get(found.model_type)
    classifies = any(word in name for word in ("ForSequenceClassification", "ForTokenClassification"))
    if proper is None or classifies or not ("ForCausalLM" in name or name == proper):
        raise CompositionError(
            f"{PATH}: {folder} is a {name}, and what is trained must continue text (…ForCausalLM): set {PATH}=… to a "
            "causal language model"
        )
    if config.actor_rollout_ref.actor.strategy in ENGINES:
        _look_at_calls(found, name, rollout)
        _complete(found, name, config)


def _look_at_calls(found: PretrainedConfig, name: str, rollout: str) -> None:
    taken, stateful = _forward_of(found.model_type)
    if not taken:
        return
    wanted = OF_ENGINE | (OF_ROLLOUT if rollout == "transformers" else set())
    if missing := sorted(wanted - taken):
        raise CompositionError(
            f"{PATH}: {name} takes no {' and no '.join(missing)}, which verl's FSDP engine"
            f"{' and the rollout transformers' if rollout == 'transformers' else ''} passes on: set {PATH}=… to a "
            "transformer with attention"
        )
    if rollout == "transformers" and stateful:
        raise CompositionError(
            f"{PATH}: {name} keeps a state that is not a cache of keys and values, which the rollout 'transformers' "
            f"cannot serve: set {PATH}=… to a transformer with attention"
        )


def _forward_of(model_type: str) -> tuple[set[str], bool]:
    """Arguments of the model's `forward`, and whether it is stateful, read from its source: importing it loads torch.

    No arguments where the source does not tell.
    """
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    module = model_type_to_module_name(model_type)
    file = _models() / module / f"modeling_{module}.py"
    if not file.is_file():
        return set(), False
    tree = ast.parse(file.read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    body = [*getattr(classes.get(_classes("CAUSAL_LM").get(model_type)), "body", [])]
    forward = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == "forward"]
    taken = {argument.arg for node in forward for argument in (*node.args.args, *node.args.kwonlyargs)}
    stateful = any(
        isinstance(node, ast.Assign) and ast.unparse(node) == "_is_stateful = True"
        for kind in classes.values()
        for node in kind.body
    )
    return taken, stateful


def _complete(found: PretrainedConfig, name: str, config: DictConfig) -> None:
    """What verl's engine asks of a configuration and older ones lack (GPT-2): heads of keys, and a name it knows."""
    text = found.get_text_config()
    derived: dict[str, Any] = {}
    if getattr(text, "num_key_value_heads", None) is None and getattr(text, "num_attention_heads", None):
        derived["num_key_value_heads"] = text.num_attention_heads
    if "ForCausalLM" not in name:
        derived["architectures"] = [re.sub(r"LMHeadModel$|$", "ForCausalLM", name, count=1)]
    if derived:
        with open_dict(config):
            given = config.actor_rollout_ref.model.get("override_config") or {}
            config.actor_rollout_ref.model.override_config = {**given, **derived}


def _models() -> Path:
    return Path(find_spec("transformers").submodule_search_locations[0], "models")


@cache
def _classes(kind: str) -> dict[str, str]:
    """Names of the classes of a kind (`CAUSAL_LM`) by model type, as transformers' own table has them."""
    file = _models() / "auto" / "modeling_auto.py"
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == f"MODEL_FOR_{kind}_MAPPING_NAMES":
            return dict(ast.literal_eval(node.value.args[0]))
    raise LookupError(f"{file} has no MODEL_FOR_{kind}_MAPPING_NAMES")
