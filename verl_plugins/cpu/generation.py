"""Batched generation with a Transformers model and a KV cache: the engine inside the rollout server.

Notation: R requests decoded together (a wave), V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from verl_plugins.errors import DataError

BLOCK = 256
"""Tokens whose probabilities are added up before it is known in which block the drawn one lies."""


@dataclass
class Request:
    """One prompt to continue."""

    prompt_ids: list[int]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False

    @classmethod
    def from_sampling_params(cls, prompt_ids: Sequence[int], params: dict[str, Any], max_tokens: int) -> Request:
        """The request that verl's sampling parameters describe; `max_tokens` is the limit when they name none."""
        limit = next((params[k] for k in ("max_tokens", "max_new_tokens") if params.get(k) is not None), max_tokens)
        if params.get("repetition_penalty", 1.0) != 1.0:
            raise DataError(
                f"sampling parameter repetition_penalty: {params['repetition_penalty']} is not supported by the "
                "transformers rollout; leave it at 1.0"
            )
        stop = params.get("stop") or []
        return cls(
            prompt_ids=list(prompt_ids),
            max_tokens=min(int(limit), max_tokens),
            temperature=float(params.get("temperature", 1.0)),
            top_p=float(params.get("top_p", 1.0)),
            top_k=int(params.get("top_k", -1)),
            seed=params.get("seed"),
            stop=[stop] if isinstance(stop, str) else list(stop),
            stop_token_ids=list(params.get("stop_token_ids") or []),
            ignore_eos=bool(params.get("ignore_eos", False)),
        )

    def uniforms(self) -> Tensor:
        """[max_tokens] the request's own random numbers; another prefix of the same request gets other ones."""
        seed = int.from_bytes(os.urandom(8), "little") if self.seed is None else int(self.seed)
        generator = np.random.default_rng([seed, len(self.prompt_ids)])
        return torch.from_numpy(generator.random(self.max_tokens, dtype=np.float64))


@dataclass
class Completion:
    """The tokens generated for one request."""

    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finished: bool = False
    """False when generation was interrupted."""
    ended: bool = False
    """Whether it ended by itself, and not at its limit."""

    @property
    def stop_reason(self) -> str:
        """`stop`, `length` or `aborted`."""
        return "stop" if self.ended else "length" if self.finished else "aborted"


def end_tokens(*configs: Any) -> frozenset[int]:
    """Every token that ends a generation, of a tokenizer and of a model's configurations: one, several or none each."""
    named = [getattr(config, "eos_token_id", None) for config in configs]
    several = [ids if isinstance(ids, (list, tuple)) else [ids] for ids in named]
    return frozenset(token for ids in several for token in ids if token is not None)


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    interrupted: Callable[[], bool] = lambda: False,
    ends: Collection[int] | None = None,
) -> list[Completion]:
    """Decode all requests as one wave; `ends` are the tokens that end a completion, without them the tokenizer's one.

    Log-probs are those of the temperature-scaled distribution before top-p and top-k, as the actor computes them
    (of the unscaled one for greedy requests). Rows that are done leave the wave once half of it is.
    """
    ends = {tokenizer.eos_token_id} if ends is None else ends
    completions = [Completion(finished=request.max_tokens == 0) for request in requests]
    alive = [row for row, request in enumerate(requests) if request.max_tokens > 0]
    if not alive:
        return completions
    state = _prefill(model, tokenizer, [requests[row] for row in alive])
    sampler = _Sampler([requests[row] for row in alive], model.device)
    while alive and not interrupted():
        tokens, log_probs = sampler.draw(state.logits)
        _record(tokenizer, ends, requests, completions, alive, tokens, log_probs)
        keep = [place for place, row in enumerate(alive) if not completions[row].finished]
        if not keep:
            break
        if len(keep) <= len(alive) // 2:
            index = torch.tensor(keep, device=model.device)
            alive = [alive[place] for place in keep]
            tokens, sampler = tokens[index], sampler.select(index)
            state.select(index)
        done = torch.tensor([completions[row].finished for row in alive], device=model.device)
        state.advance(model, tokens, done)
    return completions


@dataclass
class _State:
    """The wave between two tokens: KV cache, mask [R, length], next-token logits [R,V]."""

    cache: DynamicCache
    mask: Tensor
    logits: Tensor

    def select(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]

    def advance(self, model: PreTrainedModel, tokens: Tensor, done: Tensor) -> None:
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        positions = (self.mask.sum(1) - 1).masked_fill(done, 0)  # who is done may be past the model's last position
        output = model(
            input_ids=tokens[:, None],
            attention_mask=self.mask,
            position_ids=positions[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.logits = output.logits[:, -1].float()


def _prefill(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request]) -> _State:
    """Read all prompts, left-padded; a prompt that several requests share is read once."""
    place: dict[tuple[int, ...], int] = {}
    shared = torch.tensor([place.setdefault(tuple(r.prompt_ids), len(place)) for r in requests], device=model.device)
    width = max(len(prompt) for prompt in place)
    ids = torch.full((len(place), width), tokenizer.pad_token_id)
    mask = torch.zeros((len(place), width), dtype=torch.long)
    for row, prompt in enumerate(place):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    cache = DynamicCache()
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
    )
    state = _State(cache, mask, output.logits[:, -1].float()[shared])
    state.select(shared)
    return state


class _Sampler:
    """Temperature, top-k and top-p per request, sampling by inverting the distribution at the request's numbers."""

    def __init__(self, requests: Sequence[Request], device: torch.device) -> None:
        self.temperature = torch.tensor([r.temperature for r in requests], device=device)
        self.top_p = torch.tensor([r.top_p for r in requests], device=device)
        self.top_k = torch.tensor([r.top_k for r in requests], device=device)
        self.uniforms = torch.nn.utils.rnn.pad_sequence([r.uniforms() for r in requests], batch_first=True).to(device)
        self.position = 0

    def select(self, rows: Tensor) -> _Sampler:
        for name in ("temperature", "top_p", "top_k", "uniforms"):
            setattr(self, name, getattr(self, name)[rows])
        return self

    def draw(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """[R,V] logits -> [R] tokens and their log-probs."""
        greedy = self.temperature <= 0
        scale = torch.where(greedy, 1.0, self.temperature)
        log_probs = torch.log_softmax(logits if bool((scale == 1).all()) else logits / scale[:, None], -1)
        tokens = _inverted(self._truncated(log_probs.exp()), self.uniforms[:, self.position])
        if bool(greedy.any()):
            tokens = torch.where(greedy, logits.argmax(-1), tokens)
        self.position += 1
        return tokens, log_probs.gather(1, tokens[:, None])[:, 0]

    def _truncated(self, probs: Tensor) -> Tensor:
        """Zero what top-k and top-p leave out; nothing is sorted when no request asks for it."""
        vocabulary = probs.shape[-1]
        top_k = torch.where(self.top_k > 0, self.top_k.clamp(max=vocabulary), vocabulary)
        if bool((top_k == vocabulary).all()) and bool((self.top_p >= 1).all()):
            return probs
        ordered, order = probs.sort(-1, descending=True)
        place = torch.arange(vocabulary, device=probs.device)
        kept = (place < top_k[:, None]) * ordered.double()
        before = kept.cumsum(-1) - kept
        kept = torch.where(before < self.top_p[:, None] * kept.sum(-1, keepdim=True), kept, 0.0)
        return torch.zeros_like(probs).scatter_(1, order, kept.to(probs.dtype))


def _inverted(weights: Tensor, uniforms: Tensor) -> Tensor:
    """[R] the first token at which the weights [R,V], added up and divided by their sum, exceed the row's number [R].

    Added up in float64, first by blocks and then inside the block that was hit: only that one is gone through.
    """
    rows, vocabulary = weights.shape
    blocks = torch.nn.functional.pad(weights, (0, -vocabulary % BLOCK)).view(rows, -1, BLOCK)
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    block = _first_above(ends, uniforms[:, None] * ends[:, -1:])
    before = torch.nn.functional.pad(ends, (1, 0)).gather(1, block)
    inside = blocks[torch.arange(rows, device=weights.device), block[:, 0]].double().cumsum(-1)
    return (block * BLOCK + _first_above(inside, uniforms[:, None] * ends[:, -1:] - before))[:, 0]


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """[R,1] the first place at which the sums [R,n] exceed target [R,1]; rounding never leads to one of weight 0."""
    below_all = torch.nextafter(cumulative[:, -1:], torch.zeros(()).double())
    return torch.searchsorted(cumulative, target.clamp(min=0).minimum(below_all), right=True)


def _record(
    tokenizer: PreTrainedTokenizerBase,
    ends: Collection[int],
    requests: Sequence[Request],
    completions: Sequence[Completion],
    alive: Sequence[int],
    tokens: Tensor,
    log_probs: Tensor,
) -> None:
    """Append the drawn tokens to their completions and mark those that end here."""
    for row, token, log_prob in zip(alive, tokens.tolist(), log_probs.tolist(), strict=True):
        request, completion = requests[row], completions[row]
        if completion.finished:
            continue
        completion.token_ids.append(token)
        completion.log_probs.append(log_prob)
        ended = token in request.stop_token_ids or (token in ends and not request.ignore_eos)
        if request.stop and not ended:
            text = tokenizer.decode(completion.token_ids)
            ended = any(stop in text for stop in request.stop)
        completion.ended = ended
        completion.finished = ended or len(completion.token_ids) >= request.max_tokens
