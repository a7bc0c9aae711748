"""Recipe vade and others of its kind, mode sync; a run that was killed goes on as if it had not been."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from training import PROMPTS, ROWS_OF_DATASET, TIMEOUT, Training, command, four_steps, healthy, ours, train

pytestmark = pytest.mark.e2e

MARKER = "latest_checkpointed_iteration.txt"
ORPHAN_SECONDS = 20
SAMPLING = "siri+mopps+prompt_augmentation"
SAMPLING_SETTINGS = (
    "plugins.siri.cycle_length=6",
    "plugins.siri.min_length=4",
    "plugins.mopps.pool_ratio=2",
    f"plugins.prompt_augmentation.templates=[{Path(__file__).parents[2] / 'benchmarks/short_templates.yaml'}]",
    "plugins.prompt_augmentation.validation=plain",
)


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
        flatten(torch.load(file, weights_only=True), kind, found)
    return found


def flatten(value: object, prefix: str, found: dict[str, torch.Tensor]) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            flatten(inner, f"{prefix}/{key}", found)
    elif isinstance(value, torch.Tensor):
        found[prefix] = value.to_local() if hasattr(value, "to_local") else value


@pytest.fixture(scope="module")
def killed(out: Path) -> list[psutil.Process]:
    """A killed run in folder `resumed`, and a half-written checkpoint beside the complete one."""
    family = kill_after_checkpoint(out / "resumed")
    (out / "resumed" / "global_step_4" / ".plugins.123").mkdir(parents=True, exist_ok=True)
    return family


@pytest.fixture(scope="module")
def after_a_kill(vade: Training, killed: list[psutil.Process], out: Path) -> tuple[Training, Training]:
    """Recipe vade: four steps, and two, a kill and two more."""
    _, alive = psutil.wait_procs(killed, timeout=ORPHAN_SECONDS)
    assert not alive
    return vade, train("vade", out / "resumed", *four_steps(out / "resumed"))


@pytest.fixture(scope="module")
def sampling(out: Path) -> Training:
    """Recipes siri, mopps and prompt_augmentation combined, mode sync: four steps, every budget another."""
    return train(SAMPLING, out / "sampling", *four_steps(out / "sampling"), *SAMPLING_SETTINGS)


@pytest.fixture(scope="module")
def from_a_path(sampling: Training, out: Path) -> tuple[Training, Training]:
    """The four steps, and their last two again, in another folder from the checkpoint between."""
    folder = out / "sampling_resumed"
    path = ("trainer.resume_mode=resume_path", f"trainer.resume_from_path={sampling.out / 'global_step_2'}")
    return sampling, train(SAMPLING, folder, *four_steps(folder), *SAMPLING_SETTINGS, *path)


def test_a_kill_leaves_no_process(killed: list[psutil.Process]) -> None:
    assert len(killed) > 5
    _, alive = psutil.wait_procs(killed, timeout=ORPHAN_SECONDS)
    assert [process.name() for process in alive] == []


class TestResume:
    """Four steps, or two and after a new start two more: the same prompts, plugin state and weights."""

    @pytest.fixture(scope="class", params=["after_a_kill", "from_a_path"])
    def pair(self, request: pytest.FixtureRequest) -> tuple[Training, Training]:
        return request.getfixturevalue(request.param)

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


class TestSampling:
    """What the three methods remember, or need not: pools and counts, templates, the place in the cycle."""

    def test_budgets_go_on_in_their_phase(self, from_a_path: tuple[Training, Training]) -> None:
        whole, resumed = from_a_path
        assert [step["plugins/siri/max_length"] for step in whole.steps] == [16, 13, 7, 4]
        assert [step["plugins/siri/max_length"] for step in resumed.steps] == [7, 4]
        assert [step["plugins/siri/phase"] for step in resumed.steps] == [0, 1]

    def test_the_pass_over_the_dataset_goes_on(self, from_a_path: tuple[Training, Training]) -> None:
        for run in from_a_path:
            state = json.loads((run.out / "global_step_4/plugins/state.json").read_text())
            assert state["states"]["driver"]["mopps"]["json"]["place"] == 4 * 2 * PROMPTS
            assert {step["plugins/mopps/passes"] for step in run.steps} == {1}
        arrays = load_file(from_a_path[1].out / "global_step_4/plugins/arrays.safetensors")
        assert arrays["driver/mopps/right"].sum() + arrays["driver/mopps/wrong"].sum() == 4 * PROMPTS * 8
        prompts = [prompt_id for prompt_id, _, _ in from_a_path[0].draws()]
        assert len(set(prompts)) == 4 * PROMPTS

    def test_every_group_has_a_format(self, from_a_path: tuple[Training, Training]) -> None:
        for run in from_a_path:
            for step in run.steps:
                counts = [value for key, value in step.items() if key.startswith("plugins/prompt_augmentation/count/")]
                assert len(counts) > 1 and sum(counts) == 8 * PROMPTS
                assert step["actor/grad_norm"] > 0.01
                assert step["training/rollout_probs_diff_max"] < 1e-3


class TestVade:
    """Recipe vade, mode sync: prompts are chosen by a belief that the rollouts of every step update."""

    def test_trains(self, vade: Training) -> None:
        healthy(vade, 4)
        for number, step in enumerate(vade.steps, 1):
            found = ours(step, "vade")
            assert found["effective_ratio"] == pytest.approx(step["health/mixed_groups"])
            assert found["solve_none"] == pytest.approx(step["health/all_wrong_groups"])
            assert PROMPTS / ROWS_OF_DATASET <= found["seen_fraction"] <= number * PROMPTS / ROWS_OF_DATASET
            assert 0 < found["theta_selected_mean"] < 1

    def test_the_plugin_chooses_the_prompts(self, vade: Training) -> None:
        draws = vade.draws()
        assert [sum(trained == step for _, _, trained in draws) for step in (1, 2, 3, 4)] == [PROMPTS] * 4
        assert all(drawn == trained for _, drawn, trained in draws)
        assert len({prompt_id for prompt_id, _, _ in draws}) > 2 * PROMPTS
