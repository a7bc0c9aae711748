"""Tiny models without weights, as users bring them: a configuration and a byte tokenizer in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from verl_plugins.cpu.model import make_tokenizer

JOINED = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + JOINED
USERS_ONLY = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 256}


def write(
    folder: Path, kind: str = "llama", name: str = "LlamaForCausalLM", template: Any = JOINED, **config: Any
) -> Path:
    """A model's folder; its weights are an empty promise of one byte."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    whole = {"model_type": kind, "architectures": [name], "vocab_size": len(tokenizer), **SHAPE, **config}
    (folder / "config.json").write_text(json.dumps(whole))
    (folder / "model.safetensors").write_bytes(b"0")
    return folder
