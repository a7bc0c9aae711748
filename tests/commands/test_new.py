"""`verl-plugins new`: what it writes is a package that installs, passes its own tests, is listed and composes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from packages import EXAMPLE, install
from typer.testing import CliRunner

from verl_plugins.commands import scaffold
from verl_plugins.commands.cli import app
from verl_plugins.errors import PluginError
from verl_plugins.hookspecs import STAGES

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


@pytest.fixture(scope="class")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A package of each stage, written, installed and on the import path: stage -> folder."""
    site, folder = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("new")
    written = {stage: folder / f"two_{stage}" for stage in STAGES}
    for stage, package in written.items():
        scaffold.create(package.name, stage, folder)
    install(site, *written.values())
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")])))
        yield written
    for name in [name for name in sys.modules if name.partition(".")[0] in os.listdir(site)]:
        del sys.modules[name]


def own_tests(packages: Sequence[Path], *options: str) -> dict[str, int]:
    """The packages' tests in one process of their own: outcome -> count."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, *options, *packages]
    done = subprocess.run(command, cwd=packages[0].parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.findall(r"(\d+) (passed|failed|skipped|deselected|error)", done.stdout)
    return {outcome: int(count) for count, outcome in counts}


def typed(line: str) -> str:
    """What a command prints, typed in this process."""
    _, *arguments = line.split()
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, f"{line}: {done.output} {done.exception}"
    return done.output


class TestPackages:
    """Of each stage, under a name of several words."""

    def test_formulas_and_laws_hold(self, packages: dict[str, Path]) -> None:
        counts = own_tests(list(packages.values()), "-k", "not test_recipe")
        assert counts.pop("deselected") == len(STAGES)
        assert counts.pop("passed") >= 2 * len(STAGES)  # the laws of each, and a formula by hand
        assert not counts

    def test_all_of_one_package(self, packages: dict[str, Path]) -> None:
        assert set(own_tests([packages["observe"]])) == {"passed"}

    @pytest.mark.parametrize("stage", STAGES)
    def test_the_recipe_acts_on_the_stage(self, stage: str, packages: dict[str, Path]) -> None:
        name = packages[stage].name
        text = (packages[stage] / "README.md").read_text()
        commands = [line.partition("#")[0].strip() for line in text.splitlines() if line.startswith("verl-plugins ")]
        assert len(commands) == 3
        composed = [f"{command} --dry-run" for command in commands if command.startswith("verl-plugins run ")]
        own_test = f"verl-plugins run grpo+{name} --preset cpu --dry-run"
        for command in (*composed, own_test):
            (line,) = [line for line in typed(command).splitlines() if f" {name} (" in line]
            assert line.startswith(f"#   {stage}: ")
        assert line.startswith(f"#   {stage}: {name} (")  # what the package's own test looks for

    def test_a_plugin_without_its_recipe(self, packages: dict[str, Path]) -> None:
        name = packages["policy_loss"].name
        plan = typed(f"verl-plugins run grpo +plugins.{name}={{}} --preset cpu --dry-run")
        assert f"#   policy_loss: {name} (wraps)" in plan

    def test_they_are_listed(self, packages: dict[str, Path]) -> None:
        found = json.loads(typed("verl-plugins list --json"))
        for stage, package in packages.items():
            for kind in ("plugins", "recipes"):
                (ours,) = [item for item in found[kind] if item["name"] == package.name]
                assert ours["distribution"] == package.name.replace("_", "-")
                assert [said.partition(" ")[0] for said in ours["stages"]] == [stage]
                assert ours["status"] in ("ok", "example")

    def test_nothing_of_the_template_s_names_is_left(self, packages: dict[str, Path]) -> None:
        for package in packages.values():
            for path, text in files_in(package).items():
                for form in ("my_method", "my-method", "MyMethod", "My method", "the_stage"):
                    assert form not in f"{path}\n{text}"

    def test_a_failing_recipe_shows_why(self, tmp_path: Path) -> None:
        """Of a package whose recipe has a key that verl does not have."""
        package, site = tmp_path / "broken_recipe", tmp_path / "site"
        scaffold.create(package.name, "observe", tmp_path)
        file = package / "src/broken_recipe/recipes/broken_recipe.yaml"
        file.write_text(file.read_text().replace("adv_estimator", "adv_estimater"))
        install(site, package)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))}
        command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "-k", "recipe", package / "tests"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
        assert done.returncode == 1
        assert "algorithm.adv_estimater" in done.stdout


def test_what_the_command_prints(tmp_path: Path) -> None:
    printed = typed(f"verl-plugins new two_words --stage loss_terms --dir {tmp_path}")
    written = {Path(line) for line in printed.split("\n\n")[0].splitlines()}
    assert written == {tmp_path / "two_words" / file for file in files_in(tmp_path / "two_words")}


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
            ("generator", "'generator' would hide what Python or verl_plugins calls so"),
            ("tensor", "'tensor' would hide what Python or verl_plugins calls so"),
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


def test_every_stage_has_a_template() -> None:
    assert {path.name for path in scaffold.TEMPLATE.iterdir()} == {"common", *STAGES}


def test_the_wheel_has_the_template(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"verl_plugins/commands/template/{path.as_posix()}" for path in files_in(scaffold.TEMPLATE)} <= names
    assert "verl_plugins/testing/check.py" in names
