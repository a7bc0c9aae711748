"""The critic's part of an episode: made-up values of its heads, and micro-batches through the stage `value_loss`."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from verl_plugins.batch import Batch
from verl_plugins.bridge.defaults import CriticDefaults
from verl_plugins.plugin import Plugin
from verl_plugins.testing.actor import ActorPart
from verl_plugins.testing.record import Recorder
from verl_plugins.testing.scenario import Change
from verl_plugins.testing.table import Table
from verl_plugins.values import Values

STAGE = "value_loss"
WIDTH = 6
"""Hidden size of the heads."""


class CriticPart(ActorPart):
    """The critic workers, whose micro-batches are made as the actor's."""

    def __init__(
        self, ranks: Sequence[Plugin], config: DictConfig, change: Change, seed: int, recorder: Recorder
    ) -> None:
        super().__init__(ranks, config, change, seed, recorder)
        self._settings = config.critic
        self._heads = ranks[0].value_heads
        self._own = {STAGE} if self._ranks[0].implements(STAGE) else set()
        for plugins in self._ranks:
            plugins.add_fallback(CriticDefaults(), "verl's critic")

    def known(self, step: int, rows: Table) -> dict[str, Tensor]:
        """Fields of a batch for a plugin that needs values, whatever the order of the rows."""
        if "values" not in self._needs:
            return {}
        heads = self._drawn(step, rows, 0)
        if self._change.pad:  # other values at tokens that the policy did not generate
            heads = heads - 3.0 * ~rows.columns["response_mask"].bool()[..., None]
        draws = [self._rng(step, key, 1).normal(size=self._heads) for key in rows.keys]
        ends = torch.tensor(np.array(draws), dtype=torch.float32)
        return {"values": heads.mean(-1), "head_values": heads, "bootstrap_values": ends}

    @staticmethod
    def estimated(plain: Tensor, batch: Batch) -> Tensor:
        """In the place of verl's GAE: an advantage in which values and what follows a row have a part."""
        behind = batch.bootstrap[:, None]
        batch.take_assigned()
        return (plain + 0.25 * (behind - batch.values)) * batch.response_mask

    def update(self, step: int, rows: Table, put: set[str], width: int) -> None:
        """Two mini-batches of two micro-batches each; `width` as in `ActorPart.update`."""
        if not self._own:
            return
        self._width = width
        rows = rows.rows(np.argsort(rows.keys).tolist())
        for mini_batch, part in enumerate(np.array_split(np.arange(len(rows)), 2)):
            for micro_batch, piece in enumerate(self._micro_batches(rows, part)):
                self._value_losses(step, mini_batch, micro_batch, piece.copy())
            self._join_metrics(step, mini_batch)

    def _value_losses(self, step: int, mini_batch: int, micro_batch: int, rows: Table) -> None:
        mask, told = rows.columns["response_mask"].bool(), []
        leaf = self._drawn(step, rows, 2).requires_grad_()
        weight = torch.randn(self._heads, WIDTH, generator=torch.Generator().manual_seed(step)).requires_grad_()
        values = Values(
            values=leaf * 1.0,  # as in training not a leaf
            old_values=self._drawn(step, rows, 0),
            returns=self._drawn(step, rows, 3).mean(-1),
            response_mask=mask,
            config=self._settings,
            head_weight=weight * 1.0 if self._heads > 1 else None,
            log=lambda owner, metrics, reduce: told.append((metrics, reduce)),
            step=step,
            mini_batch=mini_batch,
            micro_batch=micro_batch,
        )
        rank = micro_batch % len(self._ranks)
        inputs = {f"values.{name}": value for name, value in vars(values).items() if isinstance(value, Tensor)}
        inputs = {name: value.detach() for name, value in inputs.items()}
        losses = self._recorder.call(self._ranks[rank], STAGE, inputs, values=values)
        self._record(step, STAGE, "the loss of row", losses, rows, mask)
        for name, gradient in self._gradients(STAGE, "the loss", losses, {"values": leaf}, mask[..., None]).items():
            self._record(step, STAGE, f"the gradient by {name} of row", gradient.sum(-1), rows, mask)
        if mask.any():
            logged = {key: value for metrics, _ in told for key, value in metrics.items()}
            self._recorder.note_metrics(step, STAGE, logged, f"micro-batch {mini_batch}.{micro_batch}")
            self._keep_metrics(STAGE, told, self._metrics[rank])

    def _drawn(self, step: int, rows: Table, what: int) -> Tensor:
        """[B,T,N] numbers of these rows, the same at any width."""
        wide = rows.width
        draws: list[Any] = [self._rng(step, key, what).normal(size=(wide, self._heads)) for key in rows.keys]
        return torch.tensor(np.array(draws).reshape(len(rows), wide, self._heads), dtype=torch.float32)

    def _rng(self, step: int, key: str, what: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, step, what, zlib.crc32(key.encode())])
