"""`verl-plugins new`: what it writes is a package that installs, passes its own tests, is listed and composes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from packages import EXAMPLE, install

from verl_plugins.commands import scaffold
from verl_plugins.composition import manifest
from verl_plugins.errors import PluginError

ROOT = Path(__file__).parents[2]
COMMAND = Path(sys.executable).with_name("verl-plugins")


def files_in(folder: Path) -> dict[Path, str]:
    """Text by relative path."""
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(folder): path.read_text() for path in files}


def test_the_example_is_what_the_command_writes() -> None:
    rendered = scaffold.render("rank_advantage", "estimate_advantage")
    assert {path.as_posix() for path in files_in(EXAMPLE)} == {path.as_posix() for path in rendered}
    assert files_in(EXAMPLE) == rendered


@pytest.mark.parametrize("stage", scaffold.STAGES)
class TestPackage:
    """Of each template, under a name of two words."""

    @pytest.fixture
    def package(self, tmp_path: Path, stage: str) -> Path:
        done = subprocess.run(
            [COMMAND, "new", "two_words", "--stage", stage, "--dir", tmp_path],
            capture_output=True,
            text=True,
            check=True,
        )
        written = [Path(line) for line in done.stdout.split("\n\n")[0].splitlines()]
        assert set(written) == {tmp_path / "two_words" / file for file in files_in(tmp_path / "two_words")}
        return tmp_path / "two_words"

    def test_nothing_of_the_template_s_name_is_left(self, package: Path, stage: str) -> None:
        for path, text in files_in(package).items():
            for form in ("my_method", "my-method", "MyMethod", "My method"):
                assert form not in f"{path}\n{text}"

    def test_it_works_once_installed(self, package: Path, stage: str, site) -> None:
        install(package, site.path)

        def run(*command: str | Path) -> str:
            done = subprocess.run(command, cwd=package, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        assert " passed" in run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", os.devnull, "tests")
        found = json.loads(run(COMMAND, "list", "--json"))
        for kind in ("plugins", "recipes"):
            (ours,) = [item for item in found[kind] if item["distribution"] == "two-words"]
            assert ours["name"] == "two_words"
            assert ours["status"] in ("ok", "example")
        for recipe, *added in (["grpo+two_words"], ["grpo", "+plugins.two_words={}"]):
            plan = run(COMMAND, "run", recipe, "--preset", "cpu", "--dry-run", *added)
            (line,) = [line for line in plan.splitlines() if line.startswith("#") and "two_words (" in line]
            assert line.startswith(f"#   {stage}: two_words (")


class TestRefusals:
    """Nothing is written, and one sentence says why."""

    @pytest.mark.parametrize(
        ("name", "part"),
        [
            ("My-Method", "lower-case words joined by underscores"),
            ("2fast", "lower-case words joined by underscores"),
            ("class", "lower-case words joined by underscores"),
            ("../up", "lower-case words joined by underscores"),
            ("vade", "'vade' is already a name that verl-plugins uses"),
            ("cpu", "'cpu' is already a name that verl-plugins uses"),
            ("recipes", "'recipes' is already a name that verl-plugins uses"),
            ("json", "'json' would hide what Python or verl_plugins calls so"),
            ("batch", "'batch' would hide what Python or verl_plugins calls so"),
        ],
    )
    def test_names(self, name: str, part: str, tmp_path: Path, sentence: Callable) -> None:
        self.refused(name, "policy_loss", tmp_path, sentence, part)

    def test_stage(self, tmp_path: Path, sentence: Callable) -> None:
        self.refused("mine", "policy_los", tmp_path, sentence, "--stage 'policy_los'", "did you mean 'policy_loss'?")

    def test_folders(self, tmp_path: Path, sentence: Callable) -> None:
        with pytest.raises(PluginError) as error:
            scaffold.create("mine", "policy_loss", tmp_path / "nowhere")
        sentence(error.value, "nowhere is not a folder")
        scaffold.create("mine", "policy_loss", tmp_path)
        before = files_in(tmp_path)
        with pytest.raises(PluginError) as error:
            scaffold.create("mine", "estimate_advantage", tmp_path)
        sentence(error.value, "mine is already there")
        assert files_in(tmp_path) == before

    def test_a_name_of_another_third_party(self, site, tmp_path: Path, sentence: Callable) -> None:
        site.plugin("theirs", distribution="acme")
        self.refused("theirs", "policy_loss", tmp_path / "site", sentence, "that acme uses")

    def test_on_the_command_line(self, tmp_path: Path) -> None:
        done = subprocess.run([COMMAND, "new", "vade", "--dir", tmp_path], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert done.stderr.startswith("error: 'vade' is already")

    @staticmethod
    def refused(name: str, stage: str, folder: Path, sentence: Callable, *parts: str) -> None:
        before = set(folder.rglob("*"))
        with pytest.raises(PluginError) as error:
            scaffold.create(name, stage, folder)
        sentence(error.value, *parts)
        assert set(folder.rglob("*")) == before


def test_templates_are_offered_for_stages_that_exist() -> None:
    assert {path.name for path in scaffold.TEMPLATE.iterdir()} == {"common", *scaffold.STAGES}
    assert set(scaffold.STAGES) <= set(manifest.STAGES)


def test_the_wheel_has_the_template(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"verl_plugins/commands/template/{path.as_posix()}" for path in files_in(scaffold.TEMPLATE)} <= names
    assert "verl_plugins/testing/check.py" in names
