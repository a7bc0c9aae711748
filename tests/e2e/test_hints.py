"""Recipe sage on a user's data: groups that fail are rolled out again in the workers, with the hint in their prompt."""

from __future__ import annotations

import json

import pytest
from training import SHORT, Training, train
from typer.testing import CliRunner

from verl_plugins.commands.cli import app

pytestmark = pytest.mark.e2e

PROMPTS, ROLLOUTS = 16, 8
HINT = "A hint that may help you:\n1="
SCRIPTED = '''
"""SAGE whose policy cannot write hints: it is asked for them, and then given some."""
from verl_plugins import hookimpl
from verl_plugins.sampling.sage import Sage

class Scripted(Sage):
    name = "scripted_sage"

    async def _ask_hints(self, run, prompt):
        assert await super()._ask_hints(run, prompt) is None
        return {"level_1": " ", "level_2": 600 * "long", "level_3": "1="}

    @hookimpl
    def prepare_prompts(self, run, prompts):
        super().prepare_prompts(run, prompts)

    @hookimpl
    async def rollout_group(self, run, prompt, sample):
        return await super().rollout_group(run, prompt, sample)

    @hookimpl
    def observe(self, run, batch):
        super().observe(run, batch)
'''


@pytest.fixture(scope="module", params=[pytest.param("sync", marks=pytest.mark.long), "colocate_async"])
def sage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """Two steps in each mode; nearly all sums of large digits fail at first, and hardly any of the small ones."""
    folder = tmp_path_factory.mktemp("sage")
    (folder / "scripted.py").write_text(SCRIPTED)
    information = folder / "scripted-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: scripted\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[verl_plugins]\nscripted_sage = scripted:Scripted\n")
    rows = []
    for number in range(2 * PROMPTS):
        a, b, c = (5 + number % 5, 5 + number // 7, number % 9) if number % 4 else (1, 1, number % 5)
        rows.append({"question": f"{a}+{b}+{c}=", "answer": f"{a}+{b}+{c} is {a + b + c}.\n#### {a + b + c}"})
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = CliRunner().invoke(app, ["data", "convert", f"{folder}/sums.jsonl", "--to", f"{folder}/train.parquet"])
    assert done.exit_code == 0, done.output
    return train(
        "grpo",
        folder / "run",
        *SHORT,
        "+plugins.scripted_sage.hint_attempts=2",
        "+plugins.scripted_sage.hint_max_tokens=8",
        f"trainer.v1.trainer_mode={request.param}",
        "trainer.total_training_steps=2",
        "trainer.save_freq=2",
        f"trainer.rollout_data_dir={folder / 'rollouts'}",
        f"data.train_files={folder}/train.parquet",
        f"data.val_files={folder}/train.parquet",
        "data.max_prompt_length=1200",
        "+actor_rollout_ref.model.override_config.max_position_embeddings=1216",
        site=folder,
    )


def test_failed_groups_are_rolled_out_again(sage: Training, request: pytest.FixtureRequest) -> None:
    on_policy = request.node.callspec.params["sage"] == "sync"
    needing = [step["plugins/scripted_sage/needing_hint"] for step in sage.steps]
    assert min(needing) < 1, (
        "while rollouts go on, those that need no hint come first, and a step may have none of them"
    )
    for step in sage.steps:
        prefix = "plugins/scripted_sage/"
        found = {key.removeprefix(prefix): value for key, value in step.items() if key.startswith(prefix)}
        assert 0 < found["needing_hint"] <= 1
        assert found["level_3"] == pytest.approx(found["needing_hint"])
        assert found["level_0"] == pytest.approx(1 - found["needing_hint"])
        assert (found["level_1"], found["level_2"], found["hint_too_long"]) == (0, 0, 1)
        assert found["rescued"] + found["still_unsolved"] == 1
        assert found["extra_rollouts"] == ROLLOUTS
        assert (found["hint_attempts"], found["hint_parse_failed"]) == (2, 1)
        assert 2 <= found["hint_tokens_mean"] <= 16
        assert step["health/all_wrong_groups"] == pytest.approx(found["needing_hint"] * found["still_unsolved"])
        if on_policy:
            assert step["training/rollout_probs_diff_max"] < 1e-3, "log-probs are those of the prompt with its hint"
            assert step["rollout/responses_per_prompt"] == pytest.approx(step["rollout/responses"] / PROMPTS)
        assert step["actor/grad_norm"] > 0.01
        hinted = PROMPTS * found["needing_hint"]
        assert step["rollout/responses"] == pytest.approx(PROMPTS * ROLLOUTS + hinted * (ROLLOUTS + 2))
        assert step["rollout/tokens"] > step["health/generated_tokens"] + hinted * found["hint_tokens_mean"]


def test_a_group_has_one_prompt_and_nothing_is_left_of_the_plain_one(sage: Training) -> None:
    hinted = 0
    for file in (sage.out.parent / "rollouts").glob("*.jsonl"):
        groups: dict[str, list[str]] = {}
        for row in map(json.loads, file.read_text().splitlines()):
            groups.setdefault(row["uid"].rsplit("_", 2)[0], []).append(row["input"])
        assert len(groups) == PROMPTS
        assert {(len(inputs), len(set(inputs))) for inputs in groups.values()} == {(ROLLOUTS, 1)}
        hinted += sum(inputs[0].endswith(HINT) for inputs in groups.values())
    expected = sum(PROMPTS * step["plugins/scripted_sage/needing_hint"] for step in sage.steps)
    assert hinted == pytest.approx(expected)


def test_levels_are_saved(sage: Training) -> None:
    from safetensors.torch import load_file

    arrays = load_file(sage.out / "global_step_2/plugins/arrays.safetensors")
    level = arrays["driver/scripted_sage/level"]
    assert set(level[level >= 0].tolist()) == {0, 3}
