"""The rollout engine on a tiny random model: what it samples, and that its log-probs are the model's."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, GenerationConfig
from verl.workers.config import RolloutConfig

from verl_plugins import DataError
from verl_plugins.cpu import rollout
from verl_plugins.cpu.generation import BLOCK, Completion, Request, _inverted, generate
from verl_plugins.cpu.model import ModelSettings, make_model, make_tokenizer

SETTINGS = ModelSettings(hidden_size=32, layers=2, heads=1, kv_heads=1, intermediate_size=32, init_std=0.3)
PROMPTS = ["1+2=", "7", "12+34+56=", "a longer prompt than the others"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(SETTINGS).eval()


@pytest.fixture
def run(model, tokenizer):
    """Decode requests together."""

    def call(*requests: Request, **options: Any) -> list[Completion]:
        return generate(model, tokenizer, requests, **options)

    return call


@pytest.fixture(scope="module")
def ask(tokenizer):
    """A request by prompt text."""

    def make(prompt: str, max_tokens: int = 12, **params: Any) -> Request:
        return Request(tokenizer(prompt)["input_ids"], max_tokens, **params)

    return make


def forward(model: Any, request: Request, tokens: list[int], temperature: float = 1.0) -> Tensor:
    """[tokens, V] log-probs of a plain forward pass at the places of the generated tokens."""
    with torch.no_grad():
        logits = model(torch.tensor([[*request.prompt_ids, *tokens]])).logits[0]
    start = len(request.prompt_ids) - 1
    return torch.log_softmax(logits[start : start + len(tokens)].float() / temperature, -1)


def chosen(log_probs: Tensor, tokens: list[int]) -> Tensor:
    return log_probs.gather(1, torch.tensor(tokens)[:, None])[:, 0]


class TestLogProbs:
    """Reported log-probs are those of a plain forward pass, at the request's temperature."""

    @pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
    def test_sampled(self, model, run, ask, temperature: float) -> None:
        requests = [ask(prompt, seed=n, temperature=temperature) for n, prompt in enumerate(PROMPTS)]
        for request, done in zip(requests, run(*requests), strict=True):
            expected = chosen(forward(model, request, done.token_ids, temperature), done.token_ids)
            torch.testing.assert_close(torch.tensor(done.log_probs), expected, atol=1e-4, rtol=0)

    def test_truncated_sampling_reports_the_whole_distribution(self, model, run, ask) -> None:
        request = ask("1+2=", seed=3, top_k=5, top_p=0.6)
        (done,) = run(request)
        expected = chosen(forward(model, request, done.token_ids), done.token_ids)
        torch.testing.assert_close(torch.tensor(done.log_probs), expected, atol=1e-4, rtol=0)

    def test_greedy_is_argmax_and_reports_the_unscaled_distribution(self, model, run, ask) -> None:
        requests = [ask(prompt, temperature=0.0, ignore_eos=True) for prompt in PROMPTS]
        for request, done in zip(requests, run(*requests), strict=True):
            expected = forward(model, request, done.token_ids)
            assert done.token_ids == expected.argmax(-1).tolist()
            torch.testing.assert_close(
                torch.tensor(done.log_probs), chosen(expected, done.token_ids), atol=1e-4, rtol=0
            )


class TestInversion:
    """A number in [0, 1) picks the token at which the weights, added up, exceed it."""

    @given(
        vocabulary=st.integers(1, 3 * BLOCK + 1),
        kept=st.floats(0.002, 1),
        uniform=st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 1 - 2**-53])),
        seed=st.integers(0, 99),
    )
    def test_as_by_adding_up_all(self, vocabulary, kept, uniform, seed) -> None:
        generator = np.random.default_rng(seed)
        weights = generator.random((3, vocabulary), dtype=np.float32) * (generator.random((3, vocabulary)) < kept)
        weights[:, generator.integers(vocabulary)] += 1e-3
        drawn = _inverted(torch.from_numpy(weights), torch.full((3,), uniform, dtype=torch.float64)).numpy()
        for row, token in zip(weights.astype(np.float64), drawn, strict=True):
            share = np.concatenate([[0], row.cumsum() / row.sum()])
            assert row[token] > 0
            assert share[token] - 1e-12 <= uniform <= share[token + 1] + 1e-12

    def test_weights_that_fall_into_the_last_place_of_a_block(self) -> None:
        weights = torch.zeros(2, 2 * BLOCK)
        weights[0, BLOCK - 1] = weights[1, BLOCK] = 0.3
        assert _inverted(weights, torch.tensor([0.999, 0.0], dtype=torch.float64)).tolist() == [BLOCK - 1, BLOCK]


class TestIndependence:
    """What a request gets depends on its prompt, settings and seed, not on its company in the wave."""

    def test_alone_or_with_others(self, run, ask) -> None:
        requests = [ask(prompt, seed=n, max_tokens=6 + 5 * n) for n, prompt in enumerate(PROMPTS * 3)]
        together = run(*requests)
        alone = [run(request)[0] for request in requests]
        assert [done.token_ids for done in together] == [done.token_ids for done in alone]
        backwards = run(*requests[::-1])[::-1]
        assert [done.token_ids for done in backwards] == [done.token_ids for done in alone]

    def test_a_seed_reproduces_and_another_differs(self, run, ask) -> None:
        one, again, other = run(ask("1+2=", seed=1), ask("1+2=", seed=1), ask("1+2=", seed=2))
        assert one.token_ids == again.token_ids != other.token_ids

    def test_without_a_seed_every_request_differs(self, run, ask) -> None:
        assert len({tuple(done.token_ids) for done in run(*[ask("1+2=")] * 8)}) > 1

    def test_a_shared_prompt_is_read_once_and_sampled_apart(self, model, tokenizer, ask, monkeypatch) -> None:
        rows = []
        original = model.forward

        def watch(*args: Any, **kwargs: Any) -> Any:
            rows.append(tuple(kwargs["input_ids"].shape))
            return original(*args, **kwargs)

        monkeypatch.setattr(model, "forward", watch)
        done = generate(model, tokenizer, [ask("1+2=", seed=n) for n in range(6)] + [ask("7", seed=0)])
        assert rows[0] == (2, 4)
        assert rows[1][0] > 2
        assert len({tuple(item.token_ids) for item in done[:6]}) > 1

    def test_continuing_an_interrupted_answer_draws_new_numbers(self, ask, tokenizer) -> None:
        start, later = ask("1+2=", seed=1), ask("1+2=3", seed=1)
        assert not torch.equal(start.uniforms(), later.uniforms())


class TestSampling:
    """Temperature, top-k and top-p shape the distribution as they are defined."""

    def test_top_k_of_one_is_greedy(self, run, ask) -> None:
        greedy, top = run(ask("7", temperature=0.0), ask("7", top_k=1, seed=5))
        assert greedy.token_ids == top.token_ids

    @pytest.mark.parametrize("params", [{"top_k": 3}, {"top_p": 0.4}, {"top_k": 10, "top_p": 0.5}], ids=str)
    def test_only_the_support_is_drawn_with_renormalised_frequencies(self, model, run, ask, params: dict) -> None:
        count = 4000
        done = run(*[ask("7", max_tokens=1, seed=n, **params) for n in range(count)])
        frequency = Counter(item.token_ids[0] for item in done)
        expected = truncated(forward(model, ask("7"), [0]).exp()[0], **params)
        assert set(frequency) <= set(expected.nonzero()[:, 0].tolist())
        drawn = torch.zeros_like(expected)
        drawn[list(frequency)] = torch.tensor([frequency[token] / count for token in frequency])
        assert (drawn - expected).abs().max() < 4 * 0.5 / count**0.5

    def test_requests_of_one_wave_keep_their_own_settings(self, run, ask) -> None:
        plain = [run(ask("7", seed=4))[0], run(ask("7", seed=4, top_k=1))[0], run(ask("7", temperature=0.0))[0]]
        mixed = run(ask("7", seed=4), ask("7", seed=4, top_k=1), ask("7", temperature=0.0))
        assert [done.token_ids for done in mixed] == [done.token_ids for done in plain]


def truncated(probs: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """By the definitions, one token after the other."""
    kept, mass = [], 0.0
    order = probs.argsort(descending=True).tolist()[: top_k or None]
    whole = float(probs[order].sum())
    for token in order:
        if mass >= top_p * whole:
            break
        kept.append(token)
        mass += float(probs[token])
    result = torch.zeros_like(probs)
    result[kept] = probs[kept] / probs[kept].sum()
    return result


class TestEnd:
    """An answer ends at the end token, a stop token, a stop string or its budget, and keeps what ended it."""

    def test_budgets_are_each_requests_own(self, run, ask) -> None:
        done = run(*[ask("7", max_tokens=n, seed=n, ignore_eos=True) for n in (0, 1, 5, 17)])
        assert [len(item.token_ids) for item in done] == [len(item.log_probs) for item in done] == [0, 1, 5, 17]
        assert all(item.finished for item in done)

    def test_end_token(self, model, tokenizer, run, ask) -> None:
        free = run(ask("7", seed=1, ignore_eos=True))[0].token_ids
        ending = SimpleNamespace(eos_token_id=free[4], pad_token_id=tokenizer.pad_token_id)
        (ended,) = generate(model, ending, [ask("7", seed=1)])
        assert ended.token_ids == free[: free.index(free[4]) + 1]
        assert ended.finished
        assert generate(model, ending, [ask("7", seed=1, ignore_eos=True)])[0].token_ids == free

    def test_stop_token(self, run, ask) -> None:
        free = run(ask("7", seed=1, ignore_eos=True))[0].token_ids
        stopped = run(ask("7", seed=1, ignore_eos=True, stop_token_ids=[free[3]]))[0]
        assert stopped.token_ids == free[: free.index(free[3]) + 1]
        assert stopped.finished

    def test_stop_string_over_several_tokens(self, run, ask, tokenizer) -> None:
        ascii_ids = [n for n in range(256) if len(tokenizer.decode([n])) == 1 and tokenizer.decode([n]).isascii()]
        for seed in itertools.count():
            free = run(ask("7", seed=seed, ignore_eos=True))[0].token_ids
            if free[2] in ascii_ids and free[3] in ascii_ids:
                break
        stop = tokenizer.decode(free[2:4])
        stopped = run(ask("7", seed=seed, ignore_eos=True, stop=["never", stop]))[0]
        assert stopped.token_ids == free[: len(stopped.token_ids)]
        assert stop in tokenizer.decode(stopped.token_ids)
        assert stop not in tokenizer.decode(stopped.token_ids[:-1])

    def test_interruption_returns_what_there_is(self, run, ask) -> None:
        calls = itertools.count()
        whole = run(*[ask(prompt, seed=1, ignore_eos=True) for prompt in PROMPTS])
        part = run(
            ask(PROMPTS[0], max_tokens=2, seed=1, ignore_eos=True),
            *[ask(prompt, seed=1, ignore_eos=True) for prompt in PROMPTS[1:]],
            interrupted=lambda: next(calls) >= 5,
        )
        assert [len(done.token_ids) for done in part] == [2, 5, 5, 5]
        assert [done.finished for done in part] == [True, False, False, False]
        assert part[1].token_ids == whole[1].token_ids[:5]
        assert run(ask("7"), interrupted=lambda: True)[0] == Completion()


class TestSamplingParams:
    """verl's sampling parameters become a request; what the engine cannot do is refused."""

    def test_names(self) -> None:
        params = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 3, "logprobs": True, "repetition_penalty": 1.0}
        request = Request.from_sampling_params([1, 2], {**params, "stop": "x", "stop_token_ids": (4,)}, 9)
        assert request == Request([1, 2], 9, 0.5, 0.9, 7, 3, ["x"], [4])

    @pytest.mark.parametrize(
        ("params", "limit"),
        [({}, 9), ({"max_tokens": 4}, 4), ({"max_new_tokens": 5}, 5), ({"max_tokens": 50}, 9), ({"max_tokens": 0}, 0)],
        ids=str,
    )
    def test_budget(self, params: dict, limit: int) -> None:
        assert Request.from_sampling_params([1], params, 9).max_tokens == limit

    def test_repetition_penalty_is_refused(self, sentence) -> None:
        with pytest.raises(DataError) as error:
            Request.from_sampling_params([1], {"repetition_penalty": 1.1}, 9)
        sentence(error.value, "repetition_penalty", "1.1", "leave it at 1.0")


Serve = Callable[..., rollout.TransformersServer]


@pytest.fixture
def serve(model, tokenizer, tmp_path, monkeypatch) -> Serve:
    """Makes servers as their actor runs them, on a model that was saved like the preset's."""
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    limits = {"response_length": 12, "max_num_seqs": 4, "max_model_len": 40}
    config = RolloutConfig(name="transformers", load_format="auto", dtype="float32", **limits)
    monkeypatch.setattr(rollout, "omega_conf_to_dataclass", lambda section: section)
    monkeypatch.setattr(rollout, "get_device_name", lambda: "cpu")

    def one(generation: GenerationConfig | None = None, **of_config: Any) -> rollout.TransformersServer:
        hf_config = AutoConfig.from_pretrained(tmp_path, **of_config)
        settings = SimpleNamespace(local_path=str(tmp_path), hf_config=hf_config, trust_remote_code=False)
        settings.tokenizer, settings.generation_config = tokenizer, generation
        return rollout.TransformersServer(config, settings, None)

    return one


@pytest.fixture
def server(serve) -> rollout.TransformersServer:
    return serve()


class TestServer:
    """Requests of one moment are a wave; weights change between waves; an abort returns what there is."""

    def request(self, tokenizer: Any, prompt: str, **params: Any) -> dict[str, Any]:
        ids = tokenizer(prompt)["input_ids"]
        return {"request_id": prompt, "prompt_ids": ids, "sampling_params": {"seed": 1, "ignore_eos": True, **params}}

    def waves(self, monkeypatch: pytest.MonkeyPatch) -> list[list[Request]]:
        seen = []

        def watch(model, tokenizer, requests, *others):
            seen.append(list(requests))
            return generate(model, tokenizer, requests, *others)

        monkeypatch.setattr(rollout, "generate", watch)
        return seen

    def test_a_wave_has_at_most_max_num_seqs_and_an_order_of_its_own(self, server, tokenizer, monkeypatch) -> None:
        waves = self.waves(monkeypatch)
        requests = [self.request(tokenizer, "7", seed=seed) for seed in (5, 3, 4, 2, 1, 0)]

        async def run() -> list[Any]:
            await server.ready()
            await server.set_global_steps(7)
            return await server.generate_many(requests)

        done = asyncio.run(run())
        assert [[request.seed for request in wave] for wave in waves] == [[2, 3, 4, 5], [0, 1]]
        assert {output.stop_reason for output in done} == {"length"}
        assert {output.extra_fields["global_steps"] for output in done} == {7}
        assert [len(output.token_ids) for output in done] == [12] * 6

    def test_a_request_that_fails_does_not_fail_the_others(self, server, tokenizer, sentence) -> None:
        async def run() -> list[Any]:
            await server.ready()
            long = self.request(tokenizer, "x" * 40)
            bad = self.request(tokenizer, "7", repetition_penalty=2.0)
            return await server.generate_many([long, bad, self.request(tokenizer, "7")])

        long, bad, good = asyncio.run(run())
        sentence(long, "prompt of 40 tokens", "max_model_len")
        sentence(bad, "repetition_penalty")
        assert len(good.token_ids) == 12

    @pytest.mark.parametrize(("asked", "given"), [(5, 5), (20, 20), (99, 39)])
    def test_a_request_may_name_a_limit_of_its_own(self, server, tokenizer, asked, given) -> None:
        async def run() -> Any:
            await server.ready()
            return await server.generate(**self.request(tokenizer, "7", max_tokens=asked))

        assert len(asyncio.run(run()).token_ids) == given

    @pytest.mark.parametrize("place", [1, 3])
    @pytest.mark.parametrize("where", ["the model's configuration", "that of its generation"])
    def test_every_end_that_the_model_names_is_one(self, model, serve, tokenizer, place, where) -> None:
        """As other servers have it: models of chats name several."""
        free = generate(model, tokenizer, [Request(tokenizer("7")["input_ids"], 12, seed=1, ignore_eos=True)])[0]
        named = [255, free.token_ids[place]]
        server = serve(GenerationConfig(eos_token_id=named)) if "its" in where else serve(eos_token_id=named)

        async def run() -> Any:
            await server.ready()
            return await server.generate(**self.request(tokenizer, "7", ignore_eos=False))

        answer, length = asyncio.run(run()), free.token_ids.index(named[1]) + 1
        assert (answer.token_ids, answer.stop_reason) == (free.token_ids[:length], "stop")

    def test_prompt_and_response_fit_into_the_model_length(self, server, tokenizer) -> None:
        async def run() -> Any:
            await server.ready()
            return await server.generate(**self.request(tokenizer, "x" * 35))

        assert len(asyncio.run(run()).token_ids) == 5

    def test_abort_and_resume(self, server, tokenizer, monkeypatch) -> None:
        whole: list[int] = []

        def slow(model, tokenizer, requests, interrupted, ends):
            whole.extend(generate(model, tokenizer, requests)[0].token_ids)
            started.set()
            while not interrupted():
                pass
            calls = itertools.count()
            return generate(model, tokenizer, requests, lambda: next(calls) >= 3)

        async def run() -> tuple[Any, Any]:
            nonlocal started
            started = asyncio.Event()
            loop = asyncio.get_running_loop()
            monkeypatch.setattr(started, "set", lambda: loop.call_soon_threadsafe(asyncio.Event.set, started))
            await server.ready()
            first = asyncio.ensure_future(server.generate(**self.request(tokenizer, "7")))
            await started.wait()
            await server.abort_all_requests()
            aborted = await first
            waiting = asyncio.ensure_future(server.generate(**self.request(tokenizer, "7")))
            await asyncio.sleep(0.02)
            assert not waiting.done()
            monkeypatch.setattr(rollout, "generate", generate)
            await server.resume_generation()
            return aborted, await waiting

        started: Any = None
        monkeypatch.setattr(rollout, "generate", slow)
        aborted, resumed = asyncio.run(run())
        assert (aborted.stop_reason, resumed.stop_reason) == ("aborted", "length")
        assert aborted.token_ids == whole[:3] == resumed.token_ids[:3]

    def test_a_server_that_stopped_serving_answers_with_the_cause(self, server, tokenizer, monkeypatch) -> None:
        async def broken() -> None:
            raise ValueError("the cause")

        monkeypatch.setattr(server, "_gather", broken)

        async def run() -> list[Any]:
            await server.ready()
            return await server.generate_many([self.request(tokenizer, "7")])

        [answer] = asyncio.run(run())
        assert "stopped serving" in str(answer)
        assert str(answer.__cause__) == "the cause"

    def test_a_leaving_server_sends_requests_back(self, server, tokenizer) -> None:
        """verl's client then asks another one; an error would end the session."""

        async def run() -> Any:
            await server.ready()
            await server.set_global_steps(3)
            await server.abort_all_requests(reject_request=True)
            return await server.generate(**self.request(tokenizer, "7"))

        answer = asyncio.run(run())
        assert (answer.token_ids, answer.log_probs, answer.stop_reason) == ([], [], "aborted")
        assert answer.extra_fields == {"global_steps": 3}

    def test_new_weights_are_copied_in_and_unknown_ones_refused(self, server, tokenizer, sentence) -> None:
        other = make_model(ModelSettings(**{**SETTINGS.__dict__, "seed": 9})).eval()
        weights = dict(other.named_parameters())

        async def listed(given: Any) -> list[dict[str, Tensor]]:
            return [bucket async for bucket in rollout._buckets(given, limit=4096)]

        async def arriving() -> Any:
            for pair in weights.items():
                yield pair

        buckets = asyncio.run(listed(weights.items()))
        assert [list(bucket) for bucket in asyncio.run(listed(arriving()))] == [list(bucket) for bucket in buckets]
        assert len(buckets) > 1
        assert [name for bucket in buckets for name in bucket] == list(weights)

        async def run() -> Any:
            await server.ready()
            for bucket in buckets:
                await server.load_weights(bucket)
            return await server.generate(**self.request(tokenizer, "7"))

        request = Request(tokenizer("7")["input_ids"], 12, seed=1, ignore_eos=True)
        assert asyncio.run(run()).token_ids == generate(other, tokenizer, [request])[0].token_ids
        with pytest.raises(DataError) as error:
            asyncio.run(server.load_weights({"strange": torch.zeros(1)}))
        sentence(error.value, "'strange'")
