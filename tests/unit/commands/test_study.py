"""`verl-plugins study`: which runs are made, what is measured of them, and what a difference means."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from verl_plugins.commands.cli import app
from verl_plugins.commands.curves import read_run
from verl_plugins.commands.study import command, report, training
from verl_plugins.commands.study.columns import at_budget, column, first_reached
from verl_plugins.commands.study.design import Study, from_options
from verl_plugins.commands.study.results import Result, measure, read
from verl_plugins.commands.study.summary import ACCURACY, interval, summarise
from verl_plugins.errors import CompositionError, RunError

STUDIES = Path(__file__).parents[3] / "benchmarks/studies"


def write_run(folder: Path, accuracies: list[float], tokens: float | None = 10.0, **metrics: list[float]) -> Path:
    """A finished run, validated before and after each step; `metrics` by step, NaN where a step has none."""
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = [{"step": 0, "validation": {"val-core/x/acc/mean@4": accuracies[0]}}]
    for step, accuracy in enumerate(accuracies[1:], 1):
        line = {"step": step, "timing_s/step": 2.0, "seconds": 2.0, "actor/entropy": 1.0 / step}
        line |= {"rollout/tokens": tokens} if tokens else {}
        line |= {key.replace("__", "/"): values[step - 1] for key, values in metrics.items()}
        lines.append({key: value for key, value in line.items() if not math.isnan(value)})
        lines.append({"step": step, "validation": {"val-core/x/acc/mean@4": accuracy, "val-aux/x/best@4": 0.75}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text("plugins: {grpo: {}}\n")
    (folder / "finished").touch()
    return folder


def result(variant: str, seed: int, end: float, tokens: float = 100.0, **values: float) -> Result:
    """Accuracy rises from 0 to `end` while `tokens` are generated in 10 steps."""
    return Result(f"{variant}-{seed}", variant, seed, 10, tokens, 5.0, [(0, 0.0, 0.0), (10, tokens, end)], values)


def study(*variants: str, **options: Any) -> Study:
    return from_options(variants, (), (), **options)


class TestDesign:
    def test_a_variant_has_its_own_say_over_what_all_are_told(self):
        what = from_options(["grpo a.b=2 c=3"], ["a.b=1", "d=4"], (), steps=10)
        recipe, *words = what.arguments("grpo a.b=2 c=3", (), Path("x"))
        assert recipe == "grpo"
        assert {"a.b=2", "c=3", "d=4", "trainer.total_training_steps=10"} <= {*words}
        assert "a.b=1" not in words

    def test_runs_are_named_after_what_is_trained_and_not_after_where(self, tmp_path):
        file = {"study": {"variants": {"grpo": "grpo a={here}/x b={run}/y"}, "steps": 3}}
        names = []
        for place in ("one", "two"):
            (tmp_path / place).mkdir()
            (tmp_path / place / "s.yaml").write_text(yaml.safe_dump(file))
            what = from_options([str(tmp_path / place / "s.yaml")], (), ())
            words = what.arguments("grpo", (), tmp_path / "run")
            assert f"a={tmp_path / place}/x" in words and f"b={tmp_path}/run/y" in words
            names.append(what.name("grpo", 1))
        assert names[0] == names[1]

    @pytest.mark.parametrize("change", [{"steps": 4}, {"preset": "cpu"}, {"common": ["z=1"]}])
    def test_another_training_has_another_name(self, change):
        common = change.pop("common", ())
        assert study("grpo", steps=3).name("grpo", 1) != from_options(
            ["grpo"], common, (), **({"steps": 3} | change)
        ).name("grpo", 1)

    def test_seeds_make_runs_of_their_own(self):
        what = study("grpo")
        assert len({what.name("grpo", seed) for seed in what.seeds}) == 5

    def test_some_variants_of_a_file_keep_the_baseline(self):
        what = from_options([str(STUDIES / "vade.yaml"), "mopps"], (), (), seeds=2)
        assert [*what.variants] == ["grpo (uniform)", "mopps"] and what.baseline == "grpo (uniform)"
        assert what.seeds == (1, 2)

    @pytest.mark.parametrize("file", sorted(STUDIES.glob("*.yaml")), ids=lambda file: file.stem)
    def test_our_own_files_are_studies(self, file):
        tree = yaml.safe_load(file.read_text())
        if "study" in tree:
            what = from_options([str(file)], (), ())
            assert what.steps and len(what.variants) > 1

    @pytest.mark.parametrize(
        ("words", "options", "says"),
        [
            (["grpo", " grpo"], {}, "'grpo' is said twice"),
            (["grpo 'x"], {}, "cannot be read"),
            ([""], {}, "is empty"),
            (["grpo"], {"budget": "token"}, "did you mean 'tokens'"),
            (["grpo"], {"baseline": "gpro"}, "did you mean 'grpo'"),
            (["no/such.yaml"], {}, "no/such.yaml cannot be read"),
        ],
    )
    def test_what_cannot_be_is_one_sentence(self, words, options, says):
        with pytest.raises(CompositionError, match=says):
            from_options(words, (), (), **options)

    @pytest.mark.parametrize(
        ("said", "says"),
        [
            ("[]", "is no study"),
            ("study: {variants: [grpo]}", "variants is .* a mapping"),
            ("study: {}", "needs variants"),
            ("study: {variants: {a: grpo}, step: 3}", "study.step is not known; did you mean 'steps'"),
            ("study: {variants: {a: grpo}, seeds: x}", "seeds is 'x'"),
            ("study: {variants: {a: grpo}, seeds: [1, 1]}", "different and not negative"),
            ("study: {variants: {a: grpo}, steps: 0}", "whole number from 1"),
            ("study: {variants: {a: grpo}, columns: {x: {metrik: y}}}", "columns.x says neither"),
            ("study: {variants: {a: grpo}, columns: {x: {metric: y, steps: late}}}", "x.steps is 'late'"),
            ("study: {variants: {a: grpo}, columns: {x: {metric: y, of: median}}}", "x.of is 'median'"),
            ("study: {variants: {a: grpo}, columns: {x: {held_out: middle}}}", "x.held_out is 'middle'"),
            ("study: {variants: {a: grpo}, columns: {x: {reaches: soon}}}", "x.reaches is 'soon'"),
            ("study: {variants: {a: grpo}, prepare: no.py:f}", "write FILE.py:FUNCTION"),
            ("study: {variants: {a: grpo}, columns: {x: {python: own.py:gone}}}", "has no function gone"),
            ("study: {variants: {a: ''}}", "variants.a is empty"),
        ],
    )
    def test_what_a_file_gets_wrong_is_one_sentence(self, tmp_path, said, says):
        (tmp_path / "own.py").write_text("def f(run): return 1\n")
        (tmp_path / "s.yaml").write_text(said)
        with pytest.raises(CompositionError, match=says):
            from_options([str(tmp_path / "s.yaml")], (), ())

    def test_a_file_of_python_that_cannot_be_run_is_one_sentence(self, tmp_path, sentence):
        (tmp_path / "torn_task.py").write_text("def prepare(folder):\n  return 1 +\n")
        (tmp_path / "s.yaml").write_text("study: {variants: {a: grpo}, prepare: torn_task.py:prepare}")
        with pytest.raises(CompositionError) as refusal:
            from_options([str(tmp_path / "s.yaml")], (), ())
        sentence(refusal.value, "torn_task.py:prepare", "SyntaxError")

    def test_a_task_that_cannot_be_made_is_one_sentence(self, tmp_path, sentence):
        (tmp_path / "poor_task.py").write_text("def prepare(folder):\n    raise ValueError('no room')\n")
        (tmp_path / "s.yaml").write_text("study: {variants: {a: grpo}, steps: 1, prepare: poor_task.py:prepare}")
        what = from_options([str(tmp_path / "s.yaml")], (), ())
        with pytest.raises(CompositionError) as refusal:
            command.study(what, tmp_path / "out")
        sentence(refusal.value, "prepare=poor_task.py:prepare", "ValueError: no room")


class TestColumns:
    @pytest.fixture
    def run(self, tmp_path):
        nan = math.nan
        return read_run(str(write_run(tmp_path / "r", [0.1, 0.2, 0.4, 0.6, 0.9], own__x=[1.0, nan, 3.0, 8.0])))

    @pytest.mark.parametrize(
        ("what", "value"),
        [
            ("own/x", 4.0),
            ({"metric": "own/x", "steps": "last 2"}, 5.5),
            ({"metric": "own/x", "steps": "first 2"}, 1.0),
            ({"metric": "own/x", "steps": "2-3"}, 3.0),
            ({"metric": "own/x", "steps": 4}, 8.0),
            ({"metric": "own/x", "of": "variance"}, 26 / 3),
            ({"metric": "own/x", "of": "max"}, 8.0),
            ({"metric": "own/x", "steps": 2}, None),
            ({"metric": "gone"}, None),
            ({"metric": "val-aux/x/best@4"}, 0.75),
            ({"held_out": "first"}, 0.1),
            ({"held_out": "last"}, 0.9),
            ({"reaches": 0.5}, 2.5),
            ({"reaches": 0.95}, None),
        ],
    )
    def test_a_number_of_a_run(self, run, what, value):
        found = column("x", what, Path()).measure(run)
        assert found is None if value is None else found == pytest.approx(value)

    def test_of_ones_own(self, run, tmp_path):
        (tmp_path / "mine_own.py").write_text("def last(run, plus=0): return run.last_step + plus\n")
        assert column("x", {"python": "mine_own.py:last", "plus": 3}, tmp_path).measure(run) == 7

    def test_a_level_counts_as_reached_where_it_is_touched(self):
        import pandas as pd

        assert first_reached(pd.Series({0: 0.0, 10: 0.5, 20: 0.4}), 0.5) == 10

    @given(st.lists(st.floats(0, 1), min_size=2, max_size=6), st.floats(0, 1))
    def test_accuracy_at_a_budget_lies_between_its_neighbours(self, accuracies, share):
        curve = [(10.0 * place, value) for place, value in enumerate(accuracies)]
        budget = share * curve[-1][0]
        at = min(int(budget // 10), len(curve) - 2)
        low, high = sorted(accuracies[at : at + 2])
        assert low - 1e-9 <= at_budget(curve, budget) <= high + 1e-9

    def test_beyond_its_end_a_run_has_no_accuracy(self):
        assert at_budget([(0, 0.1), (10, 0.5)], 11) is None


class TestSummary:
    def test_a_difference_is_paired_by_seed(self):
        """Seeds differ by far more than variants do, which only pairs can see."""
        what = study("grpo", "vade", seeds=4)
        ends = {1: 0.1, 2: 0.5, 3: 0.3, 4: 0.8}
        found = [result("grpo", seed, end) for seed, end in ends.items()]
        found += [result("vade", seed, end + 0.02 + 0.001 * seed) for seed, end in ends.items()]
        base, row = summarise(what, found).rows
        difference = row.differences[ACCURACY]
        assert difference.mean == pytest.approx(0.0225) and difference.low > 0.02
        assert report.verdict(row) == "higher than seeds explain" and report.verdict(base) == "baseline"
        assert base.cells[ACCURACY].low < 0 < base.cells[ACCURACY].high

    def test_runs_are_compared_at_the_cost_of_the_cheapest(self):
        what = study("grpo", "siri", seeds=2)
        found = [result("grpo", 1, 0.8, tokens=200), result("grpo", 2, 0.8, tokens=400)]
        found += [result("siri", seed, 0.5, tokens=100) for seed in (1, 2)]
        base, row = summarise(what, found).rows
        assert base.cells[ACCURACY].mean == pytest.approx((0.4 + 0.2) / 2)
        assert row.cells[ACCURACY].mean == pytest.approx(0.5)

    def test_at_equal_steps_tokens_count_nothing(self):
        what = study("grpo", "siri", seeds=1, budget="steps")
        found = [result("grpo", 1, 0.8, tokens=200), result("siri", 1, 0.5, tokens=100)]
        assert [row.cells[ACCURACY].mean for row in summarise(what, found).rows] == [0.8, 0.5]

    def test_the_interval_is_students(self):
        found = interval([1.0, 2.0, 3.0, 4.0])
        half = 3.182 * math.sqrt(5 / 3) / 2
        assert (found.low, found.high) == (pytest.approx(2.5 - half), pytest.approx(2.5 + half))

    def test_one_seed_says_so(self):
        rows = summarise(study("grpo", "vade", seeds=1), [result("grpo", 1, 0.1), result("vade", 1, 0.9)]).rows
        assert report.verdict(rows[1]) == "one seed cannot tell"

    def test_only_seeds_that_both_have_are_paired_and_missing_ones_are_named(self):
        what = study("grpo", "vade", seeds=3)
        found = [result("grpo", seed, 0.1 * seed) for seed in (1, 2)] + [
            result("vade", seed, 0.2 * seed) for seed in (2, 3)
        ]
        summary = summarise(what, found)
        assert summary.rows[1].differences[ACCURACY].seeds == 1
        assert report.missing(summary) == "not finished yet: grpo: seed 3; vade: seed 1"

    def test_failures_stand_at_the_end_of_the_same_table(self):
        what = study("grpo", "bad", "good", seeds=2)
        ends = {"grpo": 0.5, "bad": 0.1, "good": 0.9}
        found = [result(name, seed, end + 0.01 * seed) for name, end in ends.items() for seed in (1, 2)]
        assert [row.variant for row in summarise(what, found).rows] == ["grpo", "good", "bad"]

    def test_a_column_that_some_runs_lack_is_left_empty(self):
        what = from_options(["grpo", "vade"], (), ["plugins/vade/x"], seeds=1)
        summary = summarise(what, [result("grpo", 1, 0.1), result("vade", 1, 0.2, **{"plugins/vade/x": 7.0})])
        heads, *rows = report.table(summary)
        place = heads.index("plugins/vade/x")
        assert [row[place] for row in rows] == ["–", "7.000"]


class TestCommand:
    @pytest.fixture
    def trained(self, monkeypatch, tmp_path):
        """The study command, with runs that are written instead of trained; it knows which were asked for."""
        asked: list[str] = []

        def run(job: training.Job, running: dict) -> str | None:
            asked.append(job.folder.name)
            if "broken" in job.variant:
                return "ValueError: of this one"
            write_run(job.folder, [0.1, 0.2 + 0.1 * ("vade" in job.variant) + 0.01 * job.seed])
            return None

        monkeypatch.setattr(training, "_run", run)
        monkeypatch.setattr(command, "_look", lambda *_: None)
        return asked

    def run(self, *words: str) -> Any:
        return CliRunner().invoke(app, ["study", *words])

    def test_finished_runs_are_not_repeated(self, trained, tmp_path):
        out = str(tmp_path / "s")
        first = self.run("grpo", "vade", "--seeds", "2", "--steps", "1", "--out", out)
        assert first.exit_code == 0 and len(trained) == 4
        again = self.run("grpo", "vade", "--seeds", "3", "--steps", "1", "--out", out)
        assert again.exit_code == 0 and len(trained) == 6
        table = (tmp_path / "s/study.md").read_text()
        assert "| vade | 3 | 0.320 (0.295 to 0.345) | +0.100 (+0.100 to +0.100) |" in table

    def test_what_was_measured_outlives_the_runs(self, trained, tmp_path):
        import shutil

        words = ("grpo", "vade", "--seeds", "2", "--steps", "1", "--out", str(tmp_path / "s"))
        before = self.run(*words)
        table = (tmp_path / "s/study.md").read_text()
        shutil.rmtree(tmp_path / "s/runs")
        assert before.exit_code == self.run(*words).exit_code == 0
        assert len(trained) == 4 and (tmp_path / "s/study.md").read_text() == table

    def test_a_run_that_fails_is_named_and_the_others_go_on(self, trained, tmp_path):
        done = self.run("grpo", "grpo broken=1", "--seeds", "2", "--steps", "1", "--out", str(tmp_path / "s"))
        assert done.exit_code == 1 and len(trained) == 4
        assert "ValueError: of this one" in done.output and "not finished yet: grpo broken=1" in done.output

    def test_a_damaged_file_is_not_written_over(self, trained, tmp_path):
        (tmp_path / "study.json").write_text("{")
        done = self.run("grpo", "--steps", "1", "--out", str(tmp_path))
        assert isinstance(done.exception, RunError) and not trained
        assert (tmp_path / "study.json").read_text() == "{"

    def test_names_of_variants_run_nothing_in_the_page(self, tmp_path):
        what = from_options(["grpo", "vade x=<script>alert(1)</script>|"], (), (), seeds=1)
        found = [result(name, 1, 0.5) for name in what.variants]
        summary = summarise(what, found)
        svg = report.draw(summary, found, tmp_path / "x.png")
        assert "<script" not in report.page(summary, svg)
        assert report.markdown(summary).count("\\|") >= 1

    def test_a_variant_that_cannot_be_trained_ends_it_before_anything_starts(self, monkeypatch, tmp_path):
        monkeypatch.setattr(training, "_run", lambda *_: pytest.fail("a run was started"))
        for words, says in (
            (["grpo", "grpo plugins.grpo.scal=none"], "did you mean 'scale'"),
            (["grpo", "grop"], "did you mean 'grpo'"),
            (["grpo", "vade+mopps"], "vade"),
            (["grpo data.val_files=null"], "set data.val_files"),
        ):
            done = self.run(*words, "--preset", "cpu", "--steps", "1", "--out", str(tmp_path / "s"))
            assert isinstance(done.exception, CompositionError) and says in str(done.exception), done.output


class TestSchedulers:
    def jobs(self, folder: Path) -> list[training.Job]:
        what = study("grpo", steps=1, seeds=2)
        places = {seed: folder / what.name("grpo", seed) for seed in what.seeds}
        return [
            training.job(what.arguments("grpo", (), place), "cpu", place, "grpo", seed)
            for seed, place in places.items()
        ]

    def test_each_job_is_handed_over_once(self, tmp_path):
        words = training.template(f"{sys.executable} -c 'import sys; print(sys.argv[1])' {{command}}")
        jobs = self.jobs(tmp_path)
        assert training.hand_over(jobs, words) == (jobs, [])
        assert training.hand_over(jobs, words) == ([], [])
        got = (jobs[0].folder / training.HANDED_OVER).read_text()
        assert "verl_plugins run grpo" in got and f"--out {jobs[0].folder}" in got and "data.seed=1" in got

    def test_what_it_does_not_take_can_be_handed_over_again(self, tmp_path):
        jobs = self.jobs(tmp_path)
        refusing = f"{sys.executable} -c 'import sys; sys.exit(\"no partition\")' {{command}}"
        given, failed = training.hand_over(jobs, training.template(refusing))
        assert not given and all("no partition" in said for _, said in failed)
        assert training.hand_over(jobs, training.template("true {command}"))[0] == jobs

    def test_no_such_scheduler(self, tmp_path):
        _, failed = training.hand_over(self.jobs(tmp_path), ["no-such-scheduler", "{command}"])
        assert "cannot be started" in failed[0][1]

    @pytest.mark.parametrize("text", ["sbatch run.sh", "sbatch '{command}"])
    def test_a_command_that_cannot_be(self, text):
        with pytest.raises(CompositionError, match="--command"):
            training.template(text)


def test_a_run_is_measured_from_its_folder(tmp_path):
    folder = write_run(tmp_path / "grpo-1-seed3", [0.1, 0.3, 0.5])
    found = measure(folder, "grpo", 3, [column("e", {"metric": "actor/entropy", "steps": "last 1"}, Path())])
    assert (found.steps, found.tokens, found.seconds) == (2, 20.0, 4.0)
    assert found.curve == [(0, 0.0, 0.1), (1, 10.0, 0.3), (2, 20.0, 0.5)] and found.values == {"e": 0.5}


def test_a_run_without_counted_tokens_is_compared_by_steps_only(tmp_path):
    found = measure(write_run(tmp_path / "r", [0.1, 0.3], tokens=None), "grpo", 1, [])
    assert found.tokens is None and found.accuracy("tokens", 1) is None and found.accuracy("steps", 1) == 0.3


def test_results_come_back_as_they_were_written(tmp_path):
    from verl_plugins.commands.study.results import write

    known = [result("grpo", 1, 0.5, x=1.0), result("vade", 2, 0.25)]
    write(tmp_path, known, {"table": []})
    again = read(tmp_path)
    assert [one.accuracy("tokens", 50.0) for one in again.values()] == [0.25, 0.125]
    assert again["grpo-1"].values == {"x": 1.0}
