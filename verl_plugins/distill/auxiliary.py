"""An auxiliary output head beside the policy's: trained on every rank alike, and no part of the model.

So verl neither wraps it, nor sends it to the rollout servers, nor exports it; its state travels with the plugin's.

`lowrank` adds B A h to what the policy's head makes as a constant; `full` has weights of its own. Both begin with what
the policy's head gives. The update is AdamW's, with learning rate, betas and weight decay of the actor's optimiser.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import linear

from verl_plugins import Distilled, StateError

KEPT = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW remembers of a parameter."""
SHARED = ("lr", "betas", "weight_decay")


def over_ranks(values: Tensor) -> Tensor:
    """Sums over all ranks, in place."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values


class AuxiliaryHead:
    """Its parameters, made when the policy's head is first seen, and their optimiser."""

    def __init__(self, kind: str, rank: int) -> None:
        """`kind` is `lowrank` or `full`; `rank` is that of the low-rank part."""
        self.kind, self.rank = kind, rank
        self.parameters: dict[str, Parameter] = {}
        self._optimizer: torch.optim.AdamW | None = None

    def logits(self, distilled: Distilled) -> Tensor:
        """[N,V] over the temperature."""
        self._be_at(distilled)
        own, hidden, temperature = self.parameters, distilled.hidden.float(), distilled.temperature[:, None]
        if self.kind == "full":
            return linear(hidden, own["weight"], own.get("bias")).float() / temperature
        low = linear(linear(hidden, own["a"]), own["b"]).float()
        return distilled.logits(detached=True) + low / temperature

    def _be_at(self, distilled: Distilled) -> None:
        """Made, and on the device of the policy's head."""
        weight, bias = distilled.weight.detach(), distilled.bias
        if not self.parameters and self.kind == "full":
            made = {"weight": weight, **({} if bias is None else {"bias": bias.detach()})}
            self._begin({name: value.float().clone() for name, value in made.items()})
        elif not self.parameters:
            a = torch.randn(self.rank, weight.shape[1], generator=torch.Generator().manual_seed(0))
            self._begin({"a": a / math.sqrt(weight.shape[1]), "b": torch.zeros(len(weight), self.rank)})
        for parameter in self.parameters.values():
            parameter.data = parameter.data.to(weight.device)

    def _begin(self, values: Mapping[str, Tensor]) -> None:
        self.parameters = {name: Parameter(value) for name, value in values.items()}
        self._optimizer = torch.optim.AdamW(self.parameters.values())

    def gradients(self) -> dict[str, Tensor]:
        """Those of all ranks together, taken from the parameters; a collective call.

        verl scales losses by the number of ranks, over which gradients are averaged.
        """
        ranks, found = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1, {}
        for name, parameter in self.parameters.items():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            found[name], parameter.grad = over_ranks(grad).div_(ranks), None
        return found

    def step(self, gradients: Mapping[str, Tensor], actors: Mapping[str, Any]) -> None:
        """`actors` is a parameter group of the actor's optimiser, with what it has now."""
        for name, parameter in self.parameters.items():
            parameter.grad, memory = gradients[name], self._optimizer.state[parameter]
            memory |= {key: memory[key].to(parameter.device) for key in KEPT[1:] if key in memory}
        self._optimizer.param_groups[0].update({key: actors[key] for key in SHARED if key in actors})
        self._optimizer.step()
        self._optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Parameters by name, and what the optimiser remembers of each."""
        state: dict[str, Any] = {name: parameter.detach() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            memory = self._optimizer.state[parameter]
            state |= {f"{name}.{key}": memory[key] for key in KEPT if key in memory}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave; of a head that was not made yet, nothing.

        Raises:
            StateError: it is that of another kind of head, or of another rank.
        """
        shape = tuple(state["a"].shape[:1]) if "a" in state else ()
        if state and shape != ((self.rank,) if self.kind == "lowrank" else ()):
            saved = f"lowrank of rank {shape[0]}" if shape else "full"
            raise StateError(
                f"plugins.dhkd.head={self.kind}, plugins.dhkd.rank={self.rank}: the checkpoint holds an auxiliary head "
                f"that is {saved}, so resume with the same settings"
            )
        if names := [name for name in state if "." not in name]:
            self._begin({name: state[name].clone() for name in names})
        for name in names:
            memory = {key: state[f"{name}.{key}"].clone() for key in KEPT if f"{name}.{key}" in state}
            self._optimizer.state[self.parameters[name]].update(memory)
