"""`verl-plugins compare`: which runs make a curve, what a curve is called, what is drawn."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from verl_plugins.commands.cli import app
from verl_plugins.commands.compare import compare
from verl_plugins.commands.curves import LAST, curves, read_run, statistics, tokens_so_far, verdict
from verl_plugins.errors import RunError

STEPS = 8


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """Writes a run folder: accuracy rises from `start` by 0.01 a step; validated before and after."""

    def run(
        name: str,
        start: float = 0.2,
        seed: int = 1,
        lr: float = 1e-4,
        steps: int = STEPS,
        tokens: float | None = None,
        more: dict[str, Any] | None = None,
        **plugins: Any,
    ) -> str:
        folder = tmp_path / name
        folder.mkdir()
        config = {
            "plugins": {"math_verify": {"workers": 1}, **(plugins or {"grpo": {"scale": "std"}})},
            "data": {"seed": seed},
            "actor": {"optim": {"lr": lr}},
            "trainer": {"default_local_dir": str(folder), "rollout_data_dir": str(folder / "rollouts")},
        }
        for key, value in (more or {}).items():
            *above, last = key.split(".")
            section = config
            for part in above:
                section = section.setdefault(part, {})
            section[last] = value
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        lines: list[dict[str, Any]] = [
            {"step": step, "timing_s/step": 1.0, "health/accuracy": start + step / 100, "health/entropy_mean": 0.5}
            for step in range(1, steps + 1)
        ]
        for line in lines if tokens else ():
            line["rollout/tokens"] = tokens
        lines.insert(0, {"step": 0, "validation": {"val-core/x/acc/mean@8": start, "val-aux/x/score/mean": 9.0}})
        lines.append({"step": steps, "validation": {"val-core/x/acc/mean@8": start + 0.5}})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(folder)

    return run


def test_seeds_of_one_configuration_are_one_curve(make) -> None:
    runs = [read_run(folder) for folder in (make("a", seed=1), make("b", seed=2), make("c", steer={"map": "exp"}))]
    found = curves(runs)
    assert list(found) == ["grpo", "steer"]
    assert [run.folder.name for run in found["grpo"]] == ["a", "b"]


def test_what_differs_names_curves_of_the_same_plugins(make) -> None:
    folders = [make("a"), make("b", lr=3e-4), make("c", grpo={"scale": "none"})]
    assert list(curves([read_run(folder) for folder in folders])) == [
        "grpo, lr=0.0001, scale=std",
        "grpo, lr=0.0003, scale=std",
        "grpo, lr=0.0001, scale=none",
    ]


@pytest.mark.parametrize(
    "key",
    [
        "trainer.logger",
        "trainer.test_freq",
        "trainer.save_freq",
        "trainer.val_before_train",
        "trainer.experiment_name",
        "trainer.max_actor_ckpt_to_keep",
        "trainer.total_training_steps",
        "actor_rollout_ref.actor.checkpoint.save_contents",
        "actor_rollout_ref.rollout.agent.num_workers",
        "actor_rollout_ref.rollout.gpu_memory_utilization",
        "data.dataloader_num_workers",
        "plugins.math_verify.workers",
        "ray_kwargs.ray_init.num_cpus",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units",
        "global_profiler.steps",
    ],
)
def test_what_no_method_can_change_neither_splits_nor_names_curves(make, key: str) -> None:
    runs = [read_run(make("a", more={key: "one"})), read_run(make("b", seed=2, more={key: ["two", 3]}))]
    assert {name: len(same) for name, same in curves(runs).items()} == {"grpo": 2}
    (name, _) = curves([*runs, read_run(make("c", lr=9.0, more={key: 3}))])
    assert name == "grpo, lr=0.0001"


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("algorithm.gamma", "gamma"),
        ("data.train_batch_size", "train_batch_size"),
        ("trainer.v1.trainer_mode", "trainer_mode"),
        ("actor_rollout_ref.rollout.n", "n"),
        ("actor_rollout_ref.model.path", "path"),
    ],
)
def test_what_a_method_can_change_names_curves(make, key: str, said: str) -> None:
    runs = [read_run(make("a", more={key: 1})), read_run(make("b", more={key: 2}))]
    assert list(curves(runs)) == [f"grpo, {said}=1", f"grpo, {said}=2"]


def test_settings_of_one_last_name_are_told_apart(make) -> None:
    runs = [read_run(make("a", more={"critic.optim.lr": 1})), read_run(make("b", lr=3.0, more={"critic.optim.lr": 2}))]
    assert list(curves(runs)) == [
        "grpo, actor.optim.lr=0.0001, critic.optim.lr=1",
        "grpo, actor.optim.lr=3.0, critic.optim.lr=2",
    ]


def test_a_folder_named_twice_is_one_run_and_equal_names_stay_apart(make) -> None:
    folder, other = make("a"), make("b", lr=1.0)
    assert {name: len(same) for name, same in curves([read_run(folder), read_run(folder)]).items()} == {"grpo": 1}
    assert list(curves([read_run(f"grpo={other}"), read_run(folder)])) == ["grpo", "grpo (a)"]


def test_the_end_of_a_run_has_nothing_of_its_start(make) -> None:
    run = read_run(make("a", start=0.2))
    assert run.end("validation") == pytest.approx(0.7)
    assert run.end("health/accuracy") == pytest.approx(0.2 + sum(range(STEPS - LAST + 1, STEPS + 1)) / LAST / 100)
    file = Path(make("b")) / "metrics.jsonl"
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[:-1]))
    assert math.isnan(read_run(str(file.parent)).end("validation")), "only the start was validated"
    assert math.isnan(run.end("no/such"))


class TestVerdict:
    """On the held-out accuracy, start + 0.5."""

    @staticmethod
    def runs(make, name: str, starts: dict[int, float], **more: Any) -> list[Any]:
        return [read_run(make(f"{name}{seed}", start=start, seed=seed, **more)) for seed, start in starts.items()]

    def test_equal_seeds_are_paired(self, make) -> None:
        first = self.runs(make, "a", {1: 0.1, 2: 0.3, 3: 0.2})
        said = verdict(first, self.runs(make, "b", {1: 0.15, 2: 0.352, 3: 0.248}), "validation")
        assert said.startswith("+0.050, 95 % interval +0.045 to +0.055 (3 pairs of equal seeds): more than seeds")
        said = verdict(first, self.runs(make, "c", {1: 0.3, 2: 0.2, 3: 0.2}), "validation")
        assert "3 pairs of equal seeds" in said and said.endswith("within what seeds do")

    def test_other_seeds_are_not(self, make) -> None:
        said = verdict(
            self.runs(make, "a", {1: 0.1, 2: 0.3}), self.runs(make, "b", {3: 0.2, 4: 0.25, 5: 0.2}), "validation"
        )
        assert "2 and 3 seeds, not paired" in said and said.endswith("within what seeds do")

    @pytest.mark.parametrize("seeds", [{1: 0.1}, {1: 0.1, 2: 0.2}])
    def test_one_run_cannot_tell(self, make, seeds: dict[int, float]) -> None:
        said = verdict(self.runs(make, "a", seeds), self.runs(make, "b", {1: 0.3}), "validation")
        assert "one seed cannot tell" in said and "interval" not in said

    def test_the_same_seed_again_is_no_second_seed(self, make) -> None:
        again = [*self.runs(make, "a", {1: 0.1}), *self.runs(make, "b", {1: 0.3})]
        assert "one seed cannot tell" in verdict(again, self.runs(make, "c", {1: 0.3}), "validation")

    def test_runs_of_other_lengths_are_not_compared(self, make) -> None:
        said = verdict(self.runs(make, "a", {1: 0.1}), self.runs(make, "b", {1: 0.3}, steps=4), "validation")
        assert said == "not comparable: the runs end after different steps (4, 8)"

    def test_it_stands_on_the_page(self, make, tmp_path: Path) -> None:
        _, page = compare([make("a"), make("c", steer={"map": 1})], tmp_path / "out")
        assert "difference from grpo" in page.read_text() and "one seed cannot tell" in page.read_text()


@pytest.mark.parametrize(
    "name", ["<b>x</b>", "$\\frac{1$", "_hidden", "a\x1b[31mb", "&amp;", "x" * 300, "a\x00b", "中", ""]
)
def test_any_name_can_be_drawn_and_written(make, tmp_path: Path, name: str) -> None:
    folders = [f"{name}={make('a')}", make("b", steer={"map": name}), make("c", steer={"map": 1})]
    picture, page = compare(folders, tmp_path / "out")
    text = page.read_text()
    assert picture.stat().st_size > 10_000
    assert "<b>x" not in text and not any(ord(sign) < 32 and sign != "\n" for sign in text)


def test_labels_join_runs_of_any_configuration(make) -> None:
    runs = [read_run("ours=" + make("a")), read_run("ours=" + make("b", lr=1.0)), read_run(make("c"))]
    assert {name: len(same) for name, same in curves(runs).items()} == {"ours": 2, "grpo": 1}


def test_mean_and_spread_at_each_step(make) -> None:
    runs = [read_run(make("a", start=0.2)), read_run(make("b", start=0.4, seed=2, steps=STEPS // 2))]
    line = statistics(runs, "health/accuracy")
    assert line["mean"].tolist() == pytest.approx([0.3 + s / 100 for s in range(1, 5)] + [0.25, 0.26, 0.27, 0.28])
    assert line["std"].tolist() == pytest.approx([0.02**0.5] * 4 + [math.nan] * 4, nan_ok=True)
    assert statistics(runs, "validation").loc[0, "mean"] == pytest.approx(0.3)


def test_by_tokens_runs_are_read_at_the_same_cost(make) -> None:
    runs = [read_run(make("a", tokens=100.0)), read_run(make("b", start=0.4, seed=2, tokens=200.0))]
    assert tokens_so_far(runs[0]).tolist() == [100.0 * step for step in range(STEPS + 1)]
    line = statistics(runs, "health/accuracy", "tokens")
    assert line.index.tolist() == [100.0 * step for step in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16)]
    assert line.loc[100.0, "mean"] == pytest.approx(0.21), "the second run has not begun"
    assert line.loc[500.0, "mean"] == pytest.approx((0.25 + 0.425) / 2)
    assert line.loc[1000.0, "mean"] == pytest.approx(0.45), "the first run has ended"
    held_out = statistics(runs, "validation", "tokens")
    assert held_out["mean"].tolist() == pytest.approx([0.3, (0.7 + 0.65) / 2, 0.9])
    assert held_out.index.tolist() == [0.0, 800.0, 1600.0]


def test_by_tokens_a_running_training_and_one_without_tokens(make, tmp_path: Path, sentence) -> None:
    folder = make("a", tokens=100.0)
    with (Path(folder) / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": STEPS + 1, "validation": {"val-core/x/acc/mean@8": 0.9}}) + "\n")
    assert statistics([read_run(folder)], "validation", "tokens").index.tolist() == [0.0, 800.0]
    with (Path(folder) / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": STEPS + 1, "health/accuracy": 0.5}) + "\n")
    for bad in (folder, make("old")):
        with pytest.raises(RunError) as error:
            compare([bad], tmp_path / "out", by="tokens")
        sentence(error.value, "--by tokens", "rollout/tokens", bad, "train it again with this version")
    with pytest.raises(RunError) as error:
        compare([folder], tmp_path / "out", by="token")
    sentence(error.value, "--by token", "steps or tokens", "did you mean 'tokens'")


def test_by_tokens_the_table_is_still_that_of_the_last_steps(make, tmp_path: Path) -> None:
    arguments = ["compare", make("a", tokens=100.0), "--out", str(tmp_path / "out"), "--by", "tokens"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    text = (tmp_path / "out/index.html").read_text()
    assert "tokens generated so far" in text
    mean = 0.2 + sum(range(STEPS - LAST + 1, STEPS + 1)) / LAST / 100
    assert f"<td>{mean:.3f}</td>" in text


def test_a_step_that_was_run_again_counts_once(make) -> None:
    folder = make("a")
    with (Path(folder) / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "timing_s/step": 1.0, "health/accuracy": 0.9}) + "\n" + '{"step": 4, "he')
    assert read_run(folder).steps.loc[3, "health/accuracy"] == 0.9
    assert read_run(folder).steps.loc[4, "health/accuracy"] == pytest.approx(0.24)


def test_picture_and_page(make, tmp_path: Path) -> None:
    folders = [make("a"), make("b", seed=2, start=0.4), make("c", steer={"map": "<exp>"}), make("d", steer={"map": 1})]
    picture, page = compare(folders, tmp_path / "out")
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert "steer, map=&lt;exp&gt;" in text and "<exp>" not in text
    assert text.count("<svg") == 1
    assert not re.search(r"(src|href)=['\"]?https?:|@import|<script", text)
    mean = 0.3 + sum(range(STEPS - LAST + 1, STEPS + 1)) / LAST / 100
    assert f"<td>{mean:.3f} ± {0.02**0.5:.3f}</td>" in text
    assert "reward" not in text


def test_command(make, tmp_path: Path) -> None:
    arguments = ["compare", make("a"), make("b", lr=1.0), "--out", str(tmp_path / "out"), "--metric", "timing_s/step"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0
    assert done.output.split() == [str(tmp_path / "out" / name) for name in ("curves.png", "index.html")]
    assert "timing_s/step" in (tmp_path / "out/index.html").read_text()


def test_what_is_no_run_is_refused(make, tmp_path: Path, sentence) -> None:
    with pytest.raises(RunError) as error:
        read_run(str(tmp_path / "nothing"))
    sentence(error.value, "nothing has no metrics.jsonl", "--out FOLDER")
    folder = Path(make("a"))
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(RunError) as error:
        read_run(str(folder))
    sentence(error.value, "has no step yet", "wait")
    with pytest.raises(RunError) as error:
        compare([make("b")], tmp_path / "out", ["health/acuracy"])
    sentence(error.value, "--metric health/acuracy", "did you mean 'health/accuracy'")


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.mkdir [made]",
        "a: !!python/name:os.system",
        "{broken",
        "- a",
        "",
        "a: &a [*a]",
        "a: &a {b: *a}",
        "a: {[1]: 2}",
    ],
)
def test_a_configuration_that_is_none_is_named_and_runs_nothing(
    make, tmp_path: Path, monkeypatch, sentence, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(make("a"))
    (folder / "config.yaml").write_text(text)
    with pytest.raises(RunError) as error:
        read_run(str(folder))
    sentence(error.value, "config.yaml", "leave this run out")
    assert not Path("made").exists()


@pytest.mark.parametrize(
    "line",
    ["null", "[]", "3", "{}", '{"step": "1"}', '{"step": 1, "validation": 3}', "{", "", "\x00" * 9, "[" * 99_999],
)
def test_a_line_that_is_no_step_is_named(make, sentence, line: str) -> None:
    folder = Path(make("a"))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(f"{line}\n{{}}")
    with pytest.raises(RunError) as error:
        read_run(str(folder))
    sentence(error.value, f"metrics.jsonl, line {STEPS + 3}")
