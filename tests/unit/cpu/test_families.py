"""Models of other families in the rollout server: its log-probs are theirs, and it takes the weights verl sends it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from verl.workers.engine.fsdp.utils import unfuse_moe_params

from verl_plugins import DataError
from verl_plugins.cpu.generation import Request, generate
from verl_plugins.cpu.model import make_tokenizer
from verl_plugins.cpu.rollout import place_of

POSITIONS = 40
SHAPE = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2, "hidden_size": 32}
LONG = {**SHAPE, "intermediate_size": 48, "max_position_embeddings": POSITIONS, "head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS},
    "opt": {**LONG, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "gemma2": {**LONG, "sliding_window": 8},
    "gemma3_text": {**LONG, "sliding_window": 8},
    "qwen3_moe": {**LONG, **EXPERTS},
    "olmoe": {**LONG, **EXPERTS},
    "phi": LONG,
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module", params=FAMILIES)
def models(request, tokenizer) -> tuple[Any, Any]:
    """Two models of a family that differ in all weights."""
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = CONFIG_MAPPING[request.param](vocab_size=len(tokenizer), **FAMILIES[request.param], **ids)
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
    return made[0], made[1]


def log_probs(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([ids]), position_ids=torch.arange(len(ids))[None], use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), -1)


def test_log_probs_up_to_the_last_position(models, tokenizer) -> None:
    """The longest prompt ends where the positions do, while another of its wave goes on."""
    prompts = [[5, 6, 7], list(range(10, 34)), [9] * 3]
    requests = [
        Request(prompt, POSITIONS - max(len(prompt), 4), seed=place, ignore_eos=True)
        for place, prompt in enumerate(prompts)
    ]
    for prompt, done in zip(prompts, generate(models[0], tokenizer, requests), strict=True):
        assert len(prompt) + len(done.token_ids) >= POSITIONS - 1
        there = log_probs(models[0], prompt + done.token_ids)[len(prompt) - 1 : -1]
        expected = there.gather(1, torch.tensor(done.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(done.log_probs), expected, atol=1e-4, rtol=0)


def test_weights_as_verl_sends_them(models) -> None:
    actor, server = models
    assert not torch.equal(log_probs(actor, [5, 6, 7]), log_probs(server, [5, 6, 7]))
    weights = server.state_dict()
    for name, tensor in unfuse_moe_params(actor.state_dict().items(), actor.config.model_type):
        place_of(name, weights).copy_(tensor)
    torch.testing.assert_close(log_probs(server, [5, 6, 7]), log_probs(actor, [5, 6, 7]), atol=0, rtol=0)


@pytest.mark.parametrize("name", ["model.other.weight", "model.layers.0.mlp.experts.0.gate_proj.weight"])
def test_a_weight_the_model_does_not_have(name: str) -> None:
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        place_of(name, {"model.embed_tokens.weight": torch.zeros(2, 2)})
