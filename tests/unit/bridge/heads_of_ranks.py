"""Gradients of an actor with a teacher on one rank or two, without Ray: with verl's distillation and with `dhkd`.

`python heads_of_ranks.py RANKS FOLDER` reads the model in FOLDER/model and writes FOLDER/heads_<ranks>_<rank>.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from engine_of_ranks import ROWS, made, mini_batch, rows

TOP, VOCABULARY = 5, 259
HEADS = ("detached", "lowrank", "full")


def taught(mine: list[int], padded: bool) -> Any:
    """The rows of these numbers with what a teacher says of them, and what the policy gradient reads."""
    from verl.utils import tensordict_utils as tu

    every, generator = rows(), torch.Generator().manual_seed(1)
    nested = lambda parts: torch.nested.as_nested_tensor(list(parts), layout=torch.jagged)  # noqa: E731
    fields: dict[str, list[torch.Tensor]] = {}
    for prompt, response, _ in every:
        logits = torch.randn(len(prompt) + len(response), VOCABULARY, generator=generator) * 3
        values, ids = logits.log_softmax(-1).topk(TOP, -1)
        mine_ = {"teacher_ids": ids.int(), "teacher_logprobs": values}
        mine_ |= {"old_log_probs": torch.full((len(response),), -5.0)}
        mine_ |= {"advantages": torch.randn(len(response), generator=generator)}
        for name, value in mine_.items():
            fields.setdefault(name, []).append(value)
    data = mini_batch([every[row] for row in mine], padded)
    for name, values in fields.items():
        data[name] = nested(values[row] for row in mine)
    settings = {"distillation_use_topk": True, "distillation_only": False, "global_batch_size": ROWS}
    tu.assign_non_tensor(data, calculate_entropy=False, **settings)
    return data


class Made:
    """An engine with the loss of a run."""

    def __init__(self, folder: Path, *overrides: str, recipe: str = "grpo") -> None:
        from verl.utils.config import omega_conf_to_dataclass

        from verl_plugins.bridge import heads
        from verl_plugins.bridge.actor import EngineActor
        from verl_plugins.bridge.defaults import ActorDefaults
        from verl_plugins.bridge.joined import JoinedMetrics
        from verl_plugins.bridge.loss import PluginLoss
        from verl_plugins.composition import manager
        from verl_plugins.composition.compose import compose

        config = compose(recipe, "cpu", overrides).config
        distillation = None
        if config.distillation.enabled:
            config.distillation.teacher_models.teacher_model.model_path = "teacher"
            distillation = omega_conf_to_dataclass(config.distillation)
        plugins = manager.build({name: config.plugins[name] for name in config.plugins if name == "dhkd"})
        self.plugin = next(iter(plugins), None)
        self.engine, self.metrics = made(folder), JoinedMetrics()
        actor_config = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
        self.loss = PluginLoss(plugins, actor_config, 0, self.metrics, distillation)
        self.actor = EngineActor(self.engine, self.loss, self.metrics)
        if plugins.implements(heads.STAGE):
            self.loss.head_losses = heads.HeadLosses(self.engine, plugins, self.loss.described)
        plugins.add_fallback(ActorDefaults(self.engine.optimizer_step))
        self.engine.optimizer_step = self.actor.optimizer_step

    def gradients(self, data: Any, *, alone: bool = False) -> dict[str, torch.Tensor]:
        """By parameter; `alone`: of the distillation loss."""
        with self.engine.train_mode():
            self.engine.optimizer_zero_grad()
            if alone:
                with self.loss.distilling():
                    self.engine.forward_backward_batch(data, self.loss)
            else:
                self.engine.forward_backward_batch(data, self.loss)
            return {name: whole(one.grad, one) for name, one in self.engine.module.named_parameters()}

    def update(self, data: Any) -> dict[str, torch.Tensor]:
        """One optimiser step; the parameters after it."""
        with self.engine.train_mode():
            self.actor.train_batch(self.engine.train_batch, data, loss_function=self.loss)
        return {name: whole(one.detach(), one) for name, one in self.engine.module.named_parameters()}


def whole(tensor: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros(like.shape) if tensor is None else tensor.full_tensor().clone()


def seen(folder: Path, mine: list[int]) -> dict[str, Any]:
    padded, packed = taught(mine, True), taught(mine, False)
    found: dict[str, Any] = {"reward": Made(folder).gradients(taught_without(mine))}
    verls = Made(folder, "distillation.enabled=true", *TAUGHT)
    found["verl"] = verls.gradients(padded, alone=True)
    found["verl_both"] = verls.gradients(padded)
    for head in HEADS:
        one = Made(folder, f"plugins.dhkd.head={head}", "plugins.dhkd.rank=4", *TAUGHT, recipe="dhkd")
        found[head] = one.gradients(padded, alone=True)
        if one.plugin.head is not None:
            one.plugin.head.gradients()
        found[f"{head}_packed"] = one.gradients(packed, alone=True)
        found[f"{head}_both"] = one.gradients(padded)
        if one.plugin.head is not None:
            one.plugin.head.gradients()
        one.metrics.leave()
        for _ in range(2):
            found[f"{head}_updated"] = one.update(padded)
        found[f"{head}_metrics"] = {key: values[-1] for key, (_, values) in one.metrics.take().items()}
        found[f"{head}_state"] = {key: value.clone() for key, value in one.plugin.state_dict().items()}
        found[f"{head}_sent"] = sorted(name for name, _ in one.engine.get_per_tensor_param()[0])
        found[f"{head}_kept"] = sorted(one.engine.module.state_dict())
    aligned = Made(folder, "plugins.dhkd.align_gradients=true", *TAUGHT, recipe="dhkd")
    caught: dict[str, torch.Tensor] = {}
    inner = aligned.actor.distillation_gradient

    def watched() -> list[torch.Tensor]:
        parameters = dict(aligned.engine.module.named_parameters())
        before = {name: one.grad.to_local().clone() for name, one in parameters.items()}
        caught.update(zip(parameters, (part.clone() for part in inner()), strict=True))
        found["gradients_stay"] = all(torch.equal(before[n], one.grad.to_local()) for n, one in parameters.items())
        return list(caught.values())

    type(aligned.actor).distillation_gradient = lambda self: watched()
    aligned.update(padded)
    found["second_pass"], found["aligned_metrics"] = (
        caught,
        {key: values[0] for key, (_, values) in aligned.metrics.take().items()},
    )
    return found


TAUGHT = ("distillation.distillation_loss.loss_mode=forward_kl_topk", f"distillation.distillation_loss.topk={TOP}")


def taught_without(mine: list[int]) -> Any:
    from verl.utils import tensordict_utils as tu

    data = taught(mine, True)
    tu.assign_non_tensor(data, distillation_use_topk=False)
    return data


def worker(rank: int, ranks: int, folder: Path) -> None:
    import verl  # noqa: F401  its platform is the CPU

    torch.set_num_threads(1)
    meeting = f"file://{folder / f'meet_heads_{ranks}'}"
    torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks, init_method=meeting)
    found = seen(folder, list(range(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)))
    torch.save(found, folder / f"heads_{ranks}_{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ.update(VERL_PLUGINS_RUN="1", VERL_PLATFORM="cpu", VERL_ENGINE_DEVICE="cuda")
    torch.multiprocessing.spawn(worker, (int(sys.argv[1]), Path(sys.argv[2])), nprocs=int(sys.argv[1]))
