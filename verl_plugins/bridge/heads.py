"""Where the stage `distillation_loss` acts: in the forward pass of the policy's head, whose weights are whole there.

FSDP gathers a head's weights as its forward pass begins, and lets go of them after it. So the stage is called between
the two, with the hidden states of the response tokens that count; verl asks for its losses a moment later, where it
would have computed its own from the logits. Works on verl's FSDP engine, rows packed or padded, and on that of the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu

from verl_plugins.composition.blame import crossing
from verl_plugins.composition.manager import Plugins
from verl_plugins.distilled import Distilled
from verl_plugins.errors import DataError

STAGE = "distillation_loss"
TEACHER = ("teacher_ids", "teacher_logprobs")
"""verl's fields of a row, [tokens, k], at the place that predicts the token."""
COLDEST = 1e-8
"""verl's own bound of a temperature."""
AFTER_THE_HEAD = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""Settings with which a model changes what its head made: the stage would not see it."""


class HeadLosses:
    """The losses of the stage, from the forward pass of the head until verl asks for them."""

    def __init__(self, engine: Any, plugins: Plugins, describe: Callable[[], dict[str, Any]]) -> None:
        """Args:
        engine: verl's FSDP engine.
        plugins: that implement the stage.
        describe: what a `Distilled` has besides tensors.

        Raises:
            DataError: the model changes logits behind its head.
        """
        self._plugins, self._describe = plugins, describe
        self._data: TensorDict | None = None
        self._losses: Tensor | None = None
        self._forward_step = engine.forward_step
        engine.forward_step = self._step
        refuse_what_follows_the_head(engine.model_config.hf_config)
        head = output_head(engine.module)
        head.register_forward_hook(self._of_the_head, prepend=True)
        head.register_forward_hook(self._the_logits_alone)

    def take(self, data: TensorDict) -> Tensor:
        """[tokens] the losses at the places of all tokens of the micro-batch, one row after the other; 0 elsewhere."""
        losses, self._losses = self._losses, None
        if losses is None:
            raise DataError(f"{STAGE}: the policy's output head was not called in this forward pass")
        whole = losses.new_zeros(int(data["input_ids"].offsets()[-1]))
        return whole.index_put((predicting(data).to(losses.device),), losses)

    def _step(self, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> Any:
        """The engine's forward pass over a micro-batch; log-prob passes ask for no losses."""
        training = not forward_only and tu.get_non_tensor_data(micro_batch, "distillation_use_topk", default=False)
        self._data = micro_batch if training else None
        try:
            return self._forward_step(micro_batch, loss_function=loss_function, forward_only=forward_only)
        finally:
            self._data = self._losses = None

    def _of_the_head(self, head: torch.nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> Any:
        """Before FSDP's own hook: what is given here beside the logits has their gradient's care, too.

        FSDP2 gathers the weights again when the first gradient of what the head gave comes back.
        """
        if self._data is None:
            return None
        with crossing():
            distilled = self._distilled(head, args[0])
            losses = self._plugins.hook.distillation_loss(distilled=distilled)
        return logits, losses

    def _the_logits_alone(self, head: torch.nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
        """Behind FSDP's hook: the model gets what it expects."""
        if isinstance(output, tuple):
            output, self._losses = output
        return output

    def _distilled(self, head: torch.nn.Module, hidden: Tensor) -> Distilled:
        data, places = self._data, predicting(self._data)
        offsets = data["input_ids"].offsets()
        row = torch.bucketize(places, offsets, right=True) - 1
        packed = tu.get_non_tensor_data(data, "use_remove_padding", default=True)
        at = (torch.zeros_like(places), places) if packed else (row, places - offsets[row])
        temperature = data["temperature"]
        if not isinstance(temperature, Tensor):
            temperature = torch.full((len(offsets) - 1,), float(temperature))
        device = hidden.device
        ids, log_probs = (data[name].values()[places].to(device) for name in TEACHER)
        return Distilled(
            hidden=hidden[tuple(part.to(device) for part in at)],
            weight=head.weight,
            bias=head.bias,
            teacher_ids=ids.long(),
            teacher_log_probs=log_probs.float(),
            temperature=temperature.to(row.device)[row].to(device).float().clamp(min=COLDEST),
            **self._describe(),
        )


def predicting(data: TensorDict) -> Tensor:
    """[N] places among all tokens of the micro-batch at which a response token that counts is predicted.

    A token is predicted by the one before it, and a response ends where its row does.
    """
    mask = data["loss_mask"] if "loss_mask" in data else data["response_mask"]
    lengths = mask.offsets().diff()
    row = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    place = torch.arange(len(row), device=row.device) - mask.offsets()[row]
    places = data["input_ids"].offsets()[row + 1] - lengths[row] + place - 1
    return places[mask.values().bool()]


def output_head(module: torch.nn.Module) -> torch.nn.Module:
    """The linear layer that makes logits, inside whatever FSDP has put around the model."""
    return getattr(module, "_fsdp_wrapped_module", module).get_output_embeddings()


def refuse_what_follows_the_head(config: Any) -> None:
    """Refuse a model that scales or bends the logits that its head made."""
    text = config.get_text_config()
    for name in AFTER_THE_HEAD:
        if getattr(text, name, None) not in (None, 1, 1.0):
            raise DataError(
                f"actor_rollout_ref.model.path: {name}={getattr(text, name)} changes logits behind the output head, "
                f"where plugins of the stage {STAGE} do not see it: choose a model without it"
            )
