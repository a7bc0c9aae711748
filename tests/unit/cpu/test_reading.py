"""A teacher's answers: the model's own log-probs at every place, in verl's form."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
import torch
from verl.experimental.teacher_loop.teacher_manager import _get_teacher_sampling_params
from verl.workers.config import DistillationTeacherModelConfig

from verl_plugins.cpu import reading
from verl_plugins.cpu.generation import Request
from verl_plugins.cpu.model import make_model, make_tokenizer
from verl_plugins.cpu.reading import Reading, read
from verl_plugins.cpu.registration import ROLLOUT_NAME, accept_as_teacher
from verl_plugins.cpu.rollout import TransformersServer

TEXTS = [[5, 6, 7, 8], [9], [1, 2], list(range(20, 40))]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return make_model().eval()


def expected(model: torch.nn.Module, text: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([text])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("rows", [1, 1 << 30], ids=["one after the other", "together"])
def test_the_most_probable_tokens_of_every_place(model, monkeypatch, rows) -> None:
    monkeypatch.setattr(reading, "PIECE", 3)
    monkeypatch.setattr(reading, "LOGITS", rows)
    for text, told in zip(TEXTS, read(model, [Reading(text, 4) for text in TEXTS]), strict=True):
        values, ids = expected(model, text)[:-1].topk(4, -1)
        assert told.ids == [*ids.tolist(), [0] * 4]
        torch.testing.assert_close(torch.tensor(told.log_probs), torch.cat([values, torch.zeros(1, 4)]))


def test_the_token_that_stands_there(model) -> None:
    for text, told in zip(TEXTS, read(model, [Reading(text, 0) for text in TEXTS]), strict=True):
        assert told.ids == [*([token] for token in text[1:]), [0]]
        after = expected(model, text)[:-1].gather(1, torch.tensor(text[1:], dtype=torch.long)[:, None])
        torch.testing.assert_close(torch.tensor(told.log_probs), torch.cat([after, torch.zeros(1, 1)]))


def test_the_server_reads_and_generates_in_one_wave(model) -> None:
    """Asked as verl asks: a text as long as its context has room for, and no token generated."""
    loss = SimpleNamespace(topk=3, loss_settings=SimpleNamespace(use_topk=True))
    asked = _get_teacher_sampling_params(SimpleNamespace(inference=SimpleNamespace(temperature=1.0)), loss)

    async def serve() -> list:
        server = object.__new__(TransformersServer)
        server.model, server.tokenizer, server.ends = model, make_tokenizer(), frozenset()
        server.config = SimpleNamespace(
            max_model_len=None, prompt_length=20, response_length=1, full_determinism=False, max_num_seqs=64
        )
        server._queue, server._running, server._model_lock = asyncio.Queue(), asyncio.Event(), asyncio.Lock()
        server._reject, server._global_steps, server._loop_task = False, None, None
        server._running.set()
        await server.ready()
        requests = [{"request_id": "", "prompt_ids": text, "sampling_params": asked} for text in TEXTS]
        other = {"request_id": "", "prompt_ids": [3], "sampling_params": {"max_tokens": 2, "seed": 1}}
        answers = await server.generate_many([*requests, other])
        server._loop_task.cancel()
        return answers

    *told, other = asyncio.run(serve())
    for text, answer in zip(TEXTS, told, strict=True):
        assert answer.token_ids == [] and answer.stop_reason == "completed"
        assert len(answer.extra_fields["prompt_ids"]) == len(answer.extra_fields["prompt_logprobs"]) == len(text)
        assert all(len(place) == 3 for place in answer.extra_fields["prompt_ids"])
    assert len(other.token_ids) == 2 and "prompt_ids" not in other.extra_fields
    assert not isinstance(Request([1], 1), Reading)


def test_verl_takes_it_for_a_teacher_and_still_refuses_others() -> None:
    accept_as_teacher()
    accept_as_teacher()

    def validate(name: str, top: int) -> dict:
        config = SimpleNamespace(inference=SimpleNamespace(name=name, engine_kwargs={}))
        DistillationTeacherModelConfig._validate_topk_logprobs(config, use_topk=True, topk=top)
        return config.inference.engine_kwargs

    assert validate(ROLLOUT_NAME, 4) == {}
    assert validate("vllm", 4)["vllm"]["max_logprobs"] == 4
    with pytest.raises(NotImplementedError):
        validate("trtllm", 4)
