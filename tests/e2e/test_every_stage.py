"""A third-party plugin that implements every stage, in a real training: where, when and with what it is called."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from every_stage import DROPPED, IMPLEMENTED, TARGETS, TEMPERATURE
from omegaconf import OmegaConf
from torch import Tensor
from training import Training, train
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.e2e

PROMPTS, ROLLOUTS, KEPT, HELD_OUT = 16, 8, 7, 4
VALIDATED = ("trainer.val_before_train=false", "trainer.test_freq=1", f"data.val_max_samples={HELD_OUT}")
VALIDATED += ("actor_rollout_ref.rollout.val_kwargs.n=1",)
OTHER_PROCESSES = {"rollout_group", "score_answer", "policy_loss", "loss_terms", "optimizer_step"}


@dataclass
class Observed:
    """The run and what the plugin wrote down in its processes."""

    training: Training
    folder: Path

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        lines = [line for file in self.folder.glob("*.jsonl") for line in file.read_text().splitlines()]
        return sorted((json.loads(line) for line in lines), key=lambda record: (record["pid"], record["order"]))

    def of(self, stage: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["stage"] == stage]

    def policy(self, step: int) -> dict[str, Any]:
        """What `run.log_probs`, `run.score` and `run.generate` answered during a step."""
        return torch.load(self.folder / f"policy_{step}.pt", weights_only=True)

    def reference(self, step: int) -> tuple[Any, Any]:
        """The weights that step began with, in plain Transformers."""
        start = OmegaConf.load(self.training.out / "config.yaml").actor_rollout_ref.model.path
        path = start if step == 1 else self.training.out / f"global_step_{step - 1}" / "actor" / "huggingface"
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
            path
        )


@pytest.fixture(scope="module", params=["cpu", pytest.param("cpu-vllm", marks=pytest.mark.vllm)])
def run(third_party: Path, out: Path, request: pytest.FixtureRequest) -> Observed:
    """Asked for five steps; the plugin stops after the second."""
    folder = out / f"records_{request.param}"
    folder.mkdir()
    training = train(
        "every_stage",
        out / f"every_stage_{request.param}",
        *VALIDATED,
        f"plugins.every_stage.folder={folder}",
        "trainer.total_training_steps=5",
        "trainer.save_freq=1",
        "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]",
        preset=request.param,
        site=third_party,
    )
    return Observed(training, folder)


class TestWhereAndWhen:
    """Each stage is called, in the documented order, in the documented process."""

    def test_every_stage_is_called(self, run: Observed) -> None:
        assert {record["stage"] for record in run.records} == set(IMPLEMENTED)

    def test_the_driver_calls_its_stages_in_order(self, run: Observed) -> None:
        (driver,) = {record["pid"] for record in run.of("select_prompts")}
        called = [record["stage"] for record in run.records if record["pid"] == driver]
        of_a_step = [stage for stage in IMPLEMENTED if stage not in OTHER_PROCESSES and stage != "on_train_end"]
        assert called == [*of_a_step * 2, "on_train_end"]

    @pytest.mark.parametrize(
        ("process", "stages"),
        [
            ("PluginAgentLoopWorker", ["rollout_group"]),
            ("RewardLoopWorker", ["score_answer"]),
            ("WorkerDict", ["policy_loss", "loss_terms", "optimizer_step"]),
        ],
    )
    def test_other_processes(self, run: Observed, process: str, stages: list[str]) -> None:
        (pid,) = {record["pid"] for record in run.of(stages[0])}
        ours = [record for record in run.records if record["pid"] == pid]
        assert {record["role"] for record in ours} == {f"ray::{process}"}
        assert pid != run.of("observe")[0]["pid"]
        called = [record["stage"] for record in ours]
        assert called == stages * (len(called) // len(stages))

    def test_steps_count_from_one_everywhere(self, run: Observed) -> None:
        for stage in set(IMPLEMENTED) - {"score_answer", "on_train_end"}:
            assert sorted({record["step"] for record in run.of(stage)}) == [1, 2]

    def test_a_plugin_can_stop_the_training(self, run: Observed) -> None:
        assert [step["step"] for step in run.training.steps] == [1, 2]
        assert "stopping after step 2: every_stage: enough" in run.training.output
        assert [record["step"] for record in run.of("on_train_end")] == [2]


class TestData:
    """What a stage changes is what the later ones see, in whatever process they run."""

    def test_the_chosen_prompts_are_rolled_out(self, run: Observed) -> None:
        for step in (0, 1):
            chosen = run.of("select_prompts")[step]["ids"]
            assert run.of("prepare_prompts")[step]["ids"] == chosen
            rolled = [record for record in run.of("rollout_group") if record["step"] == step + 1]
            assert sorted(record["id"] for record in rolled) == sorted(chosen)
            assert all(record["hint"] == f"h{record['id']}" for record in rolled)

    def test_validation_asks_its_own_prompts(self, run: Observed) -> None:
        scored = [record for record in run.of("score_answer") if record["split"] == "val"]
        assert len(scored) == 2 * HELD_OUT
        for record in run.of("prepare_validation"):
            assert record["ids"] == list(range(HELD_OUT))
            sums = {str(sum(map(int, question.rstrip("=").split("+")))) for question in record["asked"]}
            assert sums == {answer["truth"] for answer in scored}
        for record in run.of("on_validation_end"):
            assert any(name.startswith("val-core/verl_plugins/arithmetic/") for name in record["scores"])

    def test_groups_are_generated_and_scored_in_the_workers(self, run: Observed) -> None:
        groups = run.of("rollout_group")
        assert {record["size"] for record in groups} == {ROLLOUTS}
        assert all(record["info"] == ["acc", "characters", "kind", "score"] for record in groups)
        budget = {0: 2, 1: 12}
        assert all(max(record["lengths"]) <= budget[record["id"] % 2] for record in groups)
        trained = [record for record in run.of("score_answer") if record["split"] == "train"]
        assert len(trained) == 2 * PROMPTS * ROLLOUTS
        scores = [score for record in groups for score in record["scores"]]
        right = sum(record["text"].strip() == record["truth"] for record in trained)
        assert 0 < right == sum(scores) < len(scores)

    def test_rewards_columns_and_budgets_reach_the_driver(self, run: Observed) -> None:
        for record in run.of("shape_rewards"):
            assert (record["rows"], record["groups"]) == (PROMPTS * ROLLOUTS, PROMPTS)
            for fact in ("doubled", "verdicts", "hints", "budgets", "characters"):
                assert record[fact], fact
            assert record["truncated"] > 0
            assert record["kinds"] == ["exact"]
        assert run.of("select_rows")[0]["sessions"] == list(range(ROLLOUTS))

    def test_dropped_rows_are_gone_and_the_full_batch_remains(self, run: Observed) -> None:
        for record in run.of("estimate_advantage"):
            assert (record["rows"], record["full"]) == (PROMPTS * KEPT, PROMPTS * ROLLOUTS)
            assert record["numbered"]
            assert {shape[0] for shape in record["shapes"]} == {PROMPTS * KEPT}
            assert 0 < record["entropy"] < math.log(260)
            assert record["rollout_difference"] < 1e-3
        assert all(record["advantages"] and record["in_flight"] == 0 for record in run.of("observe"))

    def test_the_loss_sees_what_the_driver_put(self, run: Observed) -> None:
        kept = [row for row in range(PROMPTS * ROLLOUTS) if row % ROLLOUTS != DROPPED]
        for record in run.of("policy_loss"):
            assert record["rows"] == PROMPTS * KEPT
            assert record["numbers"] == kept
            for fact in ("finite", "put_per_row", "put_per_token", "gradient"):
                assert record[fact], fact
            assert record["on_policy"] < 1e-4
        for loss, driver in zip(run.of("policy_loss"), run.of("estimate_advantage"), strict=True):
            assert loss["entropy"] == pytest.approx(driver["entropy"], abs=1e-4)

    def test_the_optimiser_changes_every_weight(self, run: Observed) -> None:
        for record, step in zip(run.of("optimizer_step"), run.training.steps, strict=True):
            assert record["changed"] == record["gradients"] > 10
            assert record["rate"] == 5e-5
            assert record["mini_batch"] == 0
            assert record["norm"] == pytest.approx(step["actor/grad_norm"], rel=1e-5)

    def test_metrics_of_every_process_are_written(self, run: Observed) -> None:
        for number, step in enumerate(run.training.steps):
            ours = {key.rpartition("/")[2]: step[key] for key in step if key.startswith("plugins/every_stage/")}
            assert ours.pop("shaped") == pytest.approx(2 * step["health/accuracy"])
            assert ours.pop("norm") == pytest.approx(step["actor/grad_norm"], rel=1e-5)
            assert ours == {"rows": 112.0, "terms": 1.0, "extra_rollouts": 3.0, "end": number + 1.0, "added": 1.0}
            assert step["plugins/loss_terms/pull"] > 0
            loss = step["actor/pg_loss"] + step["plugins/loss_terms/pull"]
            assert step["actor/loss"] == pytest.approx(loss, abs=1e-5)
            assert run.of("on_step_end")[number]["loss"] == pytest.approx(step["actor/loss"])

    def test_state_of_driver_and_actor_is_saved_with_every_checkpoint(self, run: Observed) -> None:
        from safetensors.torch import load_file

        for step in (1, 2):
            arrays = load_file(run.training.out / f"global_step_{step}/plugins/arrays.safetensors")
            assert arrays["driver/every_stage/total"][0] == step
            assert arrays["actor/every_stage/updates"].tolist() == [step, 0, 0, 0]


@pytest.mark.parametrize("step", [1, 2], ids=["first weights", "after an update"])
class TestPolicy:
    """`run.log_probs`, `run.score` and `run.generate` are those of the current weights in plain Transformers."""

    @pytest.fixture
    def answers(self, run: Observed, step: int) -> dict[str, Any]:
        return run.policy(step)

    @pytest.fixture
    def log_probs(self, run: Observed, step: int) -> Any:
        """Teacher-forced log-probs of a continuation."""
        model, tokenizer = run.reference(step)

        def forward(prompt: Any, target: Any, temperature: float = 1.0) -> Tensor:
            prompt, target = (tokenizer(x)["input_ids"] if isinstance(x, str) else x for x in (prompt, target))
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *target]])).logits[0, len(prompt) - 1 : -1].float()
            return torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(target)[:, None])[:, 0]

        return forward

    @pytest.fixture
    def rows(self, answers: dict[str, Any]) -> list[tuple[int, list[int], list[int]]]:
        """Row, prompt and response of some rows of the batch."""
        found = []
        for row in range(0, len(answers["lengths"]), 9):
            prompt = answers["prompts"][row, : answers["prompt_lengths"][row]].tolist()
            found.append((row, prompt, answers["responses"][row, : answers["lengths"][row]].tolist()))
        return found

    def test_log_probs_of_the_batch(self, answers, rows, log_probs) -> None:
        torch.testing.assert_close(answers["log_probs"], answers["old_log_probs"], atol=1e-4, rtol=0)
        for row, prompt, response in rows:
            near(answers["log_probs"][row, : len(response)], log_probs(prompt, response))
            near(answers["tempered"][row, : len(response)], log_probs(prompt, response, TEMPERATURE))

    def test_log_probs_of_the_prompts(self, answers, rows, log_probs) -> None:
        for row, prompt, _ in rows:
            near(answers["prompt_log_probs"][row, : len(prompt) - 1], log_probs(prompt[:1], prompt[1:]))

    def test_score_of_given_answers(self, answers, log_probs) -> None:
        for question, target, scores in zip(answers["questions"], TARGETS, answers["scores"], strict=True):
            near(scores, log_probs(question, target))

    def test_generated_answers(self, answers, log_probs) -> None:
        asked = [question for question in answers["questions"] for _ in range(3)]
        assert len(answers["generated"]) == 9
        assert len({text for _, _, text in answers["generated"]}) > 1
        for question, (tokens, reported, text), scores in zip(
            asked, answers["generated"], answers["rescored"], strict=True
        ):
            assert 0 < len(tokens) <= 16
            assert text.strip("0123456789 \n") == "" or len(text) <= len(tokens)
            near(torch.tensor(reported), log_probs(question, tokens), atol=1e-3)
            near(scores, log_probs(question, tokens))


def near(actual: Tensor, expected: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)
