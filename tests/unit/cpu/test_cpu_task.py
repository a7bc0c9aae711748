"""The embedded task, tokenizer, model and warm-up cache of the CPU preset."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from verl_plugins import RECIPES
from verl_plugins.bridge.logits import shaping
from verl_plugins.composition.cache import cache_folder
from verl_plugins.composition.settings import typed
from verl_plugins.cpu import warmup
from verl_plugins.cpu.model import ModelSettings, make_model, make_tokenizer
from verl_plugins.cpu.task import DATA_SOURCE, TaskSettings, all_sums, split_sums, write_task
from verl_plugins.cpu.warmup import WarmupSettings, prepare, warm_up
from verl_plugins.errors import RunError
from verl_plugins.optim.stablemax import symlog

MODEL = ModelSettings(hidden_size=32, layers=1, heads=1, kv_heads=1, intermediate_size=32)
TASK = TaskSettings(train_rows=40, val_rows=10, terms=2)
WARMUP = WarmupSettings(steps=3, batch=4, teacher_accuracy=(0.9, 0.5, 0.1))


def digests(folder: Path) -> dict[str, str]:
    """Hash of every file under ``folder``, by relative path."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_same_seed_gives_the_same_tables_and_another_seed_others(tmp_path: Path) -> None:
    write_task(tmp_path / "a", TASK)
    write_task(tmp_path / "b", TASK)
    write_task(tmp_path / "c", dataclasses.replace(TASK, seed=1))
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert digests(tmp_path / "a") != digests(tmp_path / "c")


@pytest.mark.parametrize(
    "settings",
    [TaskSettings(), TASK, TaskSettings(train_rows=1, val_rows=1, terms=1), TaskSettings(train_rows=873, val_rows=127)],
    ids=["default", "small", "two rows", "every prompt"],
)
def test_held_out_prompts_are_not_trained_on_and_none_repeats(settings: TaskSettings) -> None:
    train, val = split_sums(settings)
    assert (len(train), len(val)) == (settings.train_rows, settings.val_rows)
    assert len({item.prompt for item in train + val}) == len(train) + len(val)


def test_every_level_is_in_both_splits_and_levels_are_as_even_as_can_be() -> None:
    train, val = split_sums(TaskSettings())
    assert {item.level for item in train} == {item.level for item in val} == {0, 1, 2, 3}
    chosen = [sum(item.level == level for item in train + val) for level in range(4)]
    assert chosen == [125, 195, 195, 125]  # only 125 prompts have no, or only, large digits


def test_answers_and_levels_are_right() -> None:
    for prompt, answer, level in all_sums(TASK):
        digits = [int(digit) for digit in prompt.rstrip("=").split("+")]
        assert sum(digits) == answer
        assert sum(digit >= 5 for digit in digits) == level


def test_tables_have_the_schema_of_verl(tmp_path: Path) -> None:
    for file, split, count in zip(write_task(tmp_path, TASK), ("train", "val"), (40, 10), strict=True):
        rows = pyarrow.parquet.read_table(file).to_pylist()
        assert [row["extra_info"]["index"] for row in rows] == list(range(count))
        for row in rows:
            assert row["data_source"] == DATA_SOURCE
            assert row["ability"] == "math"
            (message,) = row["prompt"]
            assert message["role"] == "user"
            assert row["extra_info"]["split"] == split
            assert 0 <= row["extra_info"]["level"] <= 2
            right = sum(map(int, message["content"].rstrip("=").split("+")))
            assert row["reward_model"] == {"style": "rule", "ground_truth": str(right)}


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="only 100 different prompts"):
        TaskSettings(train_rows=100, val_rows=1, terms=2)
    with pytest.raises(ValueError, match="Out of range"):
        TaskSettings(terms=0)
    with pytest.raises(ValueError, match="16 wide"):
        ModelSettings(hidden_size=64, heads=4)
    with pytest.raises(ValueError, match="must be positive"):
        WarmupSettings(steps=0)
    with pytest.raises(ValueError, match="4 teacher accuracies were given for 3 levels"):
        warm_up(make_model(MODEL), make_tokenizer(), WarmupSettings(), TASK)


def test_tokenizer_gives_one_token_per_byte_and_survives_a_round_trip(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    made = make_tokenizer()
    made.save_pretrained(tmp_path)
    # AutoTokenizer finds the class through the model's configuration.
    make_model(MODEL).config.save_pretrained(tmp_path)
    for tokenizer in (made, AutoTokenizer.from_pretrained(tmp_path)):
        assert len(tokenizer("\n").input_ids) == 1
        assert tokenizer.decode(tokenizer("3+4+9=").input_ids) == "3+4+9="
        assert tokenizer.decode(tokenizer("é\n 12").input_ids) == "é\n 12"
        assert len(tokenizer("3+4+9=").input_ids) == 6
        assert tokenizer.eos_token == "<|im_end|>"
        assert tokenizer.eos_token_id != tokenizer.pad_token_id
        chat = [{"role": "user", "content": "3+4="}]
        assert tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == "3+4="


def test_prepare_gives_a_loadable_folder_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    first = prepare(tmp_path / "a", MODEL, TASK, WARMUP, progress=None)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    second = prepare(tmp_path / "b", MODEL, TASK, WARMUP)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert first.train_file.is_file() and first.val_file.is_file()
    assert first.model_path.parent.name == second.model_path.parent.name
    model = AutoModelForCausalLM.from_pretrained(first.model_path)
    assert model.config.eos_token_id == make_tokenizer().eos_token_id


def test_another_setting_is_another_folder(tmp_path: Path) -> None:
    first = prepare(tmp_path, MODEL, TASK, WARMUP, progress=None)
    other = prepare(tmp_path, MODEL, TASK, dataclasses.replace(WARMUP, seed=1), progress=None)
    assert first.model_path != other.model_path
    assert digests(first.model_path)["model.safetensors"] != digests(other.model_path)["model.safetensors"]


def test_a_cache_hit_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    made = prepare(tmp_path, MODEL, TASK, WARMUP, progress=None)
    code = f"""
import sys
from pathlib import Path
from verl_plugins.cpu.model import ModelSettings
from verl_plugins.cpu.task import TaskSettings
from verl_plugins.cpu.warmup import WarmupSettings, prepare
print(prepare(Path({str(tmp_path)!r}), {MODEL!r}, {TASK!r}, {WARMUP!r}).model_path)
assert not {{"torch", "transformers", "pyarrow", "rich"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(made.model_path)


def test_an_interrupted_cache_is_not_used(tmp_path: Path) -> None:
    def interrupt(steps: range) -> range:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, MODEL, TASK, WARMUP, progress=interrupt)
    key = warmup._key(MODEL, TASK, WARMUP)
    assert [entry.name for entry in tmp_path.iterdir()] == [f".{key}.lock"]
    # What a kill leaves, which no handler can clear away, is not taken for the cache either.
    (tmp_path / f".{key}.left" / "model").mkdir(parents=True)
    made = prepare(tmp_path, MODEL, TASK, WARMUP, progress=None)
    assert (made.model_path / "model.safetensors").is_file()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [f".{key}.lock", key]


def test_of_two_at_once_one_makes_it_and_the_other_waits(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from verl_plugins.cpu.model import ModelSettings
from verl_plugins.cpu.task import TaskSettings
from verl_plugins.cpu.warmup import WarmupSettings, prepare
def progress(steps):
    print("made", flush=True)
    return steps
prepare(Path({str(tmp_path)!r}), {MODEL!r}, {TASK!r}, {WARMUP!r}, progress=progress)
"""
    command, folder = [sys.executable, "-c", code], Path(__file__).parents[3]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder) for _ in range(2)]
    outputs = [one.communicate()[0] for one in both]
    assert [one.returncode for one in both] == [0, 0]
    assert sorted(outputs) == ["", "made\n"]


class TestShapedLogits:
    """A model is warmed up under the plugins that shape the run's logits, and kept apart from others."""

    @staticmethod
    def shaping(**settings: Any) -> Any:
        return shaping({"grpo": {}, "stablemax": settings})

    def test_another_place_for_each_and_the_usual_one_without(self, tmp_path: Path) -> None:
        places = [
            warmup.locate(tmp_path, MODEL, TASK, WARMUP, made)
            for made in (None, shaping({"grpo": {}}), self.shaping(), self.shaping(dtype="float64"), self.shaping())
        ]
        assert places[0] == places[1] and places[2] == places[4]
        assert len({place.model_path for place in places}) == 3

    def test_it_learns_to_speak_through_them(self, tmp_path: Path) -> None:
        def through(model: Any, inputs: Any, output: Any) -> Any:
            output.logits = symlog(output.logits)
            return output

        expected = make_model(MODEL)
        expected.register_forward_hook(through)
        warm_up(expected, make_tokenizer(), WARMUP, TASK)
        made = prepare(tmp_path, MODEL, TASK, WARMUP, None, self.shaping())
        plain = prepare(tmp_path, MODEL, TASK, WARMUP, None)
        weights, others = (
            AutoModelForCausalLM.from_pretrained(one.model_path, dtype=torch.float32).state_dict()
            for one in (made, plain)
        )
        for name, weight in expected.state_dict().items():
            assert torch.equal(weights[name], weight)
        assert not torch.equal(others["lm_head.weight"], weights["lm_head.weight"])


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "gone"])
@pytest.mark.parametrize("name", ["model/model.safetensors", "model/config.json", "train.parquet", "hashes.json"])
def test_a_damaged_file_is_noticed_and_all_is_made_again(tmp_path: Path, capsys, name: str, damage: str) -> None:
    made = prepare(tmp_path, MODEL, TASK, WARMUP, progress=None)
    before, path = digests(made.model_path.parent), made.model_path.parent / name
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "garbage": b"x" * len(content)}[damage])
    prepare(tmp_path, MODEL, TASK, WARMUP, progress=None)
    assert digests(made.model_path.parent) == before
    assert "damaged" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written(tmp_path: Path, sentence) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError) as error:
        prepare(tmp_path / "file" / "cache", MODEL, TASK, WARMUP, progress=None)
    sentence(error.value, str(tmp_path / "file" / "cache"), "VERL_PLUGINS_CACHE")


def test_a_user_without_a_home(monkeypatch, sentence) -> None:
    for name in ("VERL_PLUGINS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(RunError) as error:
        cache_folder()
    sentence(error.value, "VERL_PLUGINS_CACHE")


def test_the_warm_up_does_not_see_held_out_prompts() -> None:
    lessons = warmup._Lessons(make_tokenizer(), WARMUP, TASK)
    assert not {item.prompt for item in lessons.sums} & {item.prompt for item in split_sums(TASK)[1]}
    assert len(lessons.sums) == 90


def test_targets_are_the_teachers_probabilities() -> None:
    tokenizer = make_tokenizer()
    lessons = warmup._Lessons(tokenizer, WARMUP, TASK)
    exact, noisy = lessons._answers(9, 1.0), lessons._answers(9, 0.5)
    one, nine, end = (*tokenizer("19").input_ids, tokenizer.eos_token_id)
    assert exact[(nine, end)] == 1.0
    assert noisy[(nine, end)] == 0.5
    assert sum(noisy.values()) == pytest.approx(1.0)
    # Off by at most 8: 1 to 8 and 10 to 17, of which "1" and "10" to "17" begin with a one.
    assert len(noisy) == 17
    assert warmup._next_tokens(noisy, ())[one] == pytest.approx(9 * 0.5 / 16)
    assert warmup._next_tokens(noisy, (one,))[end] == pytest.approx(1 / 9)
    ids, targets = lessons.batch(0)
    assert targets.shape == (*ids.shape, len(tokenizer))
    sums = targets.sum(-1)
    assert ((sums - 1).abs() < 1e-6).logical_or(sums == 0).all()


class TestPreset:
    """The preset's file spells out the settings, so that each can be overridden, and they are the defaults."""

    def test_the_file_says_the_defaults(self) -> None:
        section = yaml.safe_load((RECIPES / "presets" / "cpu.yaml").read_text())["cpu"]
        for name, settings in (("model", ModelSettings()), ("task", TaskSettings()), ("warmup", WarmupSettings())):
            assert typed(type(settings), section[name], f"cpu.{name}") == settings
            assert set(section[name]) == {field.name for field in dataclasses.fields(settings)}
