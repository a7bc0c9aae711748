"""`top2_gap`: how far the likeliest token is ahead of the second, where verl's engine has logits in its hands.

The difference of their logits over the temperature is that of their log-probs. Read before verl's step from logits to
log-probs, which may scale the logits where they lie.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.tensor import DTensor
from verl.utils import tensordict_utils as tu

from verl_plugins.cpu.engine import KEPT

NAME, WANTED = "top2_gap", "calculate_top2_gap"
"""The field, and the word that asks a forward pass for it."""


def tell_gaps(engine: Any) -> None:
    """Have an FSDP engine of verl's, ours included, give `top2_gap` where a forward pass asks for it; once."""
    prepare = engine.prepare_model_outputs

    def with_gaps(output: Any, output_args: dict[str, Any], micro_batch: TensorDict, logits_processor_func: Any) -> Any:
        wanted = tu.get_non_tensor_data(micro_batch, WANTED, default=False)
        gaps = _gaps(engine, output.logits, output_args, micro_batch) if wanted else None
        found = prepare(output, output_args, micro_batch, logits_processor_func)
        return found if gaps is None else {**found, NAME: gaps}

    engine.prepare_model_outputs = with_gaps


@torch.no_grad()
def _gaps(engine: Any, logits: Tensor, output_args: dict[str, Any], micro_batch: TensorDict) -> Tensor:
    """Nested [B, tokens of the row], at each token that of the next one; 0 where no logits were made."""
    logits = logits.full_tensor() if isinstance(logits, DTensor) else logits
    ids = micro_batch["input_ids"]
    if "temperature_rmpad" in output_args:
        values = ahead(logits.squeeze(0)) / _bounded(output_args["temperature_rmpad"])
        values = engine._gather_and_unpad_packed(values, output_args["pad_size"])
        return torch.nested.nested_tensor_from_jagged(values, ids.offsets())
    lengths = ids.offsets().diff()
    whole = torch.zeros(len(lengths), int(lengths.max()), device=logits.device)
    places = output_args.get(KEPT, slice(None, logits.shape[1]))
    whole[:, places] = ahead(logits) / _bounded(output_args["temperature"])[:, None]
    inside = torch.arange(whole.shape[1], device=logits.device) < lengths[:, None]
    return torch.nested.nested_tensor_from_jagged(whole[inside], ids.offsets())


def ahead(logits: Tensor) -> Tensor:
    """[..., V] -> [...] float32: the largest less the second, 0 where these are equal."""
    best = logits.topk(2).values.float()
    return best[..., 0] - best[..., 1]


def _bounded(temperature: Tensor) -> Tensor:
    return temperature.float().clamp(min=1e-8)
