"""A model named on the Hugging Face Hub: found in the cache, or asked for without the patience of a download."""

from __future__ import annotations

import re
from pathlib import Path

from verl_plugins.composition.look.words import short
from verl_plugins.errors import CompositionError

SECONDS = 4
"""How long the Hub may take to answer."""
WEIGHTS = ("safetensors", "bin")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def is_name(path: str) -> bool:
    """Whether it reads as `model` or `owner/model`."""
    return bool(_NAME.fullmatch(path))


def snapshot(name: str, key: str) -> Path:
    """The folder of the cache with configuration and tokenizer of a model, fetched if the Hub has them.

    Raises:
        CompositionError: if the model is neither in the cache nor to be had.
    """
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str) and any(any(Path(cached).parent.glob(f"*.{kind}")) for kind in WEIGHTS):
        return Path(cached).parent
    _ask(name, key)
    try:
        files = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", "*.tiktoken")
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:
        raise CompositionError(
            f"{key}: {name} cannot be fetched from the Hub ({short(error)}); {_mend(key)}"
        ) from error


def _ask(name: str, key: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        HfApi().model_info(name, timeout=SECONDS)
    except GatedRepoError as error:
        raise CompositionError(
            f"{key}: {name} is on the Hub but closed to you: accept its terms there and log in with `hf auth "
            f"login`, or "
            f"{_mend(key)}"
        ) from error
    except RepositoryNotFoundError as error:
        raise CompositionError(
            f"{key}: there is neither a folder nor a model on the Hub called {name}; {_mend(key)}"
        ) from error
    except Exception as error:
        raise CompositionError(
            f"{key}: there is no folder {name}, no complete model of that name in the cache, and the Hub cannot be "
            f"reached "
            f"({type(error).__name__}); fetch it where there is a network, or {_mend(key)}"
        ) from error


def _mend(key: str) -> str:
    return f"set {key}=… to a folder with config.json, tokenizer and weights"
