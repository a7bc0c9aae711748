"""What users bring trains: a converted file, the example's estimator, a scaffold's loss, a reader of solutions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from packages import EXAMPLE, install
from training import Training, train
from typer.testing import CliRunner

from verl_plugins.commands.cli import app
from verl_plugins.commands.scaffold import create

pytestmark = pytest.mark.e2e

READER = '''
"""Reads what the dataset knows of a prompt."""
from verl_plugins import Plugin, hookimpl

class Reader(Plugin):
    name = "reader"

    @hookimpl
    def prepare_prompts(self, run, prompts):
        run.log({"prompts_solved": sum(prompt.solution.endswith("in all.") for prompt in prompts) / len(prompts)})

    @hookimpl
    def observe(self, run, batch):
        by_row = set(zip(batch.prompt_id.tolist(), batch.extra("prompt_id"), batch.solution, strict=True))
        rows = [run.dataset[prompt_id]["extra_info"] for prompt_id, _, _ in by_row]
        same = [(row["prompt_id"], row["solution"]) == found[1:] for row, found in zip(rows, by_row, strict=True)]
        run.log({"prompts": len(by_row), "same": sum(same) / len(same)})
'''


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty questions in the shape of GSM8K, converted by the command."""
    folder = tmp_path_factory.mktemp("own")
    rows = []
    for number in range(40):
        a, b, c = number % 7, number // 7, number % 5
        work = f"{a} and {b} are <<{a}+{b}={a + b}>>{a + b}, with {c} that is {a + b + c} in all."
        rows.append({"question": f"{a}+{b}+{c}=", "answer": f"{work}\n#### {a + b + c}"})
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = ["--to", f"{folder}/train.parquet", "--val-to", f"{folder}/val.parquet", "--val-fraction", "0.3"]
    done = CliRunner().invoke(app, ["data", "convert", f"{folder}/sums.jsonl", *files])
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packages of others: the example, one that `verl-plugins new` has just written, and a reader of solutions."""
    folder = tmp_path_factory.mktemp("site")
    written = tmp_path_factory.mktemp("new")
    create("doubtful", "policy_loss", written)
    install(folder, EXAMPLE, written / "doubtful")
    (folder / "reader.py").write_text(READER)
    information = folder / "reader-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: reader\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[verl_plugins]\nreader = reader:Reader\n")
    return folder


@pytest.fixture(scope="module")
def trained(data: Path, site: Path, out: Path) -> Training:
    files = (f"data.train_files={data}/train.parquet", f"data.val_files={data}/val.parquet")
    steps = ("trainer.total_training_steps=2", "trainer.val_before_train=false", "trainer.test_freq=2")
    plugins = ("+plugins.reader={}", "plugins.doubtful.gamma=2.0")
    return train("rank_advantage+doubtful", out / "own_data", *files, *steps, *plugins, site=site)


def test_two_steps(trained: Training) -> None:
    assert [step["step"] for step in trained.steps] == [1, 2]
    for step in trained.steps:
        assert 0 < step["health/accuracy"] < 1
        assert step["actor/grad_norm"] > 0.01


def test_an_estimator_and_a_loss_of_two_packages_train_together(trained: Training) -> None:
    for step in trained.steps:
        equal = 1 - step["health/mixed_groups"]
        assert step["plugins/rank_advantage/zero_advantage_rows"] == pytest.approx(equal, abs=1e-6)
        assert 0 < step["plugins/doubtful/weight_mean"] < 1
        assert "plugins/grpo/zero_advantage_rows" not in step, "the estimator replaces grpo's"


def test_a_method_reads_solution_and_prompt_id(trained: Training) -> None:
    for step in trained.steps:
        assert step["plugins/reader/prompts_solved"] == 1
        assert step["plugins/reader/prompts"] == 16
        assert step["plugins/reader/same"] == 1


def test_validation_carries_the_name_of_the_data(trained: Training) -> None:
    ((step, metrics),) = trained.validations
    assert step == 2
    assert 0 < metrics["val-core/own/gsm8k/acc/mean@8"] < 1
