"""Embeddings of texts, for rewards that look at meaning: `embed(texts) -> [k,d]`, in order, equal for equal texts.

Four kinds, of which none stands in for another:

- `hashing`: counts of one to three neighbouring bytes, hashed to a fixed width; needs nothing, sees wording only.
- `folder`: a model on disk, as sentence-transformers and transformers save it: its last hidden states, averaged.
- `http`: a service that answers a POST of {"texts": […]} with {"embeddings": [[…], …]}.
- `callable`: a function of yours, `module:function`.
"""

from __future__ import annotations

import importlib
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from verl_plugins.errors import CompositionError, RunError

Embed = Callable[[Sequence[str]], np.ndarray]

WIDTH, LONGEST_GRAM = 1024, 3
MULTIPLIER = np.uint32(2654435761)
"""Knuth's: spreads neighbouring numbers over the hash's range."""
BATCH, RETRIES, TIMEOUT_SECONDS = 128, 5, 120
WINDOW = 512
"""Tokens a model reads at once where its folder does not say."""


def embedder(kind: str, source: str, long_text: str = "windows") -> Embed:
    """The function that embeds.

    Args:
        kind: `hashing`, `folder`, `http` or `callable`.
        source: the folder, the service's address, or `module:function`; "" for `hashing`.
        long_text: of texts longer than a model of a folder reads, all `windows` (their mean, by tokens) or the `tail`.

    Raises:
        CompositionError: there is no such folder, function or address.
    """
    if kind != "hashing" and not source:
        raise CompositionError(f"embedder={kind} needs a source: a folder, an address, or module:function")
    if kind == "hashing":
        return hashed
    if kind == "folder":
        return _of_folder(Path(source), long_text)
    if kind == "http":
        if not source.startswith(("http://", "https://")):
            raise CompositionError(
                f"source={source}: an embedder of kind http needs an address, as http://host:port/embed"
            )
        return lambda texts: _asked(source, texts)
    return _checked(_imported(source), source)


def hashed(texts: Sequence[str]) -> np.ndarray:
    """[k,WIDTH] how often each hash of one to `LONGEST_GRAM` neighbouring bytes comes; an empty text has zeros."""
    parts = [text.encode() for text in texts]
    data = np.frombuffer(b"".join(parts), dtype=np.uint8).astype(np.uint32)
    row = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    counts = np.zeros(len(parts) * WIDTH, dtype=np.int64)
    gram = np.zeros_like(data)
    for size in range(1, min(LONGEST_GRAM, len(data)) + 1):
        gram = (gram[: len(data) - size + 1] << np.uint32(8)) + data[size - 1 :]
        bucket = (((gram + np.uint32(size << 24)) * MULTIPLIER) >> np.uint32(16)) % WIDTH
        inside = row[: len(gram)] == row[size - 1 :]
        counts += np.bincount(row[: len(gram)][inside] * WIDTH + bucket[inside], minlength=len(counts))
    return counts.reshape(len(parts), WIDTH).astype(np.float64)


def _imported(source: str) -> Callable[[list[str]], Any]:
    module, _, name = source.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise CompositionError(f"source={source}: write module:function of an embedder of yours ({error})") from error


def _checked(function: Callable[[list[str]], Any], who: str) -> Embed:
    """The function, with its answers looked at."""

    def embed(texts: Sequence[str]) -> np.ndarray:
        if not texts:
            return np.zeros((0, 1))
        found = np.asarray(function(list(texts)), dtype=np.float64)
        if found.ndim != 2 or len(found) != len(texts) or not np.isfinite(found).all():
            shape = "x".join(map(str, found.shape))
            raise RunError(
                f"the embedder {who} gave {shape} numbers for {len(texts)} texts: it must give a finite row each"
            )
        return found

    return embed


def _asked(address: str, texts: Sequence[str]) -> np.ndarray:
    """What the service says, in requests of `BATCH` texts."""
    parts = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
    post = _checked(lambda part: _post(address, part), address)
    return np.concatenate([post(part) for part in parts]) if parts else np.zeros((0, 1))


def _post(address: str, texts: Sequence[str]) -> Any:
    body = json.dumps({"texts": list(texts)}).encode()
    for attempt in range(RETRIES):
        try:
            request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
                return json.loads(answer.read())["embeddings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            last = error
            time.sleep(0.2 * 2**attempt)
    raise RunError(
        f"the embedding service {address} gave no embeddings in {RETRIES} tries ({type(last).__name__}: {last})"
    )


def _of_folder(folder: Path, long_text: str) -> Embed:
    """A model's mean hidden state over a text's tokens."""
    if not (folder / "config.json").is_file():
        raise CompositionError(f"source={folder}: no config.json is there; name the folder of a saved model")
    loaded: list[Any] = []

    def embed(texts: list[str]) -> np.ndarray:
        if not loaded:
            loaded.append(_load(folder, long_text))
        return _mean_states(*loaded[0], texts, long_text)

    return _checked(embed, str(folder))


def _load(folder: Path, long_text: str) -> tuple[Any, Any, int]:
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.truncation_side = "left" if long_text == "tail" else "right"
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    said = folder / "sentence_bert_config.json"
    limits = [json.loads(said.read_text()).get("max_seq_length") if said.is_file() else None]
    limits += [tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None), WINDOW]
    return tokenizer, model, next(limit for limit in limits if limit and limit <= 1 << 20)


def _mean_states(tokenizer: Any, model: Any, longest: int, texts: list[str], long_text: str) -> np.ndarray:
    """[k,d] the mean over a text's tokens, those of all its windows where it has several."""
    import torch

    read = tokenizer(
        texts,
        truncation=True,
        max_length=longest,
        padding=True,
        return_tensors="pt",
        return_overflowing_tokens=long_text == "windows",
    )
    window_of = read.pop("overflow_to_sample_mapping", torch.arange(len(texts)))
    total, count = None, torch.zeros(len(texts))
    for start in range(0, len(window_of), BATCH):
        part = {key: value[start : start + BATCH] for key, value in read.items()}
        of, mask = window_of[start : start + BATCH], part["attention_mask"].float()
        with torch.inference_mode():
            states = model(**part).last_hidden_state.float()
        sums = (states * mask[:, :, None]).sum(1)
        total = torch.zeros(len(texts), sums.shape[1]) if total is None else total
        total.index_add_(0, of, sums)
        count.index_add_(0, of, mask.sum(1))
    return (total / count.clamp(min=1)[:, None]).numpy()
