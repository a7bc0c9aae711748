"""What this package adds to a step: time of the stages, a step against verl's own `main_ppo`, saving of state.

python benchmarks/layer.py [--steps N]

Both trainings use the CPU preset with the same settings (recipe grpo, the same reward manager). verl's main_ppo looks
for finished rollouts every 2 s, which cannot be set; its waiting (`timing_s/gen`) is therefore shown apart.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import yaml

from verl_plugins.bridge import census, checkpoint
from verl_plugins.sampling.vade import Vade

PROMPTS = 1_000_000
WARMING = 2
"""First steps, which are slower, left out."""


def ours(folder: Path, steps: int) -> list[dict[str, float]]:
    """The recipe grpo."""
    command = ["verl-plugins", "run", "grpo", "--preset", "cpu", "--out", str(folder)]
    command += [f"trainer.total_training_steps={steps}", "trainer.val_before_train=false", "trainer.test_freq=-1"]
    subprocess.run([Path(sys.executable).with_name(command[0]), *command[1:]], check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def verls(folder: Path, steps: int) -> list[dict[str, float]]:
    """verl's own command with the resolved configuration of the run in `folder`."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["trainer"] |= {"logger": ["file"], "default_local_dir": str(folder / "verl")}
    (folder / "verl.yaml").write_text(yaml.safe_dump(config))
    log = folder / "verl.jsonl"
    environment = {
        **os.environ,
        **yaml.safe_load(Path("recipes/presets/cpu.yaml").read_text())["preset"]["env"],
        **census.announce(config["plugins"]),
        "VERL_PLUGINS_RUN": "1",
        "VERL_FILE_LOGGER_PATH": str(log),
    }
    command = [sys.executable, "-m", "verl.trainer.main_ppo", "--config-path", str(folder), "--config-name", "verl"]
    with (folder / "verl.out").open("w") as output:
        subprocess.run(command, check=True, env=environment, stdout=output, stderr=output)
    return [json.loads(line)["data"] for line in log.read_text().splitlines()]


def typical(steps: list[dict[str, float]], key: str) -> float:
    return median(step[f"timing_s/{key}"] for step in steps[WARMING:])


def saving(folder: Path) -> float:
    """Seconds to save the state of a million prompts."""
    plugin, best = Vade(Vade.Config()), float("inf")
    plugin.alpha, plugin.beta = np.random.default_rng(0).random((2, PROMPTS))
    plugin.selected = np.arange(16)
    for step in range(5):
        states = {"driver": {plugin.name: plugin.state_dict()}, "actor": {}}
        start = time.perf_counter()
        checkpoint.save(folder / f"global_step_{step}", step, "data", [plugin], states)
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=12)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"saving the state of {PROMPTS} prompts: {saving(folder) * 1e3:.0f} ms")
        mine = ours(folder, steps)
        stages, step = typical(mine, "stages"), typical(mine, "step")
        print(f"stages: {stages * 1e3:.1f} ms of a step of {step:.2f} s = {stages / step:.1%}")
        theirs = verls(folder, steps)
        for key in ("step", "gen", "adv", "old_log_prob", "update_actor"):
            one, other = typical(mine, key), typical(theirs, key)
            print(f"  {key:14s} {one:7.3f} s, verl's main_ppo {other:7.3f} s: {one / other:.2f} x")
        one, other = (typical(run, "step") - typical(run, "gen") for run in (mine, theirs))
        print(f"  step less gen  {one:7.3f} s, verl's main_ppo {other:7.3f} s: {one / other:.2f} x")


if __name__ == "__main__":
    main()
