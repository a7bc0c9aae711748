"""The installed command, started as a user starts it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from verl_plugins.commands import cli, display

COMMAND = Path(sys.executable).with_name("verl-plugins")
RECIPES = {"grpo", "mc_grpo", "vade", "clip_cov"}


def command(*args: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([COMMAND, *args], capture_output=True, text=True, env={**os.environ, **env})


def invoke(*args: str) -> str:
    """What the command prints, in this process."""
    done = CliRunner().invoke(cli.app, args, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def succeeds(*args: str) -> str:
    done = command(*args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fails(sentence, parts: list[str], *args: str) -> None:
    """Exit code 2, one line on standard error, nothing else."""
    done = command(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    sentence(done.stderr.strip(), *parts)


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """Overrides that satisfy the preset 1gpu."""
    file = tmp_path / "data.parquet"
    file.touch()
    return [f"data.train_files={file}", f"data.val_files={file}"]


class TestList:
    def test_json_has_every_recipe_and_plugin(self) -> None:
        found = json.loads(succeeds("list", "--json"))
        ours = {item["name"] for item in found["recipes"] if item["distribution"] == "verl-plugins"}
        assert ours >= RECIPES
        assert {item["name"] for item in found["plugins"] if item["status"] == "ok"} >= RECIPES
        assert {item["name"] for item in found["presets"]} >= {"cpu", "1gpu", "8gpu"}

    def test_it_answers_which_one_do_i_want(self) -> None:
        """Under the problem it treats stands each recipe, with what it does and what was measured."""
        lines = succeeds("list").splitlines()
        headings = [line.strip() for line in lines if line.strip() in display.PROBLEMS]
        assert headings == [problem for problem in display.PROBLEMS if problem in headings] and len(headings) >= 7
        under = lines[lines.index(next(line for line in lines if line.startswith(" dead groups"))) :]
        assert next(line for line in under if " vade " in line)
        assert "mixed groups 0.72" in "".join(lines)
        assert {line.split()[0] for line in lines if line.startswith("   ") and line[3:4].strip()} >= RECIPES

    def test_every_recipe_of_ours_says_problem_effect_and_what_was_measured(self) -> None:
        found = [row for row in json.loads(succeeds("list", "--json"))["recipes"] if row["name"] in RECIPES]
        for row in found:
            assert row["problem"] in display.PROBLEMS, row["name"]
            assert row["does"] and len(row["does"]) < 75, row["name"]
            assert re.search(r"\d|no effect", row["status"]), row["name"]

    def test_other_peoples_recipes_have_a_place(self, site) -> None:
        site.recipes(
            "cookbook", stew="recipe: {title: Stew, problem: hunger, does: fills}", soup="recipe: {title: Soup}"
        )
        lines = succeeds("list").splitlines()
        first = {line.split()[0]: number for number, line in reversed(list(enumerate(lines))) if line.split()}
        places = [lines.index(next(line for line in lines if line.strip() == "other")), first["soup"]]
        places = [first["diagnosis"], first["hunger"], first["stew"], *places]
        assert places == sorted(places)
        assert "fills" in "".join(lines)

    @pytest.mark.parametrize("given", ["nonsense", "", "null", "[length]", "{a: b}", "5"])
    def test_any_problem_that_others_write_has_a_place(self, site, given: str) -> None:
        site.recipes("cookbook", stew=f"recipe: {{problem: {given}, does: short}}")
        lines = invoke("list").splitlines()
        place = next(number for number, line in enumerate(lines) if line.startswith("   stew "))
        heading = next(line.strip() for line in reversed(lines[:place]) if not line.startswith("  "))
        assert heading == ("nonsense" if given == "nonsense" else "other")

    @pytest.mark.parametrize("text", ["a\\nb", "a\\e[31mb", "a\\rb", "[red]a[/red]", "5"])
    def test_texts_of_others_are_one_line_without_control_characters(self, site, text: str) -> None:
        site.recipes("cookbook", stew=f'recipe: {{problem: "{text}", does: "{text}", status: "{text}"}}')
        shown = invoke("list")
        assert all(sign.isprintable() or sign == "\n" for sign in shown)
        row = next(line for line in shown.splitlines() if line.startswith("   stew "))
        assert all(part in row for part in text.replace("\\e", " ").replace("\\n", " ").replace("\\r", " ").split())

    def test_table(self) -> None:
        text = succeeds("list", "--long")
        for part in (*RECIPES, "arXiv:2511.18902", "select_prompts", "verl-plugins", "presets"):
            assert part in text

    def test_third_party_broken_and_duplicate_plugins_are_listed(self, site) -> None:
        site.plugin("twice", distribution="one")
        site.plugin("twice", distribution="two")
        site.distribution("ghost", ghost="no_such_module:Method")
        site.distribution("lost", recipes="no_such_module:RECIPES")
        site.recipes("cookbook", stew="recipe: {title: Stew}", burnt="recipe: {titel: Stew}")
        found = json.loads(succeeds("list", "--json"))
        plugins = [(item["name"], item["status"]) for item in found["plugins"]]
        assert plugins.count(("twice", "brought twice: one and two")) == 2
        assert any(name == "ghost" and "no_such_module" in status for name, status in plugins)
        recipes = {item["name"]: item["status"] for item in found["recipes"]}
        assert recipes["stew"] == ""
        assert "titel" in recipes["burnt"]
        assert found["broken_folders"][0]["distribution"] == "lost"
        short = succeeds("list")
        assert "no_such_module" in short and "plugin twice of one: brought twice: one and two" in short

    def test_a_plugin_of_ours_that_another_package_brings_too_is_named(self, site) -> None:
        assert "brought twice" not in succeeds("list")
        site.plugin("vade", distribution="again")
        assert "plugin vade of again: brought twice: again and verl-plugins" in succeeds("list")


class TestShow:
    def test_a_recipe_with_its_plugins(self) -> None:
        text = succeeds("show", "vade")
        for part in (
            "recipe vade",
            "plugins.vade.lambda_selected",
            "authors",
            "select_prompts",
            "docs/recipes/vade.md",
        ):
            assert part in text

    def test_a_preset(self) -> None:
        text = succeeds("show", "1gpu")
        assert "actor_rollout_ref.rollout.gpu_memory_utilization" in text

    def test_json(self) -> None:
        items = json.loads(succeeds("show", "clip_cov", "--json"))
        kinds = {item["kind"] for item in items}
        assert kinds == {"recipe", "plugin"}
        plugin = next(item for item in items if item["kind"] == "plugin" and item["name"] == "clip_cov")
        assert plugin["settings"][0].keys() >= {"setting", "default", "recipe", "authors", "accepts", "doc"}

    def test_a_third_party_s_recipe_shows_its_own_value_beside_the_default(self, site) -> None:
        body = "@dataclass\nclass Config:\n    a: int = setting(1, 'an a')\n    b: int = setting(2, 'a b')\n"
        site.plugin("stewing", body)
        site.recipes("cookbook", stew="{recipe: {title: Stew}, plugins: {stewing: {a: 5, c: 7}, absent: {}}}")
        items = json.loads(invoke("show", "stew", "--json"))
        (plugin,) = [item for item in items if item["kind"] == "plugin"]
        values = {row["setting"]: (row["default"], row["recipe"]) for row in plugin["settings"]}
        assert values == {"a": (1, 5), "b": (2, ""), "c": ("", 7)}
        text = invoke("show", "stew")
        assert re.search(r"plugins\.stewing\.a +1 +5 ", text)
        assert "not a setting of this plugin" in text and "not installed: plugin absent" in text

    def test_several_recipes(self, sentence) -> None:
        items = json.loads(invoke("show", "vade+clip_cov", "--json"))
        named = [(item["kind"], item["name"]) for item in items]
        assert {("recipe", "vade"), ("recipe", "clip_cov"), ("plugin", "vade"), ("plugin", "clip_cov")} <= {*named}
        assert len(set(named)) == len(named)
        fails(sentence, ["'vadee'", "did you mean 'vade'?"], "show", "vade+vadee")

    def test_unknown(self, sentence) -> None:
        fails(sentence, ["'vadee'", "did you mean 'vade'?"], "show", "vadee")

    def test_a_broken_recipe_says_why(self, site) -> None:
        site.recipes("cookbook", burnt="recipe: {titel: Stew}")
        assert "recipe.titel" in succeeds("show", "burnt")


class TestRun:
    def test_dry_run_prints_what_differs_the_stages_and_what_was_looked_at(self) -> None:
        adds = ["+actor_rollout_ref.model.override_config.a=1", "~trainer.v1.sampler", "++trainer.nnodes=2"]
        text = succeeds("run", "vade+clip_cov", *adds, "--preset=cpu", "--dry-run")
        assert text.startswith("# recipe vade+clip_cov, preset cpu\n")
        looked = (
            "# looked at",
            "#   reward: plugin math_verify",
            "#   data: val ",
            "the longest prompt 6 of 32 tokens",
        )
        for part in (
            *looked,
            "nnodes: 2",
            "      a: 1",
            "lambda_selected: 0.2",
            "#   policy_loss: clip_cov (implements)",
        ):
            assert part in text
        assert "total_epochs" not in text

    def test_dry_run_in_full(self) -> None:
        assert "total_epochs: 30" in succeeds("run", "grpo", "--preset", "cpu", "--dry-run", "--full")

    def test_a_dry_run_refuses_what_a_run_would(self, data, sentence) -> None:
        """No GPU here, and files that are empty."""
        fails(
            sentence,
            ["flash_attention_2", "attn_implementation=sdpa"],
            "run",
            "grpo",
            "--preset",
            "1gpu",
            "--dry-run",
            *data,
        )
        fails(sentence, ["data.train_files", "cannot be read"], "run", "grpo", "--preset", "cpu", "--dry-run", *data)

    def test_mistakes_end_in_one_line(self, sentence) -> None:
        fails(sentence, ["no recipe 'vadee'"], "run", "vadee")
        fails(sentence, ["'trainer.nnodez'", "'trainer.nnodes=2'"], "run", "grpo", "trainer.nnodez=2")
        fails(sentence, ["data.train_files has no value"], "run", "grpo", "--preset", "1gpu")

    def test_steps_are_short_for_a_run_without_validation(self, sentence) -> None:
        text = succeeds("run", "grpo", "--preset=cpu", "--steps=3", "trainer.test_freq=2", "--dry-run")
        for line in ("  total_training_steps: 3", "  val_before_train: false", "  test_freq: 2"):
            assert f"{line}\n" in text
        both = ["run", "grpo", "--steps", "1", "trainer.total_training_steps=2"]
        fails(sentence, ["--steps 1 and trainer.total_training_steps=2"], *both)

    def test_the_launcher_gets_the_composed_run(self, monkeypatch, site) -> None:
        body = "def start(composed, **options):\n    seen.append((composed, options))\n    return 7\n"
        site.write("launcher.py", f"seen = []\n{body}")
        import launcher

        monkeypatch.setattr(cli, "LAUNCH", "launcher:start")
        monkeypatch.setattr(sys, "argv", ["verl-plugins", "run", "grpo", "--preset", "cpu", "--out", "there"])
        with pytest.raises(SystemExit) as done:
            cli.main()
        composed, options = launcher.seen[0]
        assert (done.value.code, composed.recipe, composed.preset) == (7, "grpo", "cpu")
        seen = options.pop("seen")
        assert options == {"out": Path("there"), "verbose": False}
        assert [line.split(":")[0] for line in seen] == ["reward", "model", "data", "data"]

    def test_an_interrupted_run_ends_with_130(self, monkeypatch, site) -> None:
        site.write("launcher.py", "def start(out, preset):\n    raise KeyboardInterrupt\n")
        monkeypatch.setattr(cli, "DEMO", "launcher:start")
        monkeypatch.setattr(sys, "argv", ["verl-plugins", "demo"])
        with pytest.raises(SystemExit) as done:
            cli.main()
        assert done.value.code == 130


@pytest.mark.parametrize(
    "args", [["list"], ["list", "--long"], ["list", "--json"], ["show", "vade"], ["show", "1gpu"], ["--help"]]
)
def test_listing_and_describing_load_nothing_heavy(args: list[str]) -> None:
    code = (
        "import sys; from verl_plugins.commands.cli import app\n"
        f"try: app({args!r})\nexcept SystemExit as done: assert not done.code\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "verl", "ray", "hydra", "omegaconf", "transformers", "numpy", "pydantic"}
    assert not heavy & set(done.stderr.split())


def test_a_dry_run_starts_nothing_and_leaves_nothing_behind(tmp_path) -> None:
    code = (
        "import sys; from verl_plugins.commands.cli import app\n"
        "try: app(['run', 'grpo', '--preset', 'cpu', '--dry-run'])\nexcept SystemExit as done: assert not done.code\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert not {"verl", "ray", "transfer_queue"} & set(done.stderr.split())
    assert list(tmp_path.iterdir()) == []
