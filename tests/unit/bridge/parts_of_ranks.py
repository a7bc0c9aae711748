"""The engine of the preset cpu on one rank or two: what its passes say of gaps, and gradients in parts.

`python parts_of_ranks.py RANKS FOLDER` reads the model in FOLDER/model and writes FOLDER/parts_<ranks>_<rank>.pt.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from engine_of_ranks import ROWS, made, mini_batch, rows

FIELD, VALUES = "role", (1.0, 2.0, 2.0, 1.0, 2.0, 0.0, 1.0, 5.0)
"""Of each row; 5 is on the last rank alone, 0 is that of a row which fills up the batch."""


class Loss:
    """A sum over the tokens of the loss, divided by what the engine counts, as verl's token mean."""

    def __init__(self) -> None:
        self.within = self.calls = 0

    @contextmanager
    def aside(self) -> Iterator[None]:
        self.within += 1
        yield
        self.within -= 1

    def __call__(self, model_output: Any, data: Any, dp_group: Any = None) -> tuple[torch.Tensor, dict]:
        from verl.workers.utils.padding import no_padding_2_padding

        assert self.within == 1
        self.calls += 1
        log_probs = no_padding_2_padding(model_output["log_probs"], data)
        mask = data["loss_mask"].to_padded_tensor(0)
        weights = torch.arange(mask.shape[1]) / 4 - 1
        total = (log_probs * mask * weights).sum() + (log_probs.exp() * mask).sum()
        return total / data["batch_num_tokens"] * data["dp_size"], {}


def parted(engine: Any, data: Any) -> dict[str, Any]:
    from verl_plugins.bridge import parting

    loss, parameters = Loss(), list(engine.module.parameters())
    engine.optimizer_zero_grad()
    with loss.aside():
        engine.forward_backward_batch(data, loss, forward_only=False)
    before = [one.grad for one in parameters]
    kept = [one.grad.to_local().clone() for one in parameters]
    drawn = torch.random.get_rng_state()
    parts = parting.gradients(engine, data, loss, FIELD, parameters)
    whole = [one.grad.to_local() for one in parameters]
    found = {"parts": parts, "whole": whole, "same": all(a.grad is b for a, b in zip(parameters, before, strict=True))}
    found["kept"] = all(map(torch.equal, whole, kept))
    found["drawn"] = torch.equal(drawn, torch.random.get_rng_state())
    some = parting.gradients(engine, data, loss, FIELD, parameters[-1:])
    found["of one"] = all(torch.equal(part[-1], some[value][0]) for value, part in parts.items())
    return found


def gaps(engine: Any, data: Any) -> Any:
    """[rows, tokens of the response], and what is given where nobody asks."""
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import response_from_nested

    from verl_plugins.bridge.gap import NAME, WANTED

    tu.assign_non_tensor(data, calculate_entropy=False, compute_loss=False)
    nothing = engine.infer_batch(data)["model_output"]
    assert NAME not in nothing
    tu.assign_non_tensor(data, **{WANTED: True})
    output = engine.infer_batch(data)["model_output"]
    assert torch.equal(output["log_probs"].values(), nothing["log_probs"].values())
    return response_from_nested(output[NAME], data["response_mask"]).to_padded_tensor(0)


def worker(rank: int, ranks: int, folder: Path) -> None:
    import verl  # noqa: F401  its platform is the CPU

    from verl_plugins.bridge.gap import tell_gaps

    torch.set_num_threads(1)
    meeting = f"file://{folder / f'meet_parts_{ranks}'}"
    torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks, init_method=meeting)
    part = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
    engine, mine = made(folder), rows()[part]
    tell_gaps(engine)
    with engine.train_mode():
        data = mini_batch(mine, padded=True)
        data[FIELD] = torch.tensor(VALUES[part])
        found = parted(engine, data)
    with engine.eval_mode():
        found |= {name: gaps(engine, mini_batch(mine, padded=name == "padded")) for name in ("padded", "packed")}
    torch.save(found, folder / f"parts_{ranks}_{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ.update(VERL_PLUGINS_RUN="1", VERL_PLATFORM="cpu", VERL_ENGINE_DEVICE="cuda")
    torch.multiprocessing.spawn(worker, (int(sys.argv[1]), Path(sys.argv[2])), nprocs=int(sys.argv[1]))
