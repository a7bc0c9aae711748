"""What goes wrong is said in one sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from training import SHORT, train

pytestmark = pytest.mark.e2e


class TestErrors:
    """The terminal shows the cause in one line; the traceback is in the log."""

    def test_before_any_process_starts(self, tmp_path: Path) -> None:
        done = train("grpo", tmp_path / "run", "data.train_files=/no/such/file.parquet", check=False)
        assert done.returncode != 0
        errors = [line for line in done.output.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert "data.train_files" in errors[0]
        assert "/no/such/file.parquet" in errors[0]
        assert "Traceback" not in done.output
        assert not (tmp_path / "run" / "metrics.jsonl").exists()

    def test_a_plugin_refuses_the_data(self, tmp_path: Path, third_party: Path) -> None:
        steps = "trainer.total_training_steps=2"
        done = train("broken", tmp_path / "run", *SHORT, steps, site=third_party, check=False)
        assert done.returncode == 1
        lines = done.output.splitlines()
        said = "error: step 1: the 128 rewards are not what the broken plugin can use"
        assert lines[-2] == f"{said} (plugin 'broken' in estimate_advantage, {third_party / 'broken.py'}:10)"
        assert lines[-1].endswith("verl.log")
        assert "Traceback" not in done.output
        assert len(lines) == 7  # run folder, what was looked at, and these
        assert "Traceback" in done.log
        assert "raised by plugin 'broken' in estimate_advantage" in done.log

    def test_a_state_that_cannot_be_saved_ends_the_run_before_its_first_step(
        self, tmp_path: Path, third_party: Path
    ) -> None:
        steps = ("trainer.total_training_steps=3", "trainer.save_freq=3")
        done = train("unsaved", tmp_path / "run", *SHORT, *steps, site=third_party, check=False)
        assert done.returncode == 1 and "step    1/3" not in done.output
        (error,) = [line for line in done.output.splitlines() if line.startswith("error: ")]
        assert "driver/unsaved/asked" in error and "neither as an array nor as JSON" in error

    def test_sessions_that_fail(self, tmp_path: Path, third_party: Path) -> None:
        """Some in the first step, which goes on; all in the second, which stops with the cause and not with verl's."""
        steps = "trainer.total_training_steps=3"
        done = train("failing", tmp_path / "run", *SHORT, steps, site=third_party, check=False)
        assert done.returncode == 1
        cause = r"sessions failed: KeyError: .level of prompt 0. \(plugin 'failing' in rollout_group, .*broken.py:\d+\)"
        (warning,) = [line for line in done.output.splitlines() if line.startswith("warning: ") and "failed" in line]
        assert re.search(rf"\d+ of 128 {cause} \(prompt \d+\)", warning)
        (error,) = [line for line in done.output.splitlines() if line.startswith("error: ")]
        assert re.search(rf"128 of 128 {cause}", error)
        assert "materializable" not in done.output
        assert 0 < done.steps[0]["rollout/failed_sessions"] < 1

    def test_what_a_training_survives(self, tmp_path: Path, third_party: Path) -> None:
        """Sessions that end in odd ways and gradients that are no numbers; not a loss that is none."""
        loops = tmp_path / "loops.yaml"
        loops.write_text("- {name: odd, _target_: odd_loop.Odd}")
        agent = "actor_rollout_ref.rollout.agent"
        odd = (f"{agent}.agent_loop_config_path={loops}", f"{agent}.default_agent_loop=odd")
        steps = "trainer.total_training_steps=3"
        done = train("trouble", tmp_path / "run", *SHORT, *odd, steps, site=third_party, check=False)
        assert done.returncode == 1
        lines = done.output.splitlines()
        cause = r"warning: \d+ of 128 sessions failed: (SystemExit|CancelledError|RuntimeError: coroutine raised Stop)"
        assert any(re.match(cause, line) for line in lines)
        (said,) = [line for line in lines if "the gradient norm is not finite" in line]
        assert said.startswith("warning: step 1: ")
        (error,) = [line for line in lines if line.startswith("error: ")]
        assert error.startswith("error: step 2: the actor's loss is inf")
        (step,) = done.steps
        assert 0 < step["rollout/failed_sessions"] < 1 / 8
        assert step["response_length/min"] == 1
