"""The actor's part of an episode: micro-batches through the loss stages, and the optimiser steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from verl_plugins.bridge.defaults import ActorDefaults, LogitsDefaults
from verl_plugins.bridge.joined import JoinedMetrics
from verl_plugins.composition import outcome
from verl_plugins.composition.manager import Plugins
from verl_plugins.distilled import Distilled
from verl_plugins.errors import DataError
from verl_plugins.plugin import Plugin
from verl_plugins.testing.fakes import FakeActor
from verl_plugins.testing.record import Recorder
from verl_plugins.testing.scenario import Change, stored_as
from verl_plugins.testing.table import Table
from verl_plugins.tokens import Tokens, row_number

ALWAYS = ("prompts", "responses", "response_mask", "old_log_probs", "advantages")
"""Fields `tokens.extra` gives besides those put and those needed."""
IF_NEEDED = ("entropy", "rollout_log_probs", "ref_log_probs", "rm_scores", "verdict", "uid")
PADDING_ROWS = 2
STAGES = ("shape_logits", "distillation_loss", "policy_loss", "loss_terms", "optimizer_step")
VOCABULARY = 7
WIDTH, TOP = 5, 3
"""Of the made-up hidden states, and of what the teacher tells of each token."""


class ActorPart:
    """The actor workers."""

    def __init__(
        self, ranks: Sequence[Plugin], config: DictConfig, change: Change, seed: int, recorder: Recorder
    ) -> None:
        """`ranks` are the plugin as each rank has it; micro-batches are spread over them."""
        self._needs, self._change, self._seed, self._recorder = frozenset(ranks[0].needs), change, seed, recorder
        self._settings = config.actor_rollout_ref.actor
        self._distillation = config.distillation.distillation_loss
        self._actor = FakeActor(seed)
        if "logits" not in self._needs:
            self._actor.logits = _undeclared
        self._ranks = [Plugins([plugin], check=outcome.check) for plugin in ranks]
        self._metrics = [JoinedMetrics() for _ in ranks]
        self._own = {stage for stage in STAGES if self._ranks[0].implements(stage)}
        for plugins in self._ranks:
            plugins.add_fallback(ActorDefaults(self._actor.optimizer_step))
            plugins.add_fallback(LogitsDefaults(), "the model")

    def update(self, step: int, rows: Table, put: set[str], width: int) -> None:
        """Two mini-batches of two micro-batches each.

        Args:
            put: names of the fields plugins have added.
            width: T of the step without added padding, to which results are recorded.
        """
        if not self._own:
            return
        self._width = width
        rows = rows.rows(np.argsort(rows.keys).tolist())
        for mini_batch, part in enumerate(np.array_split(np.arange(len(rows)), 2)):
            self._actor.step, self._actor.mini_batch = step, mini_batch
            if "shape_logits" in self._own:
                for micro_batch, piece in enumerate(self._micro_batches(rows, part)):
                    self._shape(step, micro_batch, piece.copy())
            if "distillation_loss" in self._own:
                for micro_batch, piece in enumerate(self._micro_batches(rows, part)):
                    self._distil(step, mini_batch, micro_batch, piece.copy())
                self._join_metrics(step, mini_batch, "distillation_loss")
            if self._own & {"policy_loss", "loss_terms"}:
                counts = {"batch_num_tokens": int(rows.columns["response_mask"][part].sum())}
                self._settings.global_batch_info.update({**counts, "global_batch_size": len(part)})
                for micro_batch, piece in enumerate(self._micro_batches(rows, part)):
                    self._losses(step, mini_batch, micro_batch, piece, put)
                self._join_metrics(step, mini_batch)
            if "optimizer_step" in self._own:
                self._optimizer_step()

    def weights(self) -> Any:
        """A copy of model and optimiser."""
        return copy.deepcopy((self._actor.module.state_dict(), self._actor.optimizer.state_dict()))

    def set_weights(self, weights: Any) -> None:
        """Put such a copy in place."""
        module, optimizer = copy.deepcopy(weights)
        self._actor.module.load_state_dict(module)
        self._actor.optimizer.load_state_dict(optimizer)

    def _micro_batches(self, rows: Table, part: np.ndarray) -> list[Table]:
        pieces = np.array_split(part, 1 if self._change.split else 2)
        tables = [rows.rows(piece.tolist()) for piece in pieces if len(piece)]
        if self._change.shuffle:
            return [table.shuffled(place) for place, table in enumerate(tables)]
        if not self._change.pad:
            return [table.as_wide_as(int(table.columns["response_lengths"].max())) for table in tables]
        tables = [table.with_padding_rows(PADDING_ROWS) for table in tables]
        return [*tables, tables[-1].rows(range(len(tables[-1]) - PADDING_ROWS, len(tables[-1])))]

    def _losses(self, step: int, mini_batch: int, micro_batch: int, rows: Table, put: set[str]) -> None:
        rows = rows.copy()
        leaves = {
            "log_probs": rows.columns["log_probs"].clone().requires_grad_(),
            "entropy": rows.columns["current_entropy"].clone().requires_grad_(),
        }
        mask = rows.columns["response_mask"].bool()
        plugins, told = self._ranks[rank := micro_batch % len(self._ranks)], []
        tokens = Tokens(
            log_probs=leaves["log_probs"] * 1.0,  # as in training not a leaf
            old_log_probs=rows.columns["old_log_probs"],
            advantages=rows.columns["advantages"],
            response_mask=mask,
            config=self._settings,
            entropy=leaves["entropy"] * 1.0 if "current_entropy" in self._needs else None,
            extra=self._extra(rows, put),
            log=lambda owner, metrics, reduce: told.append((metrics, reduce)),
            step=step,
            mini_batch=mini_batch,
            micro_batch=micro_batch,
            seed=self._seed,
            rows=[0 if key.startswith("pad") else row_number(key) for key in rows.keys],
        )
        inputs = {f"tokens.{name}": value for name, value in vars(tokens).items() if isinstance(value, Tensor)}
        inputs = {name: value.detach() for name, value in inputs.items()}
        inputs |= {f"tokens.extra({name!r})": value for name, value in rows.columns.items()}
        for stage in sorted(self._own & {"policy_loss", "loss_terms"}, reverse=True):
            result = self._recorder.call(plugins, stage, inputs, tokens=tokens)
            for what, values in _by_name(stage, result).items():
                self._record(step, stage, f"{what} of row", values, rows, mask)
                for by, gradient in self._gradients(stage, what, values, leaves, mask).items():
                    self._record(step, stage, f"the gradient of {what} by {by} of row", gradient, rows, mask)
            if mask.any():
                logged = {key: value for metrics, _ in told for key, value in metrics.items()}
                self._recorder.note_metrics(step, stage, logged, f"micro-batch {mini_batch}.{micro_batch}")
                self._keep_metrics(stage, told, self._metrics[rank])
            told.clear()

    def _shape(self, step: int, micro_batch: int, rows: Table) -> None:
        """Made-up logits [B,T,V], and the shaped log-prob of a token of each."""
        stage, ids, mask = "shape_logits", rows.columns["responses"], rows.columns["response_mask"].bool()
        angle = rows.columns["log_probs"][..., None] * torch.arange(1, VOCABULARY + 1) + ids[..., None]
        leaf = (5 * angle.sin()).requires_grad_()
        logits = leaf * 1.0
        plugins = self._ranks[micro_batch % len(self._ranks)]
        shaped = self._recorder.call(plugins, stage, {"logits": logits.detach()}, logits=logits)
        if not torch.isfinite(shaped).all():
            return self._recorder.fault("result", stage, "gives logits that are not finite")
        chosen = shaped.log_softmax(-1).gather(-1, (ids % VOCABULARY)[..., None])[..., 0]
        self._record(step, stage, "the log-prob of row", chosen, rows, mask)
        gradients = self._gradients(stage, "logits", chosen, {"logits": leaf}, mask[..., None])
        if (gradient := gradients.get("logits")) is not None:
            self._record(step, stage, "the length of the gradient of row", gradient.norm(dim=-1), rows, mask)
        return None

    def _distil(self, step: int, mini_batch: int, micro_batch: int, rows: Table) -> None:
        """Made-up hidden states and a teacher of the response tokens that count, and the loss of each."""
        stage, mask = "distillation_loss", rows.columns["response_mask"].bool()
        angle = (rows.columns["log_probs"] + rows.columns["responses"])[mask][:, None]
        leaves = {
            "hidden": (angle * torch.arange(1, WIDTH + 1)).sin().requires_grad_(),
            "weight": torch.arange(VOCABULARY * WIDTH).float().cos().view(VOCABULARY, WIDTH).requires_grad_(),
        }
        logits = (3 * angle * torch.arange(1, VOCABULARY + 1)).cos()
        values, ids = logits.log_softmax(-1).topk(TOP, -1)
        plugins, told = self._ranks[rank := micro_batch % len(self._ranks)], []
        distilled = Distilled(
            **{name: leaf * 1.0 for name, leaf in leaves.items()},
            teacher_ids=ids,
            teacher_log_probs=values,
            temperature=torch.ones(len(ids)),
            config=self._distillation,
            log=lambda owner, metrics, reduce: told.append((metrics, reduce)),
            step=step,
            mini_batch=mini_batch,
            micro_batch=micro_batch,
        )
        inputs = {name: value.detach() for name, value in vars(distilled).items() if isinstance(value, Tensor)}
        losses = self._recorder.call(plugins, stage, inputs, distilled=distilled)
        whole = torch.zeros(mask.shape).masked_scatter(mask, losses.detach().float())
        self._record(step, stage, "the loss of row", whole, rows, mask)
        if not mask.any():
            return
        found = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
        if found[0] is None:
            self._recorder.fault("gradient", stage, "gives a loss through which no gradient reaches the policy")
        elif not torch.isfinite(found[0]).all():
            self._recorder.fault("gradient", stage, "gives a loss with a gradient that is not finite")
        else:
            norm = torch.zeros(mask.shape).masked_scatter(mask, found[0].norm(dim=-1))
            self._record(step, stage, "the length of the gradient of row", norm, rows, mask)
        logged = {key: value for metrics, _ in told for key, value in metrics.items()}
        self._recorder.note_metrics(step, stage, logged, f"micro-batch {mini_batch}.{micro_batch}")
        self._keep_metrics(stage, told, self._metrics[rank])

    def _keep_metrics(self, stage: str, told: Sequence[tuple[Mapping[str, float], str]], kept: JoinedMetrics) -> None:
        for metrics, reduce in told:
            for key, value in metrics.items():
                try:
                    kept.add(key, value, reduce)
                except DataError as error:
                    self._recorder.fault("metrics", stage, f"cannot be joined over ranks: {error}")

    def _join_metrics(self, step: int, mini_batch: int, stage: str = "") -> None:
        """What the ranks logged in one mini-batch, as it reaches the driver."""
        joined = JoinedMetrics()
        joined.join([metrics.leave() for metrics in self._metrics])
        metrics = {key: values[0] for key, (_, values) in joined.take().items()}
        stage = stage or next(name for name in ("value_loss", "policy_loss", "loss_terms") if name in self._own)
        self._recorder.note_metrics(step, stage, metrics, f"mini-batch {mini_batch}")

    def _record(self, step: int, stage: str, what: str, values: Tensor, rows: Table, mask: Tensor) -> None:
        on_tokens = values.detach().masked_fill(~mask, 0)
        sized = torch.nn.functional.pad(on_tokens, (0, self._width - on_tokens.shape[1]))
        self._recorder.note_rows(step, stage, what, rows.keys, sized)

    def _gradients(
        self, stage: str, what: str, values: Tensor, leaves: Mapping[str, Tensor], mask: Tensor
    ) -> dict[str, Tensor]:
        """Of the sum over the mask."""
        total = values[mask.reshape(values.shape)].sum()
        if not mask.any():
            return {}
        gradients: Sequence[Tensor | None] = [None] * len(leaves)
        if total.requires_grad:
            gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, retain_graph=True)
        found = {name: gradient for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None}
        if not found:
            self._recorder.fault("gradient", stage, f"gives {what} through which no gradient reaches the policy")
        for name, gradient in found.items():
            if not torch.isfinite(gradient).all():
                self._recorder.fault("gradient", stage, f"gives {what} with a gradient by {name} that is not finite")
            elif gradient.masked_fill(mask, 0).any():
                self._recorder.fault(
                    "gradient", stage, f"gives {what} that depends on {name} outside the response mask"
                )
        return found

    def _extra(self, rows: Table, put: set[str]) -> Callable[[str], Any]:
        known = {*ALWAYS, *put, *(stored_as(name) for name in self._needs & set(IF_NEEDED))}

        def extra(name: str) -> Any:
            if name not in known:
                raise DataError(f"field {name!r} did not reach the loss; declare it in needs or put it with batch.put")
            return rows.columns[name]

        return extra

    def _optimizer_step(self) -> None:
        actor, stage = self._actor, "optimizer_step"
        actor.accumulate()
        actor.metrics = {}
        norm = self._recorder.call(self._ranks[0], stage, {}, actor=actor)
        if not np.isfinite(float(norm)):
            self._recorder.fault("result", stage, f"gives {float(norm)} as the norm of the gradients")
        weights = torch.cat([parameter.detach().flatten() for parameter in actor.module.parameters()])
        if not torch.isfinite(weights).all():
            self._recorder.fault("result", stage, "leaves weights that are not finite")
        self._recorder.note_metrics(actor.step, stage, actor.metrics, f"mini-batch {actor.mini_batch}")
        self._recorder.note(actor.step, stage, f"the norm of mini-batch {actor.mini_batch}", float(norm))
        self._recorder.note(actor.step, stage, f"the weights after mini-batch {actor.mini_batch}", weights.numpy())


def _undeclared(*_: Any, **__: Any) -> Tensor:
    raise DataError("actor.logits is not there; declare logits in needs")


def _by_name(stage: str, result: Any) -> dict[str, Tensor]:
    if stage == "policy_loss":
        return {"the loss": result}
    terms: dict[str, Tensor] = {}
    for named in result:
        terms |= {f"the term {name!r}": values for name, values in (named or {}).items()}
    return terms
