"""`verl-plugins lab` as a user types it, with labs of other packages; and what refuses a recipe that is only a lab."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from test_cli import command, fails, invoke
from typer.testing import CliRunner

from verl_plugins.commands import cli
from verl_plugins.commands.lab import draw
from verl_plugins.errors import RunError
from verl_plugins.lab import Claim, Curve, Findings, Panel

DOCS = Path(__file__).parents[2] / "docs" / "plugins.md"
RECIPE = "recipe: {title: Cooling, kind: lab, lab: 'my_method_lab:lab'}"
BODY = """
    from dataclasses import dataclass
    import torch
    from verl_plugins import setting
    from verl_plugins.lab import Claim, Curve, Findings, Panel, Progress

    @dataclass
    class Settings:
        height: float = setting(1.0, "how high", authors=2.0, gt=0)

    def lab(settings: Settings, seed: int, progress: Progress) -> Findings:
        progress(0.5, "measuring")
        {body}
"""


@pytest.fixture
def offered(site):
    """A recipe `cooling` of somebody else, whose lab has this body."""

    def offer(body: str, recipe: str = RECIPE) -> None:
        site.write("my_method_lab.py", BODY.replace("{body}", body))
        site.recipes("acme", cooling=recipe)

    return offer


def run(*args: str) -> tuple[int, str, str]:
    """Exit code, standard output and error, in this process."""
    done = CliRunner().invoke(cli.app, ["lab", *args], catch_exceptions=False)
    return done.exit_code, done.stdout, done.stderr


GOOD = "return Findings([Claim('it cools', 'below 1', f'{settings.height / 2:g}', settings.height / 2 < 1, 'derived')])"


class TestTable:
    def test_claims_that_hold_end_with_0(self, offered) -> None:
        offered(GOOD)
        code, out, err = run("cooling")
        assert (code, err) == (0, "")
        assert re.search(r"it cools +derived +below 1 +0\.5 +yes", out) and "Cooling" in out

    def test_a_claim_that_fails_ends_with_1_and_is_named(self, offered) -> None:
        offered(GOOD)
        code, out, err = run("cooling", "--set", "height=4")
        assert (code, err) == (1, "does not hold: it cools: measured 2\n")
        assert re.search(r"it cools +derived +below 1 +2 +NO", out)

    def test_the_seed_arrives(self, offered) -> None:
        offered("return Findings([Claim('seed', '', str(seed), True)], notes=['a [red]note[/red]'])")
        assert re.search(r"seed +paper +7 +yes", run("cooling", "--seed", "7")[1])
        assert "a [red]note[/red]" in run("cooling")[1]

    def test_labs_compute_on_one_thread_and_leave_the_number_as_it_was(self, offered) -> None:
        import torch

        offered("return Findings([Claim('threads', '', str(torch.get_num_threads()), True)])")
        before = torch.get_num_threads()
        assert re.search(r"threads +paper +1 +yes", run("cooling")[1])
        assert torch.get_num_threads() == before

    def test_what_others_write_cannot_command_the_terminal(self, offered) -> None:
        offered(r"return Findings([Claim('a\x1b[31mb', '[red]', 'c\x1b[0m', False)])")
        _, out, err = run("cooling")
        assert "\x1b" not in out + err and "[red]" in out and r"a\x1b[31mb" in err


class TestFiles:
    CURVES = (
        "[Panel('p', 'x', 'y', [Curve('$a', [1, 2], torch.tensor([1.0, float('nan')])), Curve('', [1], [2])], 'xy')]"
    )

    def test_picture_and_data(self, offered, tmp_path) -> None:
        offered(f"return Findings([Claim('it cools', 'a', 'b', torch.tensor(True))], {self.CURVES})")
        out = tmp_path / "new" / "folder"
        assert run("cooling", "--out", str(out), "--set", "height=3", "--seed", "2")[0] == 0
        assert (out / "cooling.png").read_bytes().startswith(b"\x89PNG")
        data = json.loads((out / "cooling.json").read_text())
        assert (data["lab"], data["seed"], data["settings"], data["holds"]) == ("cooling", 2, {"height": 3.0}, True)
        assert data["claims"][0] == {
            "name": "it cools",
            "expected": "a",
            "measured": "b",
            "holds": True,
            "source": "paper",
        }
        assert data["panels"][0]["curves"][0]["y"] == [1.0, None]

    def test_without_panels_there_is_no_picture(self, offered, tmp_path) -> None:
        offered(GOOD)
        run("cooling", "--out", str(tmp_path))
        assert [path.name for path in tmp_path.glob("cooling.*")] == ["cooling.json"]

    def test_failing_claims_are_written_too(self, offered, tmp_path) -> None:
        offered(GOOD)
        assert run("cooling", "--set", "height=4", "--out", str(tmp_path))[0] == 1
        assert json.loads((tmp_path / "cooling.json").read_text())["holds"] is False

    def test_a_folder_that_cannot_be_made_is_said_before_the_work(self, offered, tmp_path, sentence) -> None:
        offered("raise AssertionError('started')")
        (tmp_path / "file").touch()
        fails(sentence, ["--out", "file"], "lab", "cooling", "--out", str(tmp_path / "file" / "below"))
        fails(sentence, ["--out", "file"], "lab", "cooling", "--out", str(tmp_path / "file"))

    def test_so_is_one_that_cannot_be_written_to(self, offered, tmp_path, monkeypatch) -> None:
        offered("raise AssertionError('started')")
        monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
        with pytest.raises(RunError, match="cannot be written to"):
            run("cooling", "--out", str(tmp_path))

    def test_a_curve_without_a_name_has_the_colour_of_the_one_before(self, tmp_path, monkeypatch) -> None:
        from matplotlib.axes import Axes

        plot, seen = Axes.plot, []
        monkeypatch.setattr(Axes, "plot", lambda self, *args, **how: seen.append(how) or plot(self, *args, **how))
        curves = [Curve("a", [0, 1], [0, 1]), Curve("", [0], [1], "points"), Curve("b", [0, 1], [1, 1], "dashed")]
        draw([Panel("p", "x", "y", curves)], tmp_path / "p.png")
        assert [how["color"] for how in seen] == ["C0", "C0", "C1"]


class TestFaults:
    @pytest.mark.parametrize(
        ("words", "parts"),
        [
            (["coolign"], ["no recipe 'coolign'", "did you mean 'cooling'?"]),
            (["grpo"], ["recipe 'grpo' has no lab", "cooling"]),
            (["cooling", "--set", "heigth=1"], ["cooling.heigth is not a setting of the lab", "'height'"]),
            (["cooling", "--set", "height=-1"], ["cooling.height is -1", "greater than 0"]),
            (["cooling", "--set", "height=high"], ["cooling.height is 'high'", "a number"]),
            (["cooling", "--set", "height"], ["'height'", "key=value"]),
            (["cooling", "--set", "+height=1"], ["--set +height=1", "--set height=1"]),
            (["cooling", "--set", "~height"], ["--set ~height", "--set height=1"]),
            (["cooling", "--set", "height=1", "--set", "height=2"], ["height twice"]),
        ],
        ids=" ".join,
    )
    def test_of_the_command_line(self, offered, sentence, words, parts) -> None:
        offered(GOOD)
        fails(sentence, parts, "lab", *words)

    @pytest.mark.parametrize(
        ("target", "parts"),
        [
            ("no_such_module:lab", ["no_such_module:lab", "ModuleNotFoundError"]),
            ("my_method_lab:nothing", ["my_method_lab:nothing", "AttributeError"]),
            ("my_method_lab:Settings", ["must take `settings`"]),
        ],
    )
    def test_of_its_author(self, offered, sentence, target, parts) -> None:
        offered(GOOD, RECIPE.replace("my_method_lab:lab", target))
        fails(sentence, ["recipe.lab", *parts], "lab", "cooling")

    def test_a_lab_that_gives_something_else(self, offered, sentence) -> None:
        offered("return 5")
        fails(sentence, ["my_method_lab:lab", "returned int", "Findings"], "lab", "cooling")

    def test_a_lab_without_claims_proves_nothing(self) -> None:
        with pytest.raises(ValueError, match="at least one claim"):
            Findings([])

    def test_only_failing_claims_are_failed(self) -> None:
        claims = [Claim("a", "", "", True), Claim("b", "", "", False)]
        assert Findings(claims).failed == claims[1:]


class TestRefusals:
    """A recipe that is only a lab cannot be trained with; the sentence names the command that runs it."""

    @pytest.mark.parametrize(
        "words",
        [
            ["run", "cooling"],
            ["run", "cooling", "--preset", "cpu", "--dry-run"],
            ["run", "vade+cooling", "--preset", "cpu"],
            ["study", "cooling", "grpo", "--preset", "cpu"],
            ["show", "vade+cooling"],
        ],
        ids=" ".join,
    )
    def test_it(self, offered, sentence, words, tmp_path) -> None:
        offered(GOOD)
        if words[0] == "study":
            words = [*words, "--out", str(tmp_path / "study")]
        fails(sentence, ["'cooling' is a lab", "verl-plugins lab cooling"], *words)

    def test_doctor_and_a_later_variant_of_a_study_say_it_too(self, offered, tmp_path) -> None:
        offered(GOOD)
        said = (
            "recipe 'cooling' is a lab, which trains nothing and goes with no other recipe; to run it: verl-plugins lab"
        )
        done = command("doctor", "cooling")
        assert done.returncode == 1 and done.stdout.startswith(f"BROKEN run cooling: {said}")
        done = command("study", "grpo", "cooling", "--preset", "cpu", "--out", str(tmp_path / "study"))
        assert done.returncode == 2 and f"error: the variant 'cooling': {said}" in done.stderr


class TestListed:
    def test_under_its_own_heading_and_among_the_labs(self, offered) -> None:
        offered(
            GOOD, "recipe: {kind: lab, lab: 'my_method_lab:lab', problem: a claim measured outside RL, does: cools}"
        )
        lines = invoke("list").splitlines()
        place = next(number for number, line in enumerate(lines) if line.split()[:1] == ["cooling"])
        heading = next(line.strip() for line in reversed(lines[:place]) if not line.startswith("  "))
        assert heading == "a claim measured outside RL" and "cools" in lines[place]
        assert "cooling" in next(line for line in lines if line.startswith("labs, ")).split(": ")[1]
        rows = json.loads(invoke("list", "--json"))["recipes"]
        assert {row["name"]: row["kind"] for row in rows}["cooling"] == "lab"

    def test_show_has_the_settings_and_the_command(self, offered) -> None:
        offered(GOOD)
        text = invoke("show", "cooling")
        assert re.search(r"--set height= +1\.0 +2\.0 +float > 0 +how high", text)
        assert "verl-plugins lab cooling" in text and "trains: nothing" in text
        (item,) = json.loads(invoke("show", "cooling", "--json"))
        assert (item["kind"], item["trains"], item["lab"]) == ("recipe", False, "my_method_lab:lab")

    def test_show_says_why_settings_cannot_be_read(self, offered) -> None:
        offered(GOOD, RECIPE.replace("my_method_lab", "no_such_module"))
        assert "no_such_module" in invoke("show", "cooling")

    def test_a_recipe_that_trains_may_have_a_lab(self, offered) -> None:
        offered(
            GOOD,
            "{recipe: {lab: 'my_method_lab:lab'}, plugins: {grpo: {}}, algorithm: {adv_estimator: grpo}}",
        )
        assert run("cooling")[0] == 0
        assert "plugin grpo" in invoke("show", "cooling") and "--set height=" in invoke("show", "cooling")
        assert command("run", "cooling", "--preset", "cpu", "--dry-run").returncode == 0


def test_the_lab_of_the_guide_runs(site, tmp_path) -> None:
    section = DOCS.read_text().split("### A lab\n")[1].split("\n## ")[0]
    recipe, code = re.findall(r"```(?:yaml|python)\n(.*?)```", section, re.DOTALL)
    (site.path / "my_method").mkdir()
    (site.path / "my_method" / "__init__.py").touch()
    (site.path / "my_method" / "cooling.py").write_text(code)
    site.recipes("acme", cooling=recipe)
    assert run("cooling", "--out", str(tmp_path))[0] == 0
    assert (tmp_path / "cooling.png").is_file()
    assert run("cooling", "--set", "steps=3")[0] == 1
