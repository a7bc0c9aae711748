"""What is refused before a run starts, and what is not."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import models
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from verl_plugins.composition.compose import compose
from verl_plugins.composition.look import look
from verl_plugins.composition.look import model as look_at
from verl_plugins.composition.needs import check
from verl_plugins.errors import CompositionError

QUIET = ("trainer.val_before_train=false", "trainer.test_freq=-1", "data.val_files=null")


def rows(truth: object = "4", text: str = "2+2=", count: int = 16, system: str = "") -> list[dict]:
    first = [{"role": "system", "content": system}] if system else []
    messages = [*first, {"role": "user", "content": text}]
    made = {"data_source": "own", "prompt": messages, "extra_info": {"index": 0}}
    return [{**made, "reward_model": {"style": "rule", "ground_truth": truth}} for _ in range(count)]


def write(path: Path, made: list[dict]) -> Path:
    pq.write_table(pa.Table.from_pylist(made), path)
    return path


def looked(data: Path, model: Path, *overrides: str, recipe: str = "grpo") -> list[str]:
    paths = (f"data.train_files={data}", f"actor_rollout_ref.model.path={model}")
    composed = compose(recipe, "cpu", (*paths, *QUIET, *overrides))
    return look(composed, check(composed))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "train.parquet", rows())


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({}, None),
        ({"kind": "gpt2", "name": "GPT2LMHeadModel"}, None),
        ({"kind": "qwen3", "name": "Qwen3ForCausalLM"}, None),
        ({"template": None}, ["no chat template", "custom_chat_template"]),
        ({"template": "{{ broken"}, ["chat template", "custom_chat_template"]),
        ({"template": "a/file.jinja"}, ["leaves out", "custom_chat_template"]),
        ({"max_position_embeddings": 20}, ["positions", "data.max_prompt_length=32"]),
        ({"vocab_size": 100}, ["vocab_size"]),
        ({"name": "LlamaForSequenceClassification"}, ["LlamaForSequenceClassification"]),
        ({"kind": "t5", "name": "T5ForConditionalGeneration"}, ["T5ForConditionalGeneration"]),
        ({"kind": "mamba", "name": "MambaForCausalLM"}, ["MambaForCausalLM"]),
    ],
)
def test_models(tmp_path: Path, data: Path, sentence, settings: dict, parts: list[str] | None) -> None:
    model = models.write(tmp_path / "model", **settings)
    if parts is None:
        assert looked(data, model)
        return
    with pytest.raises(CompositionError) as error:
        looked(data, model)
    sentence(error.value, *parts)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_that_is_not_complete(tmp_path: Path, data: Path, sentence, file: str) -> None:
    model = models.write(tmp_path / "model")
    (model / file).unlink()
    with pytest.raises(CompositionError) as error:
        looked(data, model)
    sentence(error.value, "actor_rollout_ref.model.")


@pytest.mark.parametrize(("template", "part"), [(models.NO_SYSTEM, "no system"), (models.USERS_ONLY, "leaves out")])
def test_a_template_that_does_not_take_system_messages(tmp_path: Path, sentence, template: str, part: str) -> None:
    model, plain = models.write(tmp_path / "model", template=template), write(tmp_path / "plain.parquet", rows())
    assert looked(plain, model)
    with pytest.raises(CompositionError) as error:
        looked(write(tmp_path / "a.parquet", rows(system="Be brief")), model)
    sentence(error.value, part, "custom_chat_template", "a.parquet")


@pytest.mark.parametrize("truth", [None, "", " ", "N/A", "None", "unknown", r"\text{N/A}"])
def test_truths_that_answer_nothing(tmp_path: Path, sentence, truth: object) -> None:
    model, file = (
        models.write(tmp_path / "model"),
        write(tmp_path / "a.parquet", [*rows(count=16), *rows(truth, count=1)]),
    )
    with pytest.raises(CompositionError) as error:
        looked(file, model)
    sentence(error.value, "row 17", "a.parquet", "ground_truth")


def test_label_free_recipes_train_without_the_column(tmp_path: Path, sentence) -> None:
    model = models.write(tmp_path / "model")
    bare = [{key: row[key] for key in row if key != "reward_model"} for row in rows()]
    file = write(tmp_path / "a.parquet", bare)
    assert looked(file, model, "actor_rollout_ref.rollout.n=8", "plugins.ttrl.n_votes=8", recipe="ttrl")
    with pytest.raises(CompositionError) as error:
        looked(file, model)
    sentence(error.value, "reward_model", "a.parquet")


def test_long_prompts_are_refused_or_counted(tmp_path: Path, sentence) -> None:
    model = models.write(tmp_path / "model")
    file = write(tmp_path / "a.parquet", [*rows(), *rows(text="1+" * 20, count=1)])
    with pytest.raises(CompositionError) as error:
        looked(file, model)
    sentence(error.value, "row 17", "data.max_prompt_length=40", "data.filter_overlong_prompts=true")
    assert looked(file, model, "data.max_prompt_length=40")
    assert any("1 longer" in line for line in looked(file, model, "data.filter_overlong_prompts=true"))


@pytest.mark.parametrize("made", [{"prompt": ["2+2="] * 16}, {"question": ["2+2="] * 16}])
def test_columns(tmp_path: Path, sentence, made: dict) -> None:
    pq.write_table(pa.table(made), tmp_path / "a.parquet")
    with pytest.raises(CompositionError) as error:
        looked(tmp_path / "a.parquet", models.write(tmp_path / "model"))
    sentence(error.value, "'prompt'", "a.parquet", "data convert")


def test_fewer_rows_than_a_step_needs(tmp_path: Path, sentence) -> None:
    with pytest.raises(CompositionError) as error:
        looked(write(tmp_path / "a.parquet", rows(count=5)), models.write(tmp_path / "model"))
    sentence(error.value, "data.train_files", "5 rows", "data.train_batch_size")


def test_a_reward_function_of_the_user_scores(tmp_path: Path, data: Path, sentence) -> None:
    model, file = models.write(tmp_path / "model"), tmp_path / "score.py"
    file.write_text("def compute_score(**given):\n    return 1.0\n")
    asked = f"reward.custom_reward_function.path={file}"
    lines = looked(data, model, asked)
    assert any(str(file) in line for line in lines) and not any("math_verify" in line for line in lines)
    with pytest.raises(CompositionError) as error:
        looked(data, model, asked, "reward.custom_reward_function.name=compute_scor")
    sentence(error.value, "did you mean 'compute_score'?")


def test_a_reward_model_scores_instead_of_the_default_scorer(tmp_path: Path, data: Path, sentence) -> None:
    """Said before the run as it will be; a plugin that is no default is not left out in silence."""
    model = models.write(tmp_path / "model")
    asked = ("reward.reward_model.enable=true", "reward.reward_model.rollout.name=vllm")
    named = f"reward.reward_model.model_path={tmp_path / 'judge'}"
    lines = looked(data, model, *asked, named)
    assert f"reward: the model {tmp_path / 'judge'}" in lines and not any("math_verify" in line for line in lines)
    for overrides, parts in (
        (asked, ["reward.reward_model.model_path is not set"]),
        ((*asked, named, "+plugins.reasoning_gym={}"), ["'reasoning_gym' scores answers too", "enable=false"]),
    ):
        with pytest.raises(CompositionError) as error:
            looked(data, model, *overrides)
        sentence(error.value, *parts)


class Makes:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.folder,)


def pickled(where: str, bomb: bytes) -> pa.Table:
    """Rows with a pickled object in the place of a value, of a column, or of what says how to read a column."""
    made = rows()
    if where == "extension":
        table = pa.Table.from_pylist(made)
        about = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": bomb}
        return table.append_column(pa.field("odd", pa.int64(), metadata=about), pa.array(range(len(made))))
    for row in made:
        if where == "content":
            row["prompt"][-1] = {**row["prompt"][-1], "content": bomb}
        elif where == "ground_truth":
            row["reward_model"] = {**row["reward_model"], "ground_truth": bomb}
        else:
            row[where] = bomb
    return pa.Table.from_pylist(made)


@pytest.mark.parametrize(
    "where", ["prompt", "content", "data_source", "reward_model", "ground_truth", "extra_info", "extension", "another"]
)
def test_pickled_objects_in_a_file_are_refused_or_left_alone(tmp_path: Path, sentence, where: str) -> None:
    bomb, file = pickle.dumps(Makes(tmp_path / "made")), tmp_path / "a.parquet"
    pq.write_table(pickled(where, bomb), file)
    model = models.write(tmp_path / "model")
    if where in ("extension", "another"):
        assert looked(file, model)
    else:
        with pytest.raises(CompositionError) as error:
            looked(file, model)
        sentence(error.value, "data.train_files", "a.parquet")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\x80\x04\x95", b"PAR1" + bytes(20) + b"PAR1", b"\x1f\x8b\x08"])
@pytest.mark.parametrize("ending", ["parquet", "json", "jsonl"])
def test_a_file_that_is_something_else(tmp_path: Path, sentence, content: bytes, ending: str) -> None:
    file = tmp_path / f"a.{ending}"
    file.write_bytes(content)
    with pytest.raises(CompositionError) as error:
        looked(file, models.write(tmp_path / "model"))
    sentence(error.value, "data.train_files", f"a.{ending} cannot be read")


class TestCritic:
    """A value model is looked at where one is trained."""

    def test_it_is_there(self, tmp_path: Path, data: Path, sentence) -> None:
        actor, critic = models.write(tmp_path / "model"), tmp_path / "critic"
        asked = ("algorithm.adv_estimator=gae", f"critic.model.path={critic}")
        for part in (f"there is no folder {critic}", "config.json"):
            with pytest.raises(CompositionError) as error:
                looked(data, actor, *asked)
            sentence(error.value, "critic.model.path", part)
            critic.mkdir(exist_ok=True)
        models.write(critic)
        looked(data, actor, *asked)
        looked(data, actor, "critic.model.path=/not/there")

    @pytest.mark.parametrize("estimator", ["gae", "grpo"])
    def test_on_gpus_verl_loads_it_with_flash_attention_only(self, monkeypatch, sentence, estimator: str) -> None:
        monkeypatch.setattr(look_at, "find_spec", lambda name: None)
        overrides = (f"algorithm.adv_estimator={estimator}", "data.train_files=a.parquet", "data.val_files=a.parquet")
        config = compose("grpo", "1gpu", overrides).config
        if estimator == "grpo":
            look_at._look_at_critic(config)
            return
        with pytest.raises(CompositionError) as error:
            look_at._look_at_critic(config)
        sentence(error.value, "flash-attn", "pip install", "algorithm.adv_estimator")
