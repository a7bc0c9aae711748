"""The CPU engine gives what verl's own engine gives, values and gradients, for fewer logits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig
from verl.utils import tensordict_utils as tu
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.utils.padding import no_padding_2_padding

from verl_plugins.cpu.engine import PIECE, ResponseEngine, register_engine, token_statistics

VOCABULARY = 61
NAMES = ("log_probs", "entropy", "sum_pi_squared")


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.3, **sizes))


def micro_batch(lengths: list[tuple[int, int]], temperature: float | list[float], **settings: object) -> TensorDict:
    """Rows of so many prompt and response tokens, as verl hands them to an engine."""
    generator = torch.Generator().manual_seed(sum(map(sum, lengths)))

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(1, VOCABULARY, (count,), generator=generator)

    prompts, responses = [tokens(p) for p, _ in lengths], [tokens(r) for _, r in lengths]
    whole = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    nested = {
        "prompts": prompts,
        "responses": responses,
        "input_ids": whole,
        "position_ids": [torch.arange(len(ids)) for ids in whole],
    }
    batch = TensorDict(
        {key: torch.nested.as_nested_tensor(rows, layout=torch.jagged) for key, rows in nested.items()},
        batch_size=[len(lengths)],
    )
    several = isinstance(temperature, list)
    if several:
        batch["temperature"] = torch.tensor(temperature)
    wanted = dict(use_remove_padding=False, calculate_entropy=True, calculate_sum_pi_squared=True)
    tu.assign_non_tensor(batch, **{**({} if several else {"temperature": temperature}), **wanted, **settings})
    return batch


def outputs(kind: type, model: torch.nn.Module, batch: TensorDict) -> dict[str, torch.Tensor]:
    """[B, longest response] each, by an engine of this kind around the model."""
    engine = object.__new__(kind)
    settings = dict(entropy_checkpointing=False, entropy_from_logits_with_chunking=False)
    engine.__dict__.update(module=model, engine_config=SimpleNamespace(**settings), pad_to_length=None)
    inputs, args = engine.prepare_model_inputs(batch)
    found = engine.prepare_model_outputs(model(**inputs, use_cache=False), args, batch, None)
    return {name: no_padding_2_padding(value, batch) for name, value in found.items()}


SHAPES = {
    "ragged": [(5, 3), (2, 9), (7, 1)],
    "one row": [(4, 6)],
    "an empty response": [(3, 0), (3, 4)],
    "more tokens than a piece": [(2, PIECE), (3, PIECE // 2 + 5)],
}


@pytest.mark.parametrize("temperature", [1.0, 0.6, "per row"])
@pytest.mark.parametrize("lengths", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_are_those_of_verls_engine(model, lengths, temperature):
    if temperature == "per row":
        temperature = [0.5 + 0.4 * row for row in range(len(lengths))]
    batch = micro_batch(lengths, temperature)
    torch.manual_seed(1)
    weights = {name: torch.randn(len(lengths), max(r for _, r in lengths)) for name in NAMES}
    inside = torch.arange(max(r for _, r in lengths)) < torch.tensor([r for _, r in lengths])[:, None]
    for chosen in (NAMES, NAMES[:1], NAMES[1:2], NAMES[2:]):
        both = []
        for kind in (FSDPEngineWithLMHead, ResponseEngine):
            model.zero_grad()
            found = outputs(kind, model, batch)
            assert set(found) == set(NAMES)
            sum((weights[name] * found[name])[inside].sum() for name in chosen).backward()
            values = {name: value.detach()[inside] for name, value in found.items()}
            both.append((values, {name: p.grad.clone() for name, p in model.named_parameters()}))
        assert_close(both[0][0], both[1][0], atol=1e-5, rtol=1e-5)
        for name, grad in both[0][1].items():
            assert (grad - both[1][1][name]).norm() <= 1e-5 * (grad.norm() + 1), name


def test_logits_are_made_for_the_responses_only(model):
    seen = []
    handle = model.register_forward_hook(lambda *_: seen.append(_[2].logits.shape), always_call=True)
    outputs(ResponseEngine, model, micro_batch([(9, 3), (7, 4)], 1.0))
    handle.remove()
    assert seen == [(2, 12 - 1 - (7 - 1), VOCABULARY)]


@pytest.mark.parametrize("wanted", [("calculate_entropy",), ("calculate_sum_pi_squared",), ()])
def test_only_what_was_asked_for_is_given(model, wanted):
    flags = {key: key in wanted for key in ("calculate_entropy", "calculate_sum_pi_squared")}
    found = outputs(ResponseEngine, model, micro_batch([(3, 2)], 1.0, **flags))
    assert set(found) == {"log_probs", *(name.removeprefix("calculate_") for name in wanted)}


class NamesNoPositions(torch.nn.Module):
    """A model whose forward pass takes no `logits_to_keep`."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids, use_cache):
        return self.model(input_ids, attention_mask, position_ids, use_cache=use_cache)


def test_a_model_that_makes_all_logits_goes_verls_way(model):
    batch = micro_batch([(3, 2), (1, 4)], 0.7)
    assert_close(outputs(ResponseEngine, NamesNoPositions(model), batch), outputs(FSDPEngineWithLMHead, model, batch))


def test_gradient_of_the_function_by_differences():
    torch.manual_seed(2)
    logits = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    rows, places, labels = torch.tensor([0, 1, 1]), torch.tensor([2, 0, 1]), torch.tensor([6, 0, 3])

    def total(values: torch.Tensor) -> torch.Tensor:
        found = token_statistics(values, (rows, places), labels, torch.tensor([1.0, 0.5, 2.0]))
        return sum((position + 1) * found[name].double().sum() for position, name in enumerate(NAMES))

    (grad,) = torch.autograd.grad(total(logits), logits)
    step = 1e-2
    for at in [(0, 2, 6), (0, 2, 1), (1, 0, 0), (1, 1, 5), (0, 0, 3)]:
        moved = torch.zeros_like(logits)
        moved[at] = step
        slope = (total(logits.detach() + moved) - total(logits.detach() - moved)) / (2 * step)
        assert abs(float(slope - grad[at])) < 2e-3


def test_it_is_the_engine_of_this_platform(monkeypatch):
    from verl_plugins.cpu.platform import PlatformCPU

    register_engine()
    register_engine()
    engines = EngineRegistry._engines["language_model"]["fsdp2"]
    assert engines[("cuda", PlatformCPU().vendor_name)] is ResponseEngine
    assert engines["cuda"] is FSDPEngineWithLMHead
