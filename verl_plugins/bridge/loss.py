"""The actor's loss: verl's `ppo_loss`, and its distillation loss where there is a teacher, with what plugins give.

They give the policy loss per token, additional terms, and the distillation loss per token (`bridge/heads.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.distillation import distillation_ppo_loss
from verl.trainer.distillation.losses import compute_topk_loss, distillation_loss
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, agg_loss
from verl.utils import tensordict_utils as tu
from verl.utils.metric import Metric
from verl.workers.config import ActorConfig, DistillationConfig
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import no_padding_2_padding

from verl_plugins.bridge.defaults import DEFAULT_LOSS, clip_metrics
from verl_plugins.bridge.heads import HeadLosses
from verl_plugins.bridge.joined import JoinedMetrics
from verl_plugins.composition.blame import crossing
from verl_plugins.composition.manager import Plugins
from verl_plugins.errors import DataError, ResultError
from verl_plugins.tokens import Tokens

LOSS_NAME = "verl_plugins"
LOSS_STAGES = ("policy_loss", "loss_terms")
STEP_KEY = "verl_plugins_step"
"""Under this key the driver sends the training step along with the batch."""
CLIP_METRICS = {
    "actor/pg_clipfrac": "clip_fraction",
    "actor/pg_clipfrac_lower": "dual_clip_fraction",
    "actor/ppo_kl": "kl",
}
"""verl's names, which stay whatever loss is in place."""
ROW_FIELD = "verl_plugins_row"
"""Field of the queue with a number for each row's key: who a row is, wherever it is computed."""


class PluginLoss:
    """Called by verl's engine for every micro-batch, in the place of `ppo_loss`."""

    def __init__(
        self,
        plugins: Plugins,
        config: ActorConfig,
        seed: int,
        metrics: JoinedMetrics,
        distillation: DistillationConfig | None = None,
    ) -> None:
        self.plugins, self.config, self.distillation = plugins, config, distillation
        self.head_losses: HeadLosses | None = None
        """Where a plugin gives the distillation loss: what it gave in this forward pass."""
        self._distilling = False
        self._seed, self._metrics = seed, metrics
        self.step = self.mini_batch = self.micro_batch = 0
        self._data: TensorDict | None = None
        self._entropy: Tensor | None = None
        self._tokens: Tokens | None = None
        self._clipped: dict[str, float] = {}
        if plugins.implements("policy_loss"):
            POLICY_LOSS_REGISTRY[LOSS_NAME] = self._policy_loss
            object.__setattr__(config.policy_loss, "loss_mode", LOSS_NAME)

    def __call__(
        self,
        model_output: dict[str, Tensor] | None = None,
        data: TensorDict | None = None,
        dp_group: Any = None,
        student_logits: Tensor | None = None,
        data_format: str = "thd",
    ) -> Any:
        """Loss and metrics; or, asked with logits [1,tokens,V] first, what a teacher says of them by name, [1,tokens].

        So does verl's own loss where it distils.
        """
        if student_logits is not None:
            return self._from_teacher(student_logits, data, data_format)
        with crossing():
            return self._loss(model_output, data, dp_group)

    def _from_teacher(self, logits: Tensor, data: TensorDict, data_format: str) -> dict[str, Tensor]:
        given = (self.config, self.distillation, data, logits, data_format)
        if self.head_losses is None:
            return compute_topk_loss(*given)
        with torch.no_grad():  # what is only measured
            measured = compute_topk_loss(*given)
        losses = self.head_losses.take(data)[None]
        if self._distilling or not self.distillation.distillation_loss.use_task_rewards:
            # FSDP2 gathers what lies around the head when a gradient reaches the model's output, be it of zeros.
            losses = losses + 0.0 * logits[..., 0]
        return {**measured, "distillation_losses": losses}

    @contextmanager
    def distilling(self) -> Iterator[None]:
        """The distillation loss alone, and no metrics."""
        self._distilling = True
        try:
            yield
        finally:
            self._distilling = False

    def described(self) -> dict[str, Any]:
        """What a `Distilled` of the current micro-batch has besides tensors."""
        places = {"step": self.step, "mini_batch": self.mini_batch, "micro_batch": self.micro_batch}
        return {"config": self.distillation.distillation_loss, "log": self._log, **places}

    def _loss(
        self, model_output: dict[str, Tensor], data: TensorDict, dp_group: Any
    ) -> tuple[Tensor, dict[str, Metric]]:
        data = of_masked_tokens(data)
        self._data, self._tokens, entropy = data, None, model_output.get("entropy")
        self._entropy = None if entropy is None else no_padding_2_padding(entropy, data)
        if self._distilling:
            loss, _ = distillation_loss(self.config, self.distillation, model_output, data)
            return loss * self.distillation.distillation_loss.distillation_loss_coef, {}
        given = {"config": self.config, "model_output": model_output, "data": data, "dp_group": dp_group}
        if self.distillation is None:
            loss, metrics = ppo_loss(**given)
        else:
            loss, metrics = distillation_ppo_loss(distillation_config=self.distillation, **given)
        if self.plugins.implements("loss_terms"):
            loss = loss + self._terms(model_output)
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise self._without_gradient()
        self.micro_batch += 1
        return loss, metrics

    def _without_gradient(self) -> ResultError:
        stages = [(stage, name) for stage in LOSS_STAGES for name, _ in self.plugins.of_stage(stage)]
        blamed = " and ".join(f"plugin {name!r} in {stage}" for stage, name in stages) or "verl's own loss"
        return ResultError(
            f"step {self.step}: the loss has no gradient, so nothing can be learnt ({blamed}): compute it from "
            "tokens.log_probs, without detach"
        )

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, a mini-batch's losses are computed once more: nothing is logged, and micro-batches count anew."""
        kept, self._metrics, self.micro_batch = (self._metrics, self.micro_batch), JoinedMetrics(), 0
        try:
            yield
        finally:
            self._metrics, self.micro_batch = kept

    def enter_step(self, step: int) -> None:
        """A mini-batch of training step `step` begins."""
        if step != self.step:
            self.step, self.mini_batch, self.micro_batch = step, 0, 0

    def next_mini_batch(self) -> None:
        """The optimiser has stepped."""
        self.mini_batch += 1
        self.micro_batch = 0

    def _policy_loss(
        self, old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights=None
    ):
        """verl's signature of a policy loss: aggregates what the stage returns per token."""
        tokens, self._clipped = self._build_tokens(log_prob, old_log_prob, advantages, response_mask), {}
        losses = self.plugins.hook.policy_loss(tokens=tokens)
        if rollout_is_weights is not None:
            losses = losses * rollout_is_weights
        loss = agg_loss(
            loss_mat=losses, loss_mask=tokens.response_mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info
        )
        clipped = self._clipped or clip_metrics(tokens)
        return loss, {name: clipped[key] for name, key in CLIP_METRICS.items()}

    def _terms(self, model_output: dict[str, Tensor]) -> Tensor:
        tokens = self._tokens or self._tokens_for_terms(model_output)
        total = tokens.log_probs.new_zeros(())
        for terms in self.plugins.hook.loss_terms(tokens=tokens):
            for name, term in (terms or {}).items():
                value = agg_loss(
                    loss_mat=term,
                    loss_mask=tokens.response_mask,
                    loss_agg_mode=self.config.loss_agg_mode,
                    **self.config.global_batch_info,
                )
                # verl scales losses by the number of ranks, over which gradients are averaged.
                share = value.detach() / self.config.global_batch_info["dp_size"]
                self._metrics.add(f"plugins/loss_terms/{name}", share, "sum")
                total = total + value
        return total

    def _tokens_for_terms(self, model_output: dict[str, Tensor]) -> Tokens:
        log_probs = no_padding_2_padding(model_output["log_probs"], self._data)
        fields = self._data.select("old_log_probs", "advantages", "response_mask").to_padded_tensor()
        return self._build_tokens(
            log_probs, fields["old_log_probs"], fields["advantages"], fields["response_mask"].bool()
        )

    def _build_tokens(self, log_probs, old_log_probs, advantages, response_mask) -> Tokens:
        self._tokens = Tokens(
            log_probs=log_probs,
            old_log_probs=old_log_probs,
            advantages=advantages,
            response_mask=response_mask,
            config=self.config,
            entropy=self._entropy,
            extra=self._extra,
            log=self._log,
            step=self.step,
            mini_batch=self.mini_batch,
            micro_batch=self.micro_batch,
            seed=self._seed,
            rows=None if ROW_FIELD not in self._data else self._data[ROW_FIELD].tolist(),
        )
        return self._tokens

    def _extra(self, name: str) -> Any:
        """A queue field of the micro-batch; token-level ones as wide as the responses."""
        if name not in self._data:
            raise DataError(f"field {name!r} did not reach the loss; put it there with batch.put")
        value = self._data[name]
        if not isinstance(value, Tensor):
            return value.tolist() if hasattr(value, "tolist") else value
        if not value.is_nested:
            return value
        responses = self._data["responses"].offsets().diff()
        if not torch.equal(value.offsets().diff(), responses):
            return value.to_padded_tensor(0)
        return value.to_padded_tensor(0, output_size=(len(responses), int(responses.max())))

    def _log(self, owner: str, metrics: Mapping[str, float], reduce: str) -> None:
        if owner == DEFAULT_LOSS:
            self._clipped = dict(metrics)
            return
        if self._distilling:
            return
        for key, value in metrics.items():
            self._metrics.add(f"plugins/{owner}/{key}", value, reduce)


def of_masked_tokens(data: TensorDict) -> TensorDict:
    """The micro-batch, in which only tokens of the loss mask count as generated.

    verl divides by the mask's tokens but looks at all of the response. A mini-batch may have none.
    """
    if "loss_mask" not in data:
        return data
    masked = data.clone(recurse=False)
    masked["response_mask"] = data["loss_mask"]
    if (tokens := tu.get_non_tensor_data(data, "batch_num_tokens", default=None)) is not None:
        tu.assign_non_tensor(masked, batch_num_tokens=max(int(tokens), 1))
    return masked
