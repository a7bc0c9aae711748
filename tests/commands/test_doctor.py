"""`verl-plugins doctor`: what it finds, what it says to do, and its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

from verl_plugins.commands import doctor as checks
from verl_plugins.commands.cli import app
from verl_plugins.composition import scratch
from verl_plugins.composition.compose import compose

COMMAND = Path(sys.executable).with_name("verl-plugins")


def doctor(*args: str, **env: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit code and findings by name."""
    done = subprocess.run(
        [COMMAND, "doctor", "--json", *args], capture_output=True, text=True, env={**os.environ, **env}
    )
    assert done.stdout, done.stderr
    return done.returncode, {finding["what"]: finding for finding in json.loads(done.stdout)}


def test_a_healthy_machine() -> None:
    code, found = doctor()
    broken = [finding for finding in found.values() if finding["state"] == "broken"]
    assert (code, broken) == (0, [])
    for what in ("Python", "verl-plugins", "torch", "verl", "machine", "cache", "plugins", "recipes", "preset cpu"):
        assert found[what]["state"] == "ok", found[what]
    assert all(finding["mend"] for finding in found.values() if finding["state"] != "ok")


def test_what_killed_runs_left_is_told_and_removed_on_demand(monkeypatch) -> None:
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as place:
        dead, other = Path(place) / "vp_dead", Path(place) / "vp_other"
        for folder in (dead, other):
            folder.mkdir()
        (dead / scratch.OWNER).write_text('{"pid": 999999999, "started": 0}')
        monkeypatch.setattr(scratch, "_places", lambda: iter([Path(place)]))
        (finding,) = [one for one in checks._environment() if one.what == "leftovers"]
        assert finding.state == "absent" and "1 temporary folders" in finding.found and "--clean" in finding.mend
        done = CliRunner().invoke(app, ["doctor", "--clean"])
        assert (done.exit_code, done.output) == (0, "removed 1 temporary folders of killed runs\n")
        assert [path.name for path in Path(place).iterdir()] == ["vp_other"]
        assert not [one for one in checks._environment() if one.what == "leftovers"]


def test_what_is_broken_is_named_with_its_cure(site, tmp_path: Path) -> None:
    site.distribution("ghost", ghost="no_such_module:Method")
    site.recipes("cookbook", burnt="recipe: {titel: Stew}")
    (tmp_path / "file").touch()
    code, found = doctor(VERL_PLUGINS_BLOCK="vade,vaed")
    assert code == 1
    assert "no_such_module" in found["plugin ghost"]["found"] and "pip" in found["plugin ghost"]["mend"]
    assert "titel" in found["recipe burnt"]["found"] and "burnt.yaml" in found["recipe burnt"]["mend"]
    assert "not installed: vaed" in found["VERL_PLUGINS_BLOCK"]["found"]
    assert found["preset cpu"]["state"] == "ok"


@pytest.mark.parametrize("there", [True, False])
def test_flash_attention_is_looked_for_where_there_is_a_gpu(monkeypatch, there: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(checks, "version", lambda name: "2.8.3")
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn") if there else None)
    (finding,) = checks._attention()
    assert finding.state == ("ok" if there else "absent")
    assert ("pip install flash-attn" in finding.mend, "attn_implementation=sdpa" in finding.mend) == (not there,) * 2


def test_without_a_gpu_flash_attention_is_not_missed() -> None:
    assert torch.cuda.is_available() or list(checks._attention()) == []


def test_the_settings_that_do_without_flash_attention_compose() -> None:
    model = compose("grpo", "1gpu", checks.WITHOUT_FLASH_ATTENTION).config.actor_rollout_ref.model
    assert (model.override_config.attn_implementation, model.use_remove_padding) == ("sdpa", False)


@pytest.mark.e2e
def test_workers_of_every_kind() -> None:
    code, found = doctor("--ray")
    kinds = {what.split(" on node ")[0]: finding for what, finding in found.items() if " on node " in what}
    assert kinds.keys() == {"actor worker", "agent-loop worker", "reward worker"}
    assert {finding["found"] for finding in kinds.values()} == {"same packages as here"}
    assert code == 0


class TestARun:
    """With the words of a run, what that run would look at."""

    def test_one_that_can_start(self) -> None:
        found = {one.what: one for one in checks.examine_run("vade", "cpu")}
        assert {one.state for one in found.values()} == {"ok"}
        assert found["run vade, reward"].found == "plugin math_verify"
        assert "512 rows" in next(one.found for one in checks.examine_run("vade", "cpu") if "train" in one.found)

    @pytest.mark.parametrize(("backend", "packages"), [("gloo", []), ("nccl", ["cupy"]), ("nixl", ["cupy", "nixl"])])
    def test_what_carries_the_weights(self, backend: str, packages: list[str]) -> None:
        words = [
            "trainer.v1.trainer_mode=separate_async",
            f"actor_rollout_ref.rollout.checkpoint_engine.backend={backend}",
        ]
        found = [one for one in checks.examine_run("vade", "cpu", words) if one.what == f"checkpoint engine {backend}"]
        assert [one.found for one in found] == [f"package {package} is not installed here" for package in packages]
        assert all(one.state == "absent" and one.mend.startswith("pip install ") for one in found)

    @pytest.mark.parametrize(
        ("words", "part"),
        [
            (("vadee", "cpu"), "did you mean 'vade'?"),
            (("vade", "cpu", ("data.train_files=/no/such.parquet",)), "there is no file /no/such.parquet"),
            (("vade", "cpu", ("actor_rollout_ref.model.path=/no/model",)), "there is no folder /no/model"),
            (("vade", "cpu", ("data.max_prompt_length=3",)), "max_prompt_length"),
        ],
    )
    def test_one_that_cannot(self, words: tuple, part: str) -> None:
        (finding,) = checks.examine_run(*words)
        assert finding.state == "broken" and part in finding.found

    def test_the_command_takes_the_words_of_a_run(self) -> None:
        code, found = doctor("grpo", "--preset", "cpu", "data.train_files=/no/such.parquet")
        assert code == 1
        assert "/no/such.parquet" in found["run grpo"]["found"]
        assert found["Python"]["state"] == "ok"
