"""Saves checkpoints in child processes that are killed at random instants; what each kill leaves is loaded again.

Run as a script: imports once, forks a child per kill. The trainer is ours and verl's own `_save_checkpoint`; only the
engine's files are written by a stand-in, in pieces. Prints one JSON line: how often which state was found.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from omegaconf import OmegaConf
from verl.trainer.ppo.checkpoint_callback import build_checkpoint_callback
from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path

from verl_plugins import Plugin
from verl_plugins.bridge import checkpoint, intact
from verl_plugins.bridge.trainer import PluginTrainerSync

PIECES = 20


class Memory(Plugin):
    """State that tells its step in every number."""

    name = "memory"

    def __init__(self) -> None:
        super().__init__(self.Config())
        self.step = 0

    def state_dict(self) -> dict:
        return {"array": np.full(50_000, self.step), "step": self.step}


class Engine:
    """verl's worker group, as far as saving goes."""

    def __init__(self, trainer: PluginTrainerSync) -> None:
        self.trainer = trainer

    def plugin_state(self) -> list[dict]:
        return [{}]

    def save_checkpoint(self, path: str, *_: object, **__: object) -> None:
        Path(path).mkdir(parents=True, exist_ok=True)
        with open(f"{path}/weights", "w") as file:
            for _ in range(PIECES):
                file.write(f"{self.trainer.global_steps}\n")
                file.flush()


def make_trainer(folder: Path) -> PluginTrainerSync:
    trainer = object.__new__(PluginTrainerSync)
    trainer.config = OmegaConf.create(
        {"trainer": {"default_local_dir": str(folder), "default_hdfs_dir": None}, "actor_rollout_ref": {"actor": {}}}
    )
    trainer.trainer_mode, trainer.use_critic, trainer.checkpoint_callback = (
        "sync",
        False,
        build_checkpoint_callback(trainer.config),
    )
    trainer.plugins, trainer.rows = [Memory()], SimpleNamespace(fingerprint="data")
    trainer.actor_rollout_wg = Engine(trainer)
    trainer.train_dataloader = SimpleNamespace(state_dict=lambda: {"step": trainer.global_steps})
    return trainer


def save_on(folder: Path, step: int) -> None:
    trainer = make_trainer(folder)
    while True:
        step += 1
        trainer.global_steps = trainer.plugins[0].step = step
        trainer._save_checkpoint()
        trainer.mark_checkpoint()


def found(folder: Path) -> int:
    """The step of the checkpoint verl would load; everything in it is of that step."""
    latest = find_latest_ckpt_path(str(folder))
    if latest is None:
        return 0
    step = int(latest.rsplit("_", 1)[1])
    states = checkpoint.load(Path(latest), step, "data", [Memory()])
    assert states["driver"]["memory"]["step"] == step
    assert (states["driver"]["memory"]["array"] == step).all()
    assert (Path(latest) / "actor/weights").read_text().split() == [str(step)] * PIECES
    assert (Path(latest) / intact.FILES).is_file() and intact.damage(Path(latest)) is None
    return step


def seconds_to_save(folder: Path) -> float:
    """The slower of two saves on this machine, so that kills fall into saves however busy it is."""
    trainer, times = make_trainer(folder), []
    for step in (1, 2):
        trainer.global_steps = trainer.plugins[0].step = step
        start = time.perf_counter()
        trainer._save_checkpoint()
        trainer.mark_checkpoint()
        times.append(time.perf_counter() - start)
    return max(times)


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)  # a forked child has none of the threads that torch's pool counts on
    chance, step, steps = random.Random(0), 0, []
    longest = 6 * seconds_to_save(folder / "tried")
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            save_on(folder, step)
        time.sleep(chance.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        after = found(folder)
        steps.append(after - step)
        step = after
    print(json.dumps(steps))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
