"""The model of a run, before anything starts: whether engine and rollout can take it, and what its prompts look like.

Only its configuration and its tokenizer are read, through transformers, which is imported when a model is looked at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf, open_dict

from verl_plugins.composition.look.architecture import OVERRIDES, PATH, look_at_architecture
from verl_plugins.composition.look.hub import is_name, snapshot
from verl_plugins.composition.look.words import short
from verl_plugins.composition.refusals import has_critic
from verl_plugins.errors import CompositionError, nearest

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

TOKENIZER = "actor_rollout_ref.model.tokenizer_path"
CRITIC = "critic.model.path"
TEMPLATE = "actor_rollout_ref.model.custom_chat_template"
EXAMPLE = f"\"{TEMPLATE}='{{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}'\""
"""The plainest template, as the shell takes it."""
MEND_TEMPLATE = f"set {TEMPLATE} to another (its text, not the name of a file), as in {EXAMPLE}"
PROBE = "What is 6 times 7?"
ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
PACKAGES = {"vllm": "verl-plugins[vllm]", "sglang": "verl-plugins[sglang]"}


@dataclass(frozen=True)
class Model:
    """A model that was looked at."""

    path: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    template_options: dict[str, Any] = field(default_factory=dict)
    """`data.apply_chat_template_kwargs`."""

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt as text; the template's own errors come through."""
        options = {key: value for key, value in self.template_options.items() if key not in ("tokenize", "return_dict")}
        return self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False, **options)

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
        """The prompt as text, and what is wrong with it: the template fails, or a message is not in what it makes."""
        try:
            text = self.render(messages)
        except Exception as error:
            return "", f"fails ({short(error)})"
        for message in messages:
            content = message.get("content")
            if message.get("role") != "assistant" and isinstance(content, str) and content.strip() not in text:
                return text, f"leaves out what the {message.get('role')} says"
        return text, ""

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of rendered prompts."""
        if not prompts:
            return []
        return list(map(len, self.tokenizer(list(prompts), add_special_tokens=False)["input_ids"]))

    def __str__(self) -> str:
        name = (self.config.architectures or ["?"])[0]
        return f"{self.path} ({name}, {len(self.tokenizer)} tokens in its vocabulary)"


def look_at_model(config: DictConfig, made: Path | None = None) -> Model | None:
    """The model of the run, or None where only the run itself can read it (`hdfs://…`).

    Enters in `config` what follows from the model: settings that verl's engine reads and some configurations lack.
    `made` is where a model that the preset makes can be looked at, with or without weights.

    Raises:
        CompositionError: if the run could not work with the model.
    """
    section = config.actor_rollout_ref.model
    _look_at_packages(config)
    _look_at_critic(config)
    if "://" in section.path:
        return None
    path = _tidied(config, "path")
    folder = made or _folder(path, PATH)
    found = _configuration(folder, section)
    look_at_architecture(found, config, folder)
    if made is None and Path(path).is_dir():
        _look_at_weights(folder)
    _look_at_adapters(config)
    tokenizer = _tokenizer(_folder(_tidied(config, "tokenizer_path"), TOKENIZER) or folder, section)
    _look_at_vocabulary(tokenizer, found, path)
    _look_at_positions(found, config, made is not None)
    options = OmegaConf.to_container(config.data.get("apply_chat_template_kwargs") or OmegaConf.create(), resolve=True)
    model = Model(path, found, tokenizer, options)
    _look_at_template(model)
    return model


def _tidied(config: DictConfig, name: str) -> str | None:
    """A path without `~` and without the slash at its end, which verl refuses; entered in the configuration."""
    section = config.actor_rollout_ref.model
    given = section.get(name)
    if not given:
        return None
    local = Path(given).expanduser()
    tidied = str(local.absolute()) if local.exists() else given.rstrip("/")
    with open_dict(config):
        section[name] = tidied
    return tidied


def _folder(path: str | None, key: str) -> Path | None:
    """Where configuration and tokenizer lie on this machine."""
    if path is None:
        return None
    local = Path(path)
    if local.is_dir():
        return local
    if local.exists():
        raise CompositionError(f"{key}: {path} is a file; set {key}=… to the folder that holds config.json and weights")
    if not is_name(path):
        raise CompositionError(
            f"{key}: there is no folder {path}; set {key}=… to a folder with config.json, tokenizer and weights, or to "
            "a name on the Hugging Face Hub"
        )
    return snapshot(path, key)


def _configuration(folder: Path, section: DictConfig) -> PretrainedConfig:
    """transformers' configuration with `override_config` applied, as verl does."""
    from transformers import CONFIG_MAPPING, AutoConfig

    raw = _config_json(folder)
    if "auto_map" in raw and raw.get("model_type") not in CONFIG_MAPPING and not section.trust_remote_code:
        raise CompositionError(
            f"{PATH}: {folder} brings code of its own ({raw.get('model_type')!r} is not in transformers): read it, "
            f"and set "
            "actor_rollout_ref.model.trust_remote_code=true if you trust it"
        )
    try:
        found = AutoConfig.from_pretrained(folder, trust_remote_code=section.trust_remote_code)
    except Exception as error:
        raise CompositionError(
            f"{PATH}: config.json in {folder} cannot be used ({short(error)}); set {PATH}=… to a model that this "
            "transformers knows"
        ) from error
    for key, value in _overridden(section).items():
        if not isinstance(value, dict):
            setattr(found, key, value)
    return found


def _overridden(section: DictConfig) -> dict[str, Any]:
    given = section.get("override_config")
    whole = OmegaConf.to_container(given, resolve=True) if given else {}
    return whole.get("model_config", whole)


def _config_json(folder: Path, key: str = PATH) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise CompositionError(f"{key}: {folder} has no config.json; set {key}=… to the folder of a model")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CompositionError(
            f"{key}: {file} cannot be read ({short(error)}); set {key}=… to a complete model"
        ) from error
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise CompositionError(f"{key}: {file} has no model_type; set {key}=… to a model of transformers")
    return raw


# Packages and weights


def _look_at_packages(config: DictConfig) -> None:
    """Attention, rollout engine and kernels that are asked for are installed."""
    section, device = config.actor_rollout_ref.model, config.trainer.device
    chosen = _overridden(section).get("attn_implementation", "flash_attention_2")
    key = f"{OVERRIDES}.attn_implementation"
    if chosen not in ATTENTION and "/" not in str(chosen):
        raise CompositionError(f"{key} is {chosen!r}{nearest(str(chosen), ATTENTION)}")
    if str(chosen).startswith("flash_attention"):
        named = "attn_implementation" in _overridden(section)
        why = f"{key} is {chosen!r}" if named else f"verl's default for attention is {chosen!r}"
        if device == "cpu":
            raise CompositionError(f"{why}, which runs on GPUs only: set {'' if named else '+'}{key}=sdpa")
        if not (find_spec("flash_attn") or find_spec("kernels")):
            raise CompositionError(
                f"{why} and flash-attn is not installed: set {'' if named else '+'}{key}=sdpa, or pip install "
                f"flash-attn"
            )
    rollout = config.actor_rollout_ref.rollout.name
    if rollout in PACKAGES and find_spec(rollout) is None:
        raise CompositionError(
            f"actor_rollout_ref.rollout.name is {rollout!r}, which is not installed: pip install "
            f"'{PACKAGES[rollout]}', or "
            "set actor_rollout_ref.rollout.name=transformers"
        )
    if section.use_liger and find_spec("liger_kernel") is None:
        raise CompositionError(
            "actor_rollout_ref.model.use_liger is true and liger-kernel is not installed: set it to false, or "
            "pip install liger-kernel"
        )


def _look_at_critic(config: DictConfig) -> None:
    """The value model, where one is trained, is there and can be loaded."""
    if not has_critic(config) or OmegaConf.is_missing(config.critic.model, "path"):
        return
    if config.trainer.device != "cpu" and find_spec("flash_attn") is None:
        raise CompositionError(
            "a value model is trained (critic), which verl loads with flash attention whatever is set, and flash-attn "
            "is not installed: pip install flash-attn, or set algorithm.adv_estimator to one that needs none, such as "
            "grpo"
        )
    path = config.critic.model.path
    if path != config.actor_rollout_ref.model.path and "://" not in path:
        _config_json(_folder(path, CRITIC), CRITIC)


def _look_at_adapters(config: DictConfig) -> None:
    """LoRA: the adapter is there, and the rollout can take it."""
    section = config.actor_rollout_ref.model
    lora = section.get("lora") or {}
    if section.get("lora_adapter_path") and not Path(section.lora_adapter_path, "adapter_config.json").is_file():
        raise CompositionError(
            f"actor_rollout_ref.model.lora_adapter_path: {section.lora_adapter_path} has no adapter_config.json; "
            f"set it to "
            "the folder of an adapter, or to null"
        )
    asked = max(section.get("lora_rank", 0) or 0, lora.get("rank", 0) or 0) or section.get("lora_adapter_path")
    if asked and config.actor_rollout_ref.rollout.name == "transformers" and not lora.get("merge", False):
        raise CompositionError(
            "actor_rollout_ref.model.lora_rank: the rollout 'transformers' serves whole weights, not adapters: set "
            "actor_rollout_ref.model.lora.merge=true"
        )


def _look_at_weights(folder: Path) -> None:
    there = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not there:
        if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
            return
        raise CompositionError(f"{PATH}: {folder} has no weights (model.safetensors); set {PATH}=… to a complete model")
    file = there[0]
    try:
        shards = set(json.loads(file.read_text())["weight_map"].values()) if file.suffix == ".json" else {file.name}
    except (OSError, ValueError, KeyError) as error:
        raise CompositionError(
            f"{PATH}: {file} cannot be read ({short(error)}); fetch the model again, or set {PATH}=… to another"
        ) from error
    missing = sorted(shard for shard in shards if not (folder / shard).is_file() or not (folder / shard).stat().st_size)
    if missing:
        raise CompositionError(
            f"{PATH}: {folder} lacks weights ({', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}); fetch "
            f"the model "
            f"again, or set {PATH}=… to a complete one"
        )


# Tokenizer


def _tokenizer(folder: Path, section: DictConfig) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=section.trust_remote_code)
        if not tokenizer("1+1=", add_special_tokens=False)["input_ids"]:
            raise ValueError("its vocabulary reads nothing")  # transformers makes an empty one where files are missing
    except Exception as error:
        raise CompositionError(
            f"{PATH}: {folder} has no tokenizer that transformers can read ({short(error)}); set "
            "actor_rollout_ref.model.tokenizer_path=… to a folder that has one"
        ) from error
    if section.get("custom_chat_template") is not None:
        tokenizer.chat_template = section.custom_chat_template
    return tokenizer


def _look_at_vocabulary(tokenizer: PreTrainedTokenizerBase, found: PretrainedConfig, path: str) -> None:
    """An answer can end, and every token has an embedding. A missing pad token is verl's to replace by eos."""
    if tokenizer.eos_token_id is None:
        raise CompositionError(
            f"{PATH}: the tokenizer of {path} has no eos token, so that no answer would end: set eos_token in its "
            "tokenizer_config.json"
        )
    size = getattr(found.get_text_config(), "vocab_size", None)
    largest = max([*tokenizer.get_vocab().values(), tokenizer.eos_token_id, tokenizer.pad_token_id or 0])
    if size is not None and largest >= size:
        raise CompositionError(
            f"{PATH}: the tokenizer of {path} has token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), "
            f"and the "
            f"model's vocabulary has {size} places (vocab_size): resize its embeddings, or set "
            "actor_rollout_ref.model.tokenizer_path=… to the tokenizer that belongs to it"
        )


def _look_at_positions(found: PretrainedConfig, config: DictConfig, made: bool) -> None:
    asked, answered = config.data.max_prompt_length, config.data.max_response_length
    limit = positions(found)
    if limit is not None and asked + answered > limit:
        room = limit - asked
        mend = f"set data.max_response_length={room}" if room > 0 else "set data.max_prompt_length lower"
        more = f", or cpu.model.max_positions={asked + answered}" if made else ", or choose a model that reads more"
        raise CompositionError(
            f"data.max_prompt_length={asked} and data.max_response_length={answered} are {asked + answered} tokens "
            f"together, "
            f"and the model has {limit} positions (max_position_embeddings): {mend}{more}"
        )


def positions(found: PretrainedConfig) -> int | None:
    """Tokens the model can read, with the stretching that its configuration asks for; None if it sets no limit."""
    text = found.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    scaling = getattr(text, "rope_scaling", None) or getattr(text, "rope_parameters", None) or {}
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    if kind in ("default", "mrope") or not isinstance(scaling.get("factor"), (int, float)):
        return limit
    first = scaling.get("original_max_position_embeddings")
    return max(limit, int((first or limit) * scaling["factor"])) if kind in ("yarn", "linear", "dynamic") else limit


def _look_at_template(model: Model) -> None:
    if model.tokenizer.chat_template is None:
        raise CompositionError(
            f"{PATH}: the tokenizer of {model.path} has no chat template, which makes text of chat messages: set "
            f"{TEMPLATE}, as in {EXAMPLE}"
        )
    _, fault = model.prompt([{"role": "user", "content": PROBE}])
    if fault:
        raise CompositionError(f"{PATH}: the chat template of {model.path} {fault}: {MEND_TEMPLATE}")
