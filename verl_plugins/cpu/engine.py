"""verl's FSDP engine on a CPU: logits and what is read from them only where a response token is predicted.

verl's padded path makes logits for prompts and padding too, keeps several copies of them for the backward pass and
takes their logsumexp token by token. With a vocabulary of 49,000 that costs as much as the layers below. Here the
model is asked for the positions that predict responses, and log-prob, entropy and sum of squares come from one function
that goes through them a piece at a time, forward and backward.

Notation: B rows, L positions of the longest, K positions with logits, N response tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.autograd.function import once_differentiable
from verl.utils import tensordict_utils as tu
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

KEPT = "kept_positions"
PIECE = 64
"""Tokens at a time: 64 rows of 49,000 logits are 12 MB, which stay in the cache between the passes over them."""
OPTIONAL = {"entropy": "calculate_entropy", "sum_pi_squared": "calculate_sum_pi_squared"}
COLDEST = 1e-8
"""verl's own bound of a temperature."""
OTHER_PATHS = ("use_fused_kernels", "distillation_use_topk", "distillation_only")


class ResponseEngine(FSDPEngineWithLMHead):
    """The engine of the actor and the reference on a CPU."""

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        """verl's inputs; a model that can is asked for the logits of some positions only."""
        inputs, args = super().prepare_model_inputs(micro_batch)
        if self._reads_responses(micro_batch):
            ids, prompts = micro_batch["input_ids"], micro_batch["prompts"]
            first, last = prompts.offsets().diff().min() - 1, ids.offsets().diff().max() - 1
            args[KEPT] = inputs["logits_to_keep"] = torch.arange(int(first), int(last), device=ids.device)
        return inputs, args

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: TensorDict, logits_processor_func: Any
    ) -> dict[str, Tensor]:
        """Nested [B, tokens of the row] each; what belongs to no response token is 0, and verl cuts it off."""
        if KEPT not in output_args:
            return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        ids, prompts = micro_batch["input_ids"], micro_batch["prompts"]
        lengths, first = ids.offsets().diff(), prompts.offsets().diff() - 1
        place = torch.arange(int(lengths.max()), device=ids.device)
        valid = place < lengths[:, None]
        rows, places = ((place >= first[:, None]) & (place < lengths[:, None] - 1)).nonzero(as_tuple=True)
        values = token_statistics(
            output.logits,
            (rows, places - output_args[KEPT][0]),
            ids.values()[ids.offsets()[rows] + places + 1],
            output_args["temperature"].clamp(min=COLDEST)[rows],
        )
        names = [
            "log_probs",
            *(name for name, key in OPTIONAL.items() if tu.get_non_tensor_data(micro_batch, key, False)),
        ]
        nothing = torch.zeros(valid.shape, device=ids.device)
        return {
            name: torch.nested.nested_tensor_from_jagged(
                nothing.index_put((rows, places), values[name])[valid], ids.offsets()
            )
            for name in names
        }

    def _reads_responses(self, micro_batch: TensorDict) -> bool:
        """Whether this is a padded batch of prompts and responses, and the model makes logits where it is told to."""
        if tu.get_non_tensor_data(micro_batch, "use_remove_padding", default=True) or any(
            tu.get_non_tensor_data(micro_batch, path, default=False) for path in OTHER_PATHS
        ):
            return False
        prompts = micro_batch.get("prompts", None)
        base = self.module.get_base_model() if hasattr(self.module, "get_base_model") else self.module
        return (
            prompts is not None and prompts.is_nested and "logits_to_keep" in inspect.signature(base.forward).parameters
        )


def token_statistics(
    logits: Tensor, where: tuple[Tensor, Tensor], labels: Tensor, temperature: Tensor
) -> dict[str, Tensor]:
    """`log_probs`, `entropy` (nats) and `sum_pi_squared` of softmax(logits / temperature) at N places, [N] each.

    logits [B,K,V]; where: row and place [N] of each token; labels [N]; temperature [N]. Differentiable in the logits.
    """
    values = _Statistics.apply(logits, *where, labels, temperature)
    return dict(zip(("log_probs", "entropy", "sum_pi_squared"), values, strict=True))


class _Statistics(torch.autograd.Function):
    """The three with p = softmax(z):  dlog p_y/dz = 1_y - p,  dH/dz = -p (log p + H),  dS/dz = 2 p (p - S)."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, rows: Tensor, places: Tensor, labels: Tensor, temperature: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        log_probs, entropy, squares, normalisers = (logits.new_empty(len(rows), dtype=torch.float32) for _ in range(4))
        for piece in _pieces(len(rows)):
            z = _scaled(logits, rows[piece], places[piece], temperature[piece])
            normaliser = torch.logsumexp(z, -1)
            probs = (z - normaliser[:, None]).exp_()
            log_probs[piece] = z.gather(1, labels[piece, None])[:, 0] - normaliser
            entropy[piece] = normaliser - (probs * z).sum(-1)
            squares[piece] = probs.square_().sum(-1)
            normalisers[piece] = normaliser
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, rows, places, labels, temperature, normalisers, entropy, squares)
        return log_probs, entropy, squares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, rows, places, labels, temperature, normalisers, entropy, squares = ctx.saved_tensors
        of_log_probs, of_entropy, of_squares = grads
        whole = torch.zeros_like(logits)
        for piece in _pieces(len(rows)):
            at = rows[piece], places[piece]
            log_p = _scaled(logits, *at, temperature[piece]).sub_(normalisers[piece, None])
            probs = log_p.exp()
            factor = torch.zeros_like(normalisers[piece])[:, None]
            if of_log_probs is not None:
                factor = factor - of_log_probs[piece, None]
            if of_entropy is not None:
                factor = factor - of_entropy[piece, None] * (log_p + entropy[piece, None])
            if of_squares is not None:
                factor = factor + 2 * of_squares[piece, None] * (probs - squares[piece, None])
            grad = probs.mul_(factor)
            if of_log_probs is not None:
                grad.scatter_add_(1, labels[piece, None], of_log_probs[piece, None])
            whole[at] = grad.div_(temperature[piece, None]).to(whole.dtype)
        return whole, None, None, None, None


def _pieces(count: int) -> list[slice]:
    return [slice(start, start + PIECE) for start in range(0, count, PIECE)]


def _scaled(logits: Tensor, rows: Tensor, places: Tensor, temperature: Tensor) -> Tensor:
    return logits[rows, places].float().div_(temperature[:, None])


def register_engine() -> None:
    """Make it the language model's engine on this platform; doing it twice is harmless."""
    engines = EngineRegistry._engines["language_model"]
    if ("cuda", "cpu") not in engines["fsdp"]:  # the preset names `cuda`: verl has its engines under that word only
        EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cuda", vendor="cpu")(
            ResponseEngine
        )
