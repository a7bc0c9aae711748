"""The data of a run, before anything starts: files, columns, rows, and prompts as the model will read them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf, open_dict

from verl_plugins.composition.look.model import MEND_TEMPLATE, Model
from verl_plugins.composition.look.reward import Labels, source_fault
from verl_plugins.composition.look.words import rows, short
from verl_plugins.data.answers import is_answer
from verl_plugins.errors import CompositionError

if TYPE_CHECKING:
    import pyarrow as pa

ENDINGS = (".parquet", ".json", ".jsonl")
"""What verl's dataset reads."""
MOST_RENDERED = 20_000
"""Prompts of a file that are rendered and counted; of a larger file those with the longest texts."""
CONVERT = "`verl-plugins data convert`"
SPLITS = {"data.train_files": "train", "data.val_files": "val"}


@dataclass
class Found:
    """What was seen in the files of one key."""

    key: str
    files: list[str]
    rows: int = 0
    longest: int = 0
    """Tokens of the longest prompt, template and all."""
    too_long: dict[str, list[int]] = field(default_factory=dict)
    """Rows of each file whose prompt is longer than the limit."""
    sampled: bool = False
    """Whether only the longest texts were rendered."""
    names_loop: bool = False
    """Whether its rows say which agent loop they take."""
    unread: bool = False
    """Whether some file can be read by the run only."""

    @property
    def left_out(self) -> int:
        """Rows that verl leaves out where it filters."""
        return sum(map(len, self.too_long.values()))


def validates(config: DictConfig) -> bool:
    """Whether the run validates at all."""
    trainer = config.trainer
    return bool(trainer.get("val_before_train", True) or trainer.test_freq > 0 or trainer.get("val_only", False))


def look_at_data(
    config: DictConfig, model: Model | None, labels: Labels, made: Mapping[str, Path] | None = None
) -> list[Found]:
    """Every file of training and, where the run validates, of validation; paths without `~` are entered in `config`.

    `made` says where files that the preset makes can be looked at.

    Raises:
        CompositionError: naming file, row and column of what the run could not use, or would cut.
    """
    keys = ["data.train_files"]
    if _files(config, "data.val_files"):
        keys.append("data.val_files")
    elif validates(config):
        raise CompositionError(
            "data.val_files is empty and the run validates: set data.val_files=…, or trainer.val_before_train=false "
            "trainer.test_freq=-1 to train without validation"
        )
    if not _files(config, "data.train_files"):
        raise CompositionError("data.train_files is empty: set data.train_files=… to a parquet or json file")
    return [_look_at_split(key, config, model, labels, (made or {}).get(key)) for key in keys]


def _files(config: DictConfig, key: str) -> list[str]:
    value = OmegaConf.select(config, key)
    return [value] if isinstance(value, str) and value else list(value or [])


def _look_at_split(key: str, config: DictConfig, model: Model | None, labels: Labels, made: Path | None) -> Found:
    files = [str(file) for file in _files(config, key)]
    local = [file if "://" in file else str(Path(file).expanduser()) for file in files]
    if local != files:
        with open_dict(config):
            OmegaConf.update(config, key, local if len(local) > 1 else local[0], merge=False)
    found = Found(key, local)
    data, kinds = config.data, {}
    if (data.get("custom_cls") or {}).get("path"):
        found.unread = True
        return found
    for file in local:
        if "://" in file:
            found.unread = True
            continue
        table = _read(key, made or Path(file))
        found.names_loop |= "agent_name" in table.column_names
        _look_at_columns(key, file, table, data, kinds)
        _look_at_rows(found, file, table, config, model, labels)
    _look_at_lengths(found, data)
    if not found.unread:
        _look_at_count(found, config)
    return found


# Files and columns


def _read(key: str, path: Path) -> pa.Table:
    """A file as verl reads it: parquet directly, JSON through `datasets`, which settles the types of columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    mend = f"set {key}=… to a parquet or json file"
    if not path.exists():
        raise CompositionError(f"{key}: there is no file {path}; {mend}")
    if not path.is_file():
        raise CompositionError(f"{key}: {path} is a folder; name its files, as in {key}=[a.parquet,b.parquet]")
    if path.suffix not in ENDINGS:
        raise CompositionError(
            f"{key}: {path} does not end in {', '.join(ENDINGS)}, which verl reads: convert it with {CONVERT}"
        )
    try:
        table = pq.read_table(path) if path.suffix == ".parquet" else _json(path)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise CompositionError(
            f"{key}: {path} cannot be read ({short(error)}); convert it anew with {CONVERT}"
        ) from error
    if not table.num_rows:
        raise CompositionError(f"{key}: {path} has no rows; {mend}")
    return table


def _json(path: Path) -> pa.Table:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset("json", data_files=str(path), split="train").data.table
    except Exception as error:
        raise ValueError(short(error.__cause__ or error)) from error
    finally:
        datasets.enable_progress_bars()


def _look_at_columns(key: str, file: str, table: pa.Table, data: DictConfig, kinds: dict[str, tuple[str, Any]]) -> None:
    """The prompt's column holds messages, extra_info is a mapping, and a column has one type in all files."""
    import pyarrow as pa

    schema, name = table.schema, data.prompt_key
    if name not in schema.names:
        chats = [column.name for column in schema if _holds_messages(column.type)]
        hint = f"set data.prompt_key={chats[0]}" if chats else f"convert it with {CONVERT}"
        there = f"has the columns {', '.join(schema.names)}"
        raise CompositionError(f"{key}: {file} has no column {name!r} of chat messages (it {there}): {hint}")
    kind = schema.field(name).type
    if not _holds_messages(kind):
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        what = "text" if is_text else f"a {kind}"
        raise CompositionError(
            f"{key}: column {name!r} of {file} is {what}, not a list of chat messages with role and content: "
            f"convert it "
            f"with {CONVERT}"
        )
    for column, wanted in (("extra_info", "a mapping"), ("data_source", "text")):
        if column in schema.names and not _fits(schema.field(column).type, wanted):
            raise CompositionError(
                f"{key}: column {column!r} of {file} is a {schema.field(column).type}, not {wanted}: convert it "
                f"with {CONVERT}"
            )
    for column in schema:
        mine, (other, theirs) = _plain(column.type), kinds.setdefault(column.name, (file, _plain(column.type)))
        if mine != theirs and "null" not in (mine, theirs):
            raise CompositionError(
                f"{key}: column {column.name!r} has one type in {other} and another in {file}, and verl joins the "
                f"files: "
                f"convert both with {CONVERT} and the same options"
            )


def _holds_messages(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_struct(kind.value_type):
        return False
    return {"role", "content"} <= {inner.name for inner in kind.value_type}


def _fits(kind: pa.DataType, wanted: str) -> bool:
    import pyarrow as pa

    if wanted == "text":
        return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_dictionary))
    return pa.types.is_struct(kind) or pa.types.is_null(kind)


def _plain(kind: pa.DataType) -> Any:
    """A type with the keys of mappings in no order, as verl's dataset compares them."""
    import pyarrow as pa

    if pa.types.is_null(kind):
        return "null"
    if pa.types.is_struct(kind):
        return {inner.name: _plain(inner.type) for inner in kind}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [_plain(kind.value_type)]
    return str(kind)


# Rows


def _look_at_rows(
    found: Found, file: str, table: pa.Table, config: DictConfig, model: Model | None, labels: Labels
) -> None:
    data = config.data
    where = f"{found.key}: {{}} of {file}"
    prompts = table.column(data.prompt_key).to_pylist()
    _refuse(
        _bad_prompts(prompts), where, f"column {data.prompt_key!r}", f"mend them, or convert the file with {CONVERT}"
    )
    _look_at_truth(found.key, file, table, labels)
    if "data_source" in table.schema.names:
        fault = source_fault(set(table.column("data_source").to_pylist()), labels)
        if fault:
            raise CompositionError(f"{found.key}: {file} {fault}")
    elif labels.by_source:
        raise CompositionError(
            f"{found.key}: {file} has no column 'data_source', by which verl's own reward function chooses how to "
            f"score: "
            f"convert it with {CONVERT}, or let a plugin score with +plugins.math_verify={{}}"
        )
    found.rows += len(prompts)
    pictured = any(
        name in table.schema.names for name in (data.image_key, data.video_key, data.get("audio_key", "audios"))
    )
    if model is not None and not pictured:
        _count(found, file, prompts, model, data)


def _bad_prompts(prompts: list[Any]) -> Iterator[tuple[int, str]]:
    for number, messages in enumerate(prompts, 1):
        if not messages:
            yield number, "has no messages"
        elif any(not message or not message.get("role") for message in messages):
            yield number, "has a message without role"
        elif any(message.get("content") is None for message in messages):
            yield number, "has a message without content"
        elif isinstance(messages[-1]["content"], str) and not messages[-1]["content"].strip():
            yield number, "ends with an empty message"


def _refuse(faults: Iterator[tuple[int, str]], where: str, column: str, mend: str) -> None:
    """One sentence for all rows that have the first fault."""
    first, numbers = "", []
    for number, fault in faults:
        first = first or fault
        if fault == first:
            numbers.append(number)
    if numbers:
        raise CompositionError(f"{where.format(rows(numbers))}: {column} {first}: {mend}")


def _look_at_truth(key: str, file: str, table: pa.Table, labels: Labels) -> None:
    """The ground truth is there and answers something, where the run compares with it."""
    import pyarrow as pa

    needed = labels.needed(key)
    if not needed:
        return
    others = labels.mend(key)
    convert = f"convert it with {CONVERT}"
    kind = table.schema.field("reward_model").type if "reward_model" in table.schema.names else None
    if kind is None or not pa.types.is_struct(kind) or kind.get_field_index("ground_truth") < 0:
        missing = "no column 'reward_model'" if kind is None else "no 'ground_truth' in its column 'reward_model'"
        raise CompositionError(
            f"{key}: {file} has {missing}, with which {labels.who} compares answers: {convert}, {others}"
        )
    truths = [row and row["ground_truth"] for row in table.column("reward_model").to_pylist()]
    if labels.plain:
        _refuse(_bad_truths(truths), f"{key}: {{}} of {file}", "reward_model.ground_truth", f"mend them, {others}")


def _bad_truths(truths: list[Any]) -> Iterator[tuple[int, str]]:
    for number, truth in enumerate(truths, 1):
        if truth is None or (isinstance(truth, float) and math.isnan(truth)):
            yield number, "is null"
        elif isinstance(truth, bool) or not isinstance(truth, (str, int, float)):
            yield number, f"is a {type(truth).__name__}, not text or a number"
        elif not str(truth).strip():
            yield number, "is empty"
        elif not is_answer(str(truth)):
            yield number, f"is {str(truth)!r}, which answers nothing"


# Lengths


def _count(found: Found, file: str, prompts: list[Any], model: Model, data: DictConfig) -> None:
    """Render the prompts with the model's template and count their tokens."""
    numbers = range(len(prompts))
    if len(prompts) > MOST_RENDERED:
        found.sampled = True
        size = [sum(len(str(message["content"])) for message in messages) for messages in prompts]
        numbers = sorted(numbers, key=size.__getitem__)[-MOST_RENDERED:]
    texts, faults = [], []
    for number in numbers:
        text, fault = model.prompt(prompts[number])
        texts.append(text)
        if fault:
            faults.append((number + 1, fault))
    where = f"{found.key}: {{}} of {file}"
    _refuse(iter(sorted(faults)), where, f"the chat template of {model.path}", MEND_TEMPLATE)
    lengths = model.lengths(texts)
    found.longest = max([found.longest, *lengths])
    too_long = [number + 1 for number, length in zip(numbers, lengths, strict=True) if length > data.max_prompt_length]
    if too_long:
        found.too_long[file] = sorted(too_long)


def _look_at_lengths(found: Found, data: DictConfig) -> None:
    if not found.too_long or data.filter_overlong_prompts:
        return
    file, numbers = next(iter(found.too_long.items()))
    raise CompositionError(
        f"{found.key}: {rows(numbers)} of {file}: the prompt has more tokens (template included) than "
        f"data.max_prompt_length={data.max_prompt_length}: set data.max_prompt_length={found.longest}, or "
        "data.filter_overlong_prompts=true to leave such rows out"
    )


def _look_at_count(found: Found, config: DictConfig) -> None:
    """Enough rows for a step, or for a validation, after those that are left out."""
    data, split = config.data, SPLITS[found.key]
    most = data.get(f"{split}_max_samples", -1) or -1
    left = (min(most, found.rows) if most > 0 else found.rows) - (found.left_out if most <= 0 else 0)
    names = ("train_batch_size", "gen_batch_size") if split == "train" else ()
    least = max([(data.get(name) or 0, f"data.{name}") for name in names], default=(1, "validation"))
    if left >= least[0]:
        return
    sentence = f"{found.key} gives {left} rows and {least[1]} needs {least[0]}"
    if found.left_out:
        sentence += f" ({found.left_out} are left out because they have more than data.max_prompt_length="
        sentence += f"{data.max_prompt_length} tokens): set data.max_prompt_length={found.longest}"
    elif most > 0:
        sentence += f" (data.{split}_max_samples={most}): set data.{split}_max_samples=-1"
    elif left and split == "train":
        sentence += f": set {least[1]}={left}, or add rows"
    else:
        sentence += ": add rows"
    raise CompositionError(sentence)
