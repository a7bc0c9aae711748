"""Tasks of reasoning-gym as data: rows, shares, settings, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from verl_plugins import DataError
from verl_plugins.data.gym import SUFFIX, Options, parse_settings, parse_tasks, write
from verl_plugins.reward.gym_entries import from_text


def rows(path: Path) -> list[dict[str, Any]]:
    return pyarrow.parquet.read_table(path).to_pylist()


def test_rows_of_two_tasks(tmp_path: Path) -> None:
    train, val = tmp_path / "train.parquet", tmp_path / "val.parquet"
    options = Options(rows=90, val_to=val, val_rows=30, seed=4, settings={"chain_sum": {"max_terms": 3}})
    written = write({"chain_sum": 1.0, "spell_backward": 2.0}, train, options)
    assert [(one.task, one.train, one.val) for one in written] == [("chain_sum", 30, 10), ("spell_backward", 60, 20)]
    found = [*rows(train), *rows(val)]
    assert len({row["extra_info"]["prompt_id"] for row in found}) == 120, "a question on both sides, or twice"
    assert [row["extra_info"]["index"] for row in rows(train)] == list(range(90))
    sources = [row["data_source"] for row in rows(train)]
    assert sources.count("reasoning_gym/chain_sum") == 30 and sources != sorted(sources)
    for row in found:
        entry = from_text(row["extra_info"]["entry"])
        assert row["data_source"] == f"reasoning_gym/{row['extra_info']['task']}"
        assert row["prompt"] == [{"role": "user", "content": f"{entry['question']}\n{SUFFIX}"}]
        assert row["reward_model"]["ground_truth"] == entry["answer"]
        if row["extra_info"]["task"] == "chain_sum":
            assert entry["metadata"]["num_terms"] <= 3


def test_the_same_seed_gives_the_same_rows(tmp_path: Path) -> None:
    made = []
    for place, seed in enumerate((1, 1, 2)):
        path = tmp_path / f"{place}.parquet"
        write({"chain_sum": 1.0}, path, Options(rows=20, seed=seed, suffix="", system="Be brief."))
        made.append(rows(path))
    assert made[0] == made[1] != made[2]
    assert made[0][0]["prompt"][0] == {"role": "system", "content": "Be brief."}


def test_a_task_without_answers_of_its_own(tmp_path: Path) -> None:
    write({"graph_color": 1.0}, tmp_path / "a.parquet", Options(rows=3))
    assert {row["reward_model"]["ground_truth"] for row in rows(tmp_path / "a.parquet")} == {""}


@pytest.mark.parametrize(
    ("tasks", "options", "part"),
    [
        ({"chainsum": 1.0}, {}, "no task 'chainsum'; did you mean 'chain_sum'"),
        ({"composite": 1.0}, {}, "no task 'composite'"),
        ({"chain_sum": 1.0}, {"settings": {"": {"terms": 3}}}, "no such setting, it has allow_negation"),
        ({"chain_sum": 1.0}, {"settings": {"": {"min_terms": 9, "max_terms": 2}}}, "refuses its settings"),
        ({"chain_sum": 1.0}, {"settings": {"": {"min_terms": "two"}}}, "refuses its settings"),
        ({"coin_flip": 1.0}, {"rows": 5000}, "different questions in"),
        ({"chain_sum": 1.0, "countdown": 1.0}, {"rows": 1}, "less than a row for each"),
        ({"chain_sum": 1.0}, {"val_rows": 3}, "needs --val-to"),
        ({"chain_sum": 1.0}, {"val_to": Path("x.json")}, "must end in .parquet"),
    ],
)
def test_what_is_refused(tmp_path: Path, tasks: dict, options: dict, part: str, sentence: Any) -> None:
    with pytest.raises(DataError) as refused:
        write(tasks, tmp_path / "a.parquet", Options(**{"rows": 10, **options}))
    assert part in str(refused.value)
    sentence(refused.value)
    assert not list(tmp_path.iterdir())


def test_tasks_and_settings_as_they_are_typed() -> None:
    assert parse_tasks("chain_sum, countdown=2.5") == {"chain_sum": 1.0, "countdown": 2.5}
    given = ["max_terms=3", "countdown.target=[1, 2]", "chain_sum.allow_negation=true"]
    assert parse_settings(given, ["chain_sum", "countdown"]) == {
        "": {"max_terms": 3},
        "countdown": {"target": [1, 2]},
        "chain_sum": {"allow_negation": True},
    }


@pytest.mark.parametrize("text", ["", "a,,b", "a=0", "a=-1", "a=x", "a=inf", "a,a"])
def test_tasks_that_cannot_be(text: str) -> None:
    with pytest.raises(DataError):
        parse_tasks(text)


@pytest.mark.parametrize("text", ["max_terms", "=3", "other.key=3", "key=[1"])
def test_settings_that_cannot_be(text: str) -> None:
    with pytest.raises(DataError, match="--set"):
        parse_settings([text], ["chain_sum"])
