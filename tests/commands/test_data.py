"""`verl-plugins data convert`, started as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet

COMMAND = Path(sys.executable).with_name("verl-plugins")
SAMPLES = Path(__file__).parents[1] / "data"


def convert(folder: Path, *args: str | Path) -> subprocess.CompletedProcess:
    command = [COMMAND, "data", "convert", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env={**os.environ, "COLUMNS": "100"})


def test_the_table_says_what_happened_and_how_to_train(tmp_path: Path) -> None:
    done = convert(tmp_path, SAMPLES / "dapo.jsonl", "--to", "new/train.parquet", "--drop-duplicates")
    assert (done.returncode, done.stderr) == (0, "")
    counts = {
        cells[1].strip(): cells[2].strip()
        for cells in (line.split("│") for line in done.stdout.splitlines())
        if len(cells) == 4
    }
    assert counts["rows read"] == "3"
    assert counts["rows written to train.parquet"] == "2"
    assert counts["rows that ask what an earlier row asks"] == "1"
    assert "What is the sum of the first 10 odd numbers? → 100" in done.stdout
    assert "columns not kept: extra_info.index" in done.stdout
    assert done.stdout.endswith("verl-plugins run RECIPE data.train_files=new/train.parquet\n")
    assert pyarrow.parquet.read_metadata(tmp_path / "new/train.parquet").num_rows == 2


def test_every_option_arrives(tmp_path: Path) -> None:
    rows = [{"q": f"{n}?", "a": f"#### {n}", "n": f"id{n}", "level": n, "w": "x"} for n in range(40)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"q": "?"}])))
    flags = "--to t.parquet --val-to v.parquet --val-fraction 0.5 --shape plain --question q --answer a --solution w"
    more = "--id n --keep level --keep a --data-source mine --system S --suffix U --skip-unanswered"
    done = convert(tmp_path, "in.jsonl", *flags.split(), *more.split())
    assert done.returncode == 0, done.stderr
    assert "left out: row 41 (column a is empty)" in done.stdout
    train, val = (pyarrow.parquet.read_table(tmp_path / f"{side}.parquet").to_pylist() for side in "tv")
    assert len(train) + len(val) == 40
    assert 8 <= len(val) <= 32
    row = train[0]
    number = row["extra_info"]["level"]
    assert row["extra_info"] == {
        "index": 0,
        "prompt_id": f"id{number}",
        "solution": "x",
        "level": number,
        "a": f"#### {number}",
    }
    assert (row["data_source"], row["reward_model"]["ground_truth"]) == ("mine", f"#### {number}")
    assert [message["content"] for message in row["prompt"]] == ["S", f"{number}?\nU"]


def test_an_error_is_one_line_and_leaves_nothing(tmp_path: Path, sentence) -> None:
    (tmp_path / "in.jsonl").write_text(
        '{"question": "[b]1?[/b]", "answer": "no mark"}\n{"question": "2?", "answer": "#### 2"}'
    )
    cases = {
        (): ["1 of 2 rows of in.jsonl", "row 1 (no #### in column answer)", "--skip-unanswered"],
        ("--val-fraction", "0.2"): ["--val-fraction 0.2", "--val-to"],
    }
    for flags, parts in cases.items():
        done = convert(tmp_path, "in.jsonl", "--to", "out.parquet", *flags)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ")
        sentence(done.stderr.strip(), *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
