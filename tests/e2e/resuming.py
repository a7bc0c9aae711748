"""What a run that was resumed must have in common with one that never stopped."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed.tensor  # the checkpoints' DTensors: `weights_only` loads no class that was not imported
from safetensors.torch import load_file
from training import Training


def weights(training: Training) -> dict[str, torch.Tensor]:
    """Parameters and optimiser moments of the last checkpoint (verl's own files, of our own run)."""
    found: dict[str, torch.Tensor] = {}
    for kind in ("model", "optim"):
        file = training.out / f"global_step_4/actor/{kind}_world_size_1_rank_0.pt"
        flatten(torch.load(file, weights_only=True), kind, found)
    return found


def flatten(value: object, prefix: str, found: dict[str, torch.Tensor]) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            flatten(inner, f"{prefix}/{key}", found)
    elif isinstance(value, torch.Tensor):
        found[prefix] = value.to_local() if hasattr(value, "to_local") else value


class Resuming:
    """Four steps, or two and after a new start two more: the same prompts, plugin state and weights.

    A subclass has the fixture `pair`: the run that did not stop, and the one that did.
    """

    @pytest.fixture(scope="class")
    def whole(self, pair: tuple[Training, Training]) -> Training:
        return pair[0]

    @pytest.fixture(scope="class")
    def resumed(self, pair: tuple[Training, Training]) -> Training:
        return pair[1]

    def test_it_says_where_it_goes_on(self, resumed: Training) -> None:
        assert "resuming after step 2 from" in resumed.output
        assert [step["step"] for step in resumed.steps[-2:]] == [3, 4]

    def test_the_same_prompts_are_drawn(self, whole: Training, resumed: Training) -> None:
        one, other = ([draw for draw in run.draws() if draw[2] > 2] for run in (whole, resumed))
        assert one == other and {draw[2] for draw in one} == {3, 4}

    def test_the_same_answers_are_generated_and_scored(self, whole: Training, resumed: Training) -> None:
        for step in (3, 4):
            one, other = ((run.out / f"rollouts/{step}.jsonl").read_text().splitlines() for run in (whole, resumed))
            one, other = ([json.loads(line) for line in lines] for lines in (one, other))
            told = ("uid", "input", "output", "score")
            assert [[row[name] for name in told] for row in one] == [[row[name] for name in told] for row in other]

    def test_the_same_state_bit_for_bit(self, whole: Training, resumed: Training) -> None:
        one, other = (run.out / "global_step_4" / "plugins" for run in (whole, resumed))
        assert json.loads((one / "state.json").read_text()) == json.loads((other / "state.json").read_text())
        arrays, again = load_file(one / "arrays.safetensors"), load_file(other / "arrays.safetensors")
        assert arrays.keys() == again.keys()
        assert [name for name in arrays if not torch.equal(arrays[name], again[name])] == []
        before = load_file(whole.out / "global_step_2" / "plugins" / "arrays.safetensors")
        assert any(not torch.equal(before[name], arrays[name]) for name in arrays)

    def test_the_same_weights(self, whole: Training, resumed: Training) -> None:
        one, other = weights(whole), weights(resumed)
        assert one.keys() == other.keys() and len(one) > 50
        assert max(float((one[name] - other[name]).abs().max()) for name in one) <= 1e-6

    def test_the_same_metrics(self, whole: Training, resumed: Training) -> None:
        for one, other in zip(whole.steps[2:], resumed.steps[-2:], strict=True):
            for key in ("health/accuracy", "actor/entropy", "actor/loss", "actor/grad_norm", "actor/lr"):
                assert other[key] == pytest.approx(one[key], rel=1e-6, abs=1e-9), key
