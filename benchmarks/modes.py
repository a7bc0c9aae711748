"""The three trainer modes on the preset `cpu`, with answers that take longer to score: what overlapping is worth.

    python benchmarks/modes.py FOLDER

A score that waits uses no core, as a server on another machine uses none of this one's: the time that a mode does not
spend waiting is what it gains. Prints seconds a step and tokens a second, medians over the steps after the first two.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

MODES = ("sync", "colocate_async", "separate_async")
DELAYS = (0.0, 1.0, 3.0)
"""Seconds that the scores of one step's answers take."""
STEPS, WARM = 12, 2
DELAY = "SCORING_SECONDS"


async def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None, **_: object
) -> float:
    """verl's interface for a reward function; all answers are scored side by side."""
    await asyncio.sleep(float(os.environ[DELAY]))
    return float(solution_str.strip() == str(ground_truth))


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["| scoring takes | " + " | ".join(f"`{mode}`" for mode in MODES) + " |", "|---|" + "---|" * len(MODES)]
    for delay, modes in itertools.groupby(itertools.product(DELAYS, MODES), key=lambda pair: pair[0]):
        cells = [measured(folder / f"{mode}_{delay}", mode, delay) for _, mode in modes]
        rows.append(f"| {delay:g} s | " + " | ".join(f"{s:.2f} s, {tokens:.0f} tokens/s" for s, tokens in cells) + " |")
        print(rows[-1], flush=True)
    print("\n".join(rows))


def measured(out: Path, mode: str, delay: float) -> tuple[float, float]:
    """Seconds a step and tokens a second of one training."""
    command = [Path(sys.executable).with_name("verl-plugins"), "run", "grpo", "--preset", "cpu", "--out", out]
    command += ["--steps", str(STEPS), f"trainer.v1.trainer_mode={mode}", "trainer.val_before_train=false"]
    command += ["trainer.test_freq=-1", f"reward.custom_reward_function.path={Path(__file__).resolve()}"]
    subprocess.run(
        list(map(str, command)), check=True, env={**os.environ, DELAY: str(delay)}, stdout=subprocess.DEVNULL
    )
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "rollout/tokens" in step][WARM:]
    return median(step["seconds"] for step in steps), median(step["rollout/tokens"] / step["seconds"] for step in steps)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
