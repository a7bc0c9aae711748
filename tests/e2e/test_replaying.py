"""Recipe r3: stored answers enter the batch as rows, hard prompts are asked twice, and a restart changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import SHORT, Training, four_steps, train

pytestmark = pytest.mark.e2e

PROMPTS, ROLLOUTS, BYTES = 16, 8, 256
SMALL = (
    "data.train_max_samples=32",
    "data.max_prompt_length=48",
    f"plugins.r3.wording={Path(__file__).parents[2] / 'benchmarks/studies/again.yaml'}",
)
"""An epoch is two steps, and the wording is one the preset's model can read."""


@pytest.fixture(scope="module")
def whole(out: Path) -> Training:
    return train("r3", out / "r3", *four_steps(out / "r3"), *SMALL)


@pytest.fixture(scope="module")
def resumed(whole: Training, out: Path) -> Training:
    folder = out / "r3_resumed"
    path = ("trainer.resume_mode=resume_path", f"trainer.resume_from_path={whole.out / 'global_step_2'}")
    return train("r3", folder, *four_steps(folder), *SMALL, *path)


def of_r3(training: Training, name: str) -> list[float]:
    return [step[f"plugins/r3/{name}"] for step in training.steps]


def rows(training: Training, step: int) -> list[dict]:
    """What was trained on, as verl dumps it."""
    return [json.loads(line) for line in (training.out / f"rollouts/{step}.jsonl").read_text().splitlines()]


def session(row: dict) -> tuple[str, int]:
    uid, number, _ = row["uid"].rsplit("_", 2)
    return uid, int(number)


def test_answers_are_replayed_from_the_second_epoch_on(whole: Training) -> None:
    replayed = of_r3(whole, "replayed_rows")
    assert replayed[:2] == [0, 0] and min(replayed[2:]) > 0
    for step, expected in enumerate(replayed, 1):
        found = [row for row in rows(whole, step) if session(row)[1] >= ROLLOUTS]
        assert len(found) == expected
        assert len(rows(whole, step)) == PROMPTS * ROLLOUTS, "they replace as many answers"


def test_a_replayed_answer_is_one_of_an_earlier_step(whole: Training) -> None:
    for step in (3, 4):
        trained = rows(whole, step)
        for row in [row for row in trained if session(row)[1] >= ROLLOUTS]:
            prompt_id = row["uid"].split("-")[0]
            earlier = [old for before in range(1, step) for old in rows(whole, before)]
            same = [old for old in earlier if old["uid"].split("-")[0] == prompt_id and old["output"] == row["output"]]
            assert same, row
            group = [other for other in trained if session(other)[0] == session(row)[0]]
            assert {other["input"] for other in group} == {row["input"]}
            scores = [other["score"] for other in group]
            assert min(scores) < 1 < max(scores), "a collapsed group has both outcomes now"


def test_collapsed_groups_have_a_signal_again(whole: Training) -> None:
    for step in whole.steps[2:]:
        collapsed = step["plugins/r3/groups_all_wrong"] + step["plugins/r3/groups_all_right"]
        mixed = step["plugins/r3/groups_mixed"]
        assert collapsed + mixed == PROMPTS
        served = step["plugins/r3/replay_hit_rate"] * collapsed
        assert served >= 1
        assert step["health/mixed_groups"] == pytest.approx(mixed / PROMPTS), "health is of what was rolled out"
        assert step["rollout/responses"] == PROMPTS * ROLLOUTS


def test_hard_prompts_are_asked_a_second_time(whole: Training) -> None:
    assert of_r3(whole, "isr_prompts")[:2] == [0, 0] and sum(of_r3(whole, "isr_prompts")) > 0
    for step, expected in enumerate(of_r3(whole, "isr_prompts"), 1):
        asked = {session(row)[0]: row["input"] for row in rows(whole, step)}
        assert len(asked) == PROMPTS
        second = [text for text in asked.values() if "\n" in text]
        assert len(second) == expected
        for text in second:
            first, again = text.split("\n")
            assert first.startswith(again) and len(first) > len(again), "problem, failed answer, problem"
            assert again in asked.values(), "beside its plain group"


def test_numbers_are_sound(whole: Training) -> None:
    for step in whole.steps:
        assert step["training/rollout_probs_diff_max"] < (1e-3 if step["step"] <= 2 else 1.0)
        assert step["actor/grad_norm"] > 0.01
    assert all(step["plugins/r3/replay_ratio_clipfrac"] == 0 for step in whole.steps[2:]), "one update per step"
    kept = load_file(whole.out / "global_step_4/plugins/arrays.safetensors")
    assert kept["driver/r3/seen"].sum() == 4 * PROMPTS * ROLLOUTS
    sizes = torch.unique(kept["driver/r3/prompt_id"] * 2 + kept["driver/r3/correct"], return_counts=True)[1]
    assert sizes.max() == 4 and of_r3(whole, "buffer_queries")[-1] == len(set(kept["driver/r3/prompt_id"].tolist()))
    assert int(kept["driver/r3/tokens"].max()) <= BYTES


@pytest.mark.long
def test_a_restart_changes_nothing(whole: Training, resumed: Training) -> None:
    for step in (3, 4):
        told = ("uid", "input", "output", "score")
        one, other = ([[row[name] for name in told] for row in rows(run, step)] for run in (whole, resumed))
        assert one == other
    arrays, again = (load_file(run.out / "global_step_4/plugins/arrays.safetensors") for run in (whole, resumed))
    assert arrays.keys() == again.keys() and all(torch.equal(arrays[name], again[name]) for name in arrays)
    for one, other in zip(whole.steps[2:], resumed.steps, strict=True):
        assert other["actor/grad_norm"] == pytest.approx(one["actor/grad_norm"], rel=1e-6)


@pytest.mark.long
def test_trains_with_vade_while_rollouts_go_on(out: Path) -> None:
    """Mode colocate_async: vade chooses, answers are appended, with the log-probs they were written with.

    Of two tokens, most answers are cut off, and those that are wrong are ranked.
    """
    training = train(
        "r3+vade",
        out / "r3_vade",
        *SHORT,
        *SMALL,
        "trainer.v1.trainer_mode=colocate_async",
        "trainer.total_training_steps=4",
        "plugins.r3.mix=append",
        "plugins.r3.old_log_probs=stored",
        "plugins.r3.strategy=random",
        "data.max_response_length=2",
    )
    assert [step["step"] for step in training.steps] == [1, 2, 3, 4]
    assert sum(of_r3(training, "replayed_rows")) > 0
    assert sum(of_r3(training, "serr_ranked")) > 0
    assert all(0.2 < share < 1 for share in of_r3(training, "truncated_fraction"))
    for step in training.steps:
        assert step["actor/grad_norm"] > 0.01
        assert step["plugins/vade/seen_fraction"] > 0
