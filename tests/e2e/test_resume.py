"""A run that was killed goes on as if it had not been."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from training import TIMEOUT, Training, command, four_steps, train

pytestmark = pytest.mark.e2e

MARKER = "latest_checkpointed_iteration.txt"
ORPHAN_SECONDS = 20


def kill_after_checkpoint(folder: Path) -> list[psutil.Process]:
    """Start the four steps, `kill -9` the command when its first checkpoint is complete; all processes of the run."""
    with subprocess.Popen(command("vade", folder, *four_steps(folder)), stdout=subprocess.DEVNULL) as run:
        deadline = time.monotonic() + TIMEOUT
        while not (folder / MARKER).exists():
            assert run.poll() is None and time.monotonic() < deadline, "the run ended before its first checkpoint"
            time.sleep(0.02)
        family = psutil.Process(run.pid).children(recursive=True)
        run.kill()
    return family


def weights(training: Training) -> dict[str, torch.Tensor]:
    """Parameters and optimiser moments of the last checkpoint (verl's own files, of our own run)."""
    found: dict[str, torch.Tensor] = {}
    for kind in ("model", "optim"):
        file = training.out / f"global_step_4/actor/{kind}_world_size_1_rank_0.pt"
        flatten(torch.load(file, weights_only=False), kind, found)
    return found


def flatten(value: object, prefix: str, found: dict[str, torch.Tensor]) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            flatten(inner, f"{prefix}/{key}", found)
    elif isinstance(value, torch.Tensor):
        found[prefix] = value.to_local() if hasattr(value, "to_local") else value


class TestResume:
    """Four steps, or two, a kill, and two more: the same prompts, plugin state and weights."""

    @pytest.fixture(scope="class")
    def killed(self, out: Path) -> list[psutil.Process]:
        """A killed run in folder `resumed`, and a half-written checkpoint beside the complete one."""
        family = kill_after_checkpoint(out / "resumed")
        (out / "resumed" / "global_step_4" / ".plugins.123").mkdir(parents=True, exist_ok=True)
        return family

    @pytest.fixture(scope="class")
    def resumed(self, killed: list[psutil.Process], out: Path) -> Training:
        _, alive = psutil.wait_procs(killed, timeout=ORPHAN_SECONDS)
        assert not alive
        return train("vade", out / "resumed", *four_steps(out / "resumed"))

    def test_a_kill_leaves_no_process(self, killed: list[psutil.Process]) -> None:
        assert len(killed) > 5
        _, alive = psutil.wait_procs(killed, timeout=ORPHAN_SECONDS)
        assert [process.name() for process in alive] == []

    def test_it_says_where_it_goes_on(self, resumed: Training) -> None:
        assert "resuming after step 2 from" in resumed.output
        assert [step["step"] for step in resumed.steps[-2:]] == [3, 4]

    def test_the_same_prompts_are_drawn(self, vade: Training, resumed: Training) -> None:
        one, other = ([draw for draw in run.draws() if draw[2] > 2] for run in (vade, resumed))
        assert one == other and {draw[2] for draw in one} == {3, 4}

    def test_the_same_answers_are_generated_and_scored(self, vade: Training, resumed: Training) -> None:
        for step in (3, 4):
            one, other = ((run.out / f"rollouts/{step}.jsonl").read_text().splitlines() for run in (vade, resumed))
            one, other = ([json.loads(line) for line in lines] for lines in (one, other))
            assert [(row["uid"], row["output"], row["score"]) for row in one] == [
                (row["uid"], row["output"], row["score"]) for row in other
            ]

    def test_the_same_state_bit_for_bit(self, vade: Training, resumed: Training) -> None:
        one, other = (run.out / "global_step_4" / "plugins" for run in (vade, resumed))
        assert json.loads((one / "state.json").read_text()) == json.loads((other / "state.json").read_text())
        arrays, again = load_file(one / "arrays.safetensors"), load_file(other / "arrays.safetensors")
        assert arrays.keys() == again.keys()
        assert [name for name in arrays if not torch.equal(arrays[name], again[name])] == []
        before = load_file(vade.out / "global_step_2" / "plugins" / "arrays.safetensors")
        assert any(not torch.equal(before[name], arrays[name]) for name in arrays)

    def test_the_same_weights(self, vade: Training, resumed: Training) -> None:
        one, other = weights(vade), weights(resumed)
        assert one.keys() == other.keys() and len(one) > 50
        assert max(float((one[name] - other[name]).abs().max()) for name in one) <= 1e-6

    def test_the_same_metrics(self, vade: Training, resumed: Training) -> None:
        for one, other in zip(vade.steps[2:], resumed.steps[-2:], strict=True):
            for key in ("health/accuracy", "actor/entropy", "actor/loss", "actor/grad_norm", "actor/lr"):
                assert other[key] == pytest.approx(one[key], rel=1e-6, abs=1e-9), key
