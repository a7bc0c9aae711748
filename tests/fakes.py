"""A run without a trainer: what a plugin's hooks need of `Run`, and what they logged."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf


class FakeDataset:
    """`size` rows without content."""

    fingerprint = "fake"

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, prompt_id: int) -> dict[str, Any]:
        return {"raw_prompt": [{"role": "user", "content": str(prompt_id)}]}


@dataclass
class FakeRun:
    """Set `step`, `seed` and what is in flight; read `metrics`."""

    dataset: FakeDataset = field(default_factory=lambda: FakeDataset(0))
    config: DictConfig = field(default_factory=lambda: OmegaConf.create({}))
    step: int = 1
    seed: int = 0
    flying: Sequence[int] = ()
    tokenizer: Any = None
    metrics: dict[str, float] = field(default_factory=dict)
    stopped: str | None = None

    def log(self, metrics: Mapping[str, float]) -> None:
        self.metrics.update(metrics)

    def rng(self, name: str = "") -> np.random.Generator:
        return np.random.default_rng([self.seed, self.step, zlib.crc32(name.encode())])

    def in_flight(self) -> np.ndarray:
        return np.array(self.flying, dtype=np.int64)

    def stop(self, reason: str) -> None:
        self.stopped = reason
