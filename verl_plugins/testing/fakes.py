"""Stand-ins for what a trainer hands to hooks: tests of plugins need neither verl nor a model.

Where a trainer would ask the policy, they answer with made-up numbers that depend on the arguments alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from verl_plugins.batch import Batch
from verl_plugins.bridge.moving import moved
from verl_plugins.services import Generated


class FakeDataset:
    """`size` rows with a question each."""

    fingerprint = "fake"

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, prompt_id: int) -> dict[str, Any]:
        return {"raw_prompt": [{"role": "user", "content": str(prompt_id)}]}


class FakeTokenizer:
    """A token per byte, and one that ends a text."""

    eos_token_id = 256
    pad_token_id = 257

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode()) + [self.eos_token_id] * add_special_tokens}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return bytes(int(token) for token in ids if token < self.eos_token_id).decode(errors="replace")

    def batch_decode(self, rows: Sequence[Sequence[int]], skip_special_tokens: bool = True) -> list[str]:
        return [self.decode(row) for row in rows]

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True, tokenize: bool = True
    ) -> str | list[int]:
        text = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        return self(text)["input_ids"] if tokenize else text


@dataclass
class FakeRun:
    """See `verl_plugins.services.Run`: set `step`, `seed` and what is in flight; read `metrics` and `stopped`."""

    dataset: Any = field(default_factory=lambda: FakeDataset(0))
    config: DictConfig = field(default_factory=lambda: OmegaConf.create({}))
    step: int = 1
    seed: int = 0
    flying: Sequence[int] = ()
    tokenizer: Any = field(default_factory=FakeTokenizer)
    metrics: dict[str, float] = field(default_factory=dict)
    stopped: str | None = None
    _generators: dict[tuple[int, int, str], np.random.Generator] = field(default_factory=dict, repr=False)

    @property
    def update(self) -> int:
        """One to a step, as in all modes but `separate_async`."""
        return self.step

    def log(self, metrics: Mapping[str, float]) -> None:
        self.metrics.update(metrics)

    def rng(self, name: str = "") -> np.random.Generator:
        """As in training: within one step, the same name goes on where it stopped."""
        key = (self.seed, self.step, name)
        if key not in self._generators:
            self._generators[key] = np.random.default_rng([self.seed, self.step, zlib.crc32(name.encode())])
        return self._generators[key]

    def in_flight(self) -> np.ndarray:
        return np.array(self.flying, dtype=np.int64)

    def stop(self, reason: str) -> None:
        self.stopped = reason

    def log_probs(self, batch: Batch, temperature: float | None = None) -> Tensor:
        within = torch.arange(batch.responses.shape[1]) < batch.lengths[:, None]
        return plausible(batch.responses, temperature) * within

    def score(self, prompts: Sequence, targets: Sequence) -> list[Tensor]:
        pairs = zip(map(self._ids, prompts), map(self._ids, targets), strict=True)
        return [plausible(torch.tensor(target, dtype=torch.int64) + sum(prompt)) for prompt, target in pairs]

    def generate(
        self, prompts: Sequence, n: int = 1, temperature: float | None = None, max_tokens: int | None = None
    ) -> list[list[Generated]]:
        return [[self._answer(sum(self._ids(prompt)) + k, max_tokens) for k in range(n)] for prompt in prompts]

    def _answer(self, number: int, max_tokens: int | None) -> Generated:
        ids = [*self.tokenizer(str(number % 20))["input_ids"], self.tokenizer.eos_token_id][:max_tokens]
        return Generated(ids, plausible(torch.tensor(ids)).tolist(), self.tokenizer.decode(ids))

    def _ids(self, text: Any) -> list[int]:
        """Chat messages, text or token ids -> token ids."""
        if isinstance(text, str):
            return self.tokenizer(text)["input_ids"]
        if len(text) and isinstance(text[0], Mapping):
            return self.tokenizer.apply_chat_template(text)
        return [int(token) for token in text]


def plausible(ids: Tensor, temperature: float | None = None) -> Tensor:
    """Token ids -> float32 log-probs of the same shape, from -2 to -1/8 at temperature 1."""
    return -((ids * 31 + 7) % 16 + 1).float() / 8 / (1.0 if temperature is None else temperature)


class TinyModel(torch.nn.Module):
    """Embedding, one layer, output head: 384 parameters with the names of a language model's ends."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        make = torch.nn.utils.skip_init  # the layers' own initialisation would use the global generator
        self.embed_tokens = make(torch.nn.Embedding, 16, 8)
        self.layer = make(torch.nn.Linear, 8, 16, bias=False)
        self.lm_head = make(torch.nn.Linear, 8, 16, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        """[n] token ids -> [n,16] logits."""
        hidden = self.embed_tokens(ids)
        return self.lm_head(hidden + self.layer(hidden).tanh() @ self.layer.weight)


class FakeActor:
    """See `verl_plugins.services.Actor`: a tiny model, AdamW, and gradients that `accumulate` makes up."""

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self.module = TinyModel(torch.Generator().manual_seed(seed))
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-3)
        self.step, self.mini_batch = 1, 0
        self.metrics: dict[str, float] = {}

    def log(self, metrics: Mapping[str, float]) -> None:
        self.metrics.update(metrics)

    def parameters(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self.module.parameters() if parameter.requires_grad]

    def logits(self, tokens: int, at: Iterable[Tensor] | None = None) -> Tensor:
        """[n,16] those of the model's 16 tokens, as many as are asked for."""
        with moved(self.parameters(), at), torch.no_grad():
            return self.module(torch.arange(16)[:tokens])

    def gather(self, values: Tensor) -> Tensor:
        return values

    def distillation_gradient(self) -> list[Tensor]:
        """Made up, half of what `accumulate` makes plus something of its own."""
        return [0.5 * parameter.grad - 0.1 * parameter.detach() for parameter in self.module.parameters()]

    def gradients(self, name: str, parameters: Sequence[Tensor]) -> dict[float, list[Tensor]]:
        """Two parts that add up to the gradients there are."""
        first = [plausible(torch.arange(one.numel())).view(one.shape) * one.grad for one in parameters]
        return {1.0: first, 2.0: [one.grad - part for one, part in zip(parameters, first, strict=True)]}

    def accumulate(self) -> None:
        """Gradients of one mini-batch, a function of seed, step and mini-batch."""
        generator = torch.Generator().manual_seed(hash((self._seed, self.step, self.mini_batch)) & 0xFFFFFFFF)
        for parameter in self.module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)

    def optimizer_step(self) -> float:
        """What verl's engine does: clip, step, forget the gradients; returns their norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)
