"""The tiny model of the CPU preset, made without a download: a Qwen2 of 0.56 million parameters, one token a byte."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2TokenizerFast

# Below this, vLLM's CPU attention refuses the model.
MIN_HEAD_DIM = 32


@dataclass(frozen=True)
class ModelSettings:
    """Shape of the model and the seed of its first weights.

    Raises:
        ValueError: if the heads do not divide the hidden size, or are narrower than ``MIN_HEAD_DIM``.
    """

    hidden_size: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    intermediate_size: int = 512
    max_positions: int = 128
    init_std: float = 0.06
    seed: int = 0

    def __post_init__(self) -> None:
        if self.hidden_size % self.heads or self.heads % self.kv_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of heads {self.heads}, "
                f"and heads of kv_heads {self.kv_heads}."
            )
        if self.hidden_size // self.heads < MIN_HEAD_DIM:
            raise ValueError(f"A head is {self.hidden_size // self.heads} wide; the least is {MIN_HEAD_DIM}.")


def make_tokenizer() -> Qwen2TokenizerFast:
    """A Qwen2 tokenizer with one token per byte, no merges, and a chat template that joins the message contents.

    It is a byte-level BPE and nothing simpler because AutoTokenizer rebuilds the Qwen2 class from the model type,
    and because verl's agent loop needs "\\n" to be exactly one token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Qwen2TokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    tokenizer = Qwen2TokenizerFast(
        tokenizer_object=byte_level,
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


def make_config(settings: ModelSettings = ModelSettings()) -> Qwen2Config:
    """The model's configuration."""
    from transformers import Qwen2Config

    tokenizer = make_tokenizer()
    return Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=settings.max_positions,
        initializer_range=settings.init_std,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def make_model(settings: ModelSettings = ModelSettings()) -> Qwen2ForCausalLM:
    """A Qwen2 with random float32 weights that depend on ``settings`` alone; torch's global generator is not moved."""
    import torch
    from transformers import Qwen2ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return Qwen2ForCausalLM(make_config(settings))
