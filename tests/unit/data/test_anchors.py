"""Anchors: clusters that are there are found, files keep what they have, and what cannot be done is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from verl_plugins import DataError
from verl_plugins.commands.cli import app
from verl_plugins.data.anchors import Options, assign, cluster, geometry_consistency, unit, write
from verl_plugins.reward.embedding import embedder

TOPICS = {
    "train": "the train to {} leaves at noon",
    "apple": "{} apples and pears in a basket",
    "log": "log of x^{} dx",
}


def prompts(count: int = 30) -> list[str]:
    """Three kinds of question, in turn."""
    kinds = list(TOPICS.values())
    return [kinds[number % 3].format(number) for number in range(count)]


def write_file(path: Path, texts: list[str], **columns: list) -> Path:
    rows = {"prompt": [[{"role": "system", "content": "S"}, {"role": "user", "content": text}] for text in texts]}
    rows |= {"data_source": ["d"] * len(texts), **columns}
    pyarrow.parquet.write_table(pyarrow.table(rows), path)
    return path


def test_three_clusters_give_three_anchors_and_balanced_strata(tmp_path: Path) -> None:
    file = write_file(tmp_path / "in.parquet", prompts(), extra=list(range(30)))
    report = write(file, tmp_path / "new/out.parquet", embedder("hashing", ""), Options(anchors=3))
    table = pyarrow.parquet.read_table(tmp_path / "new/out.parquet")
    assert table.column("anchor_id").to_pylist() == [0, 1, 2] * 10
    assert report.counts == [10, 10, 10]
    assert table.drop_columns("anchor_id").equals(pyarrow.parquet.read_table(file))
    assert [kind.split()[1] for kind in TOPICS.values()] == [example.split()[1] for example in report.examples]


def test_the_seed_decides_and_nothing_else() -> None:
    points = np.random.default_rng(0).normal(size=(40, 6))
    assert np.array_equal(cluster(points, 5, 3), cluster(points, 5, 3))
    assert not np.allclose(cluster(points, 5, 3), cluster(points, 5, 4))


@given(st.integers(1, 8), st.integers(0, 10**6))
def test_every_anchor_has_a_prompt(count: int, seed: int) -> None:
    points = np.random.default_rng(seed).normal(size=(24, 3)).round(1) + [0.01, 0, 0]
    anchors = cluster(points, count, seed)
    of, cosine = assign(points, anchors)
    assert np.allclose(np.linalg.norm(anchors, axis=1), 1)
    assert (np.abs(cosine) <= 1 + 1e-9).all() and len(anchors) == count
    assert list(dict.fromkeys(of.tolist())) == sorted(set(of.tolist()))


def test_equal_anchors_and_no_direction_go_to_the_lowest() -> None:
    anchors = np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    of, cosine = assign(np.array([[5.0, 0.0], [0.0, 0.0], [1e-14, 0.0], [0.0, -1.0]]), anchors)
    assert of.tolist() == [1, 0, 0, 1] and cosine.tolist() == [1, 0, 0, 0]
    assert [part.tolist() for part in assign(np.zeros((0, 2)), anchors)] == [[], []]


def test_as_many_anchors_as_different_prompts_and_no_more(sentence) -> None:
    points = np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert sorted(cluster(points, 2, 0).tolist()) == [[0, 1], [1, 0]]
    with pytest.raises(DataError) as error:
        cluster(points, 3, 0)
    sentence(error.value, "--anchors 3", "only 2 prompts differ")


class TestConsistency:
    of = np.array([0, 0, 1, 2, 2, 3])
    anchors = np.random.default_rng(1).normal(size=(4, 5))

    def test_the_same_map_in_other_sizes(self) -> None:
        embeddings = 3 * unit(self.anchors)[self.of]
        assert geometry_consistency(self.of, self.anchors, embeddings) == pytest.approx(1)

    def test_by_hand(self) -> None:
        embeddings = np.random.default_rng(2).normal(size=(6, 3))
        means = [embeddings[[0, 1]].mean(0), embeddings[2], embeddings[[3, 4]].mean(0), embeddings[5]]
        angle = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)  # noqa: E731
        pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
        ours = [angle(self.anchors[i], self.anchors[j]) for i, j in pairs]
        theirs = [angle(means[i], means[j]) for i, j in pairs]
        expected = np.corrcoef(ours, theirs)[0, 1]
        assert geometry_consistency(self.of, self.anchors, embeddings) == pytest.approx(expected)

    def test_two_anchors_in_use_tell_nothing(self) -> None:
        assert geometry_consistency(np.array([0, 3]), self.anchors, np.eye(2)) is None

    def test_nor_do_angles_that_are_all_equal(self) -> None:
        assert geometry_consistency(np.array([0, 1, 2]), self.anchors[:3], np.eye(3)) is None


def run(*words: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["data", "anchors", *map(str, words)])
    return done.exit_code, done.output + (str(done.exception) if done.exception else "")


def test_the_command_holds_validation_to_the_same_anchors(tmp_path: Path) -> None:
    train, val = write_file(tmp_path / "t.parquet", prompts()), write_file(tmp_path / "v.parquet", prompts(8)[::-1])
    held_out = ("--val", val, "--val-to", tmp_path / "v2.parquet")
    code, said = run(train, "--to", tmp_path / "t2.parquet", "--anchors", 3, *held_out, "--column", "topic")
    assert code == 0 and "held out" in said and "the train to" in said
    assert (
        pyarrow.parquet.read_table(tmp_path / "v2.parquet").column("topic").to_pylist()
        == [number % 3 for number in range(8)][::-1]
    )


def test_the_command_compares_with_a_model(tmp_path: Path) -> None:
    from verl_plugins.cpu.model import make_model, make_tokenizer

    for part in (make_model(), make_tokenizer()):
        part.save_pretrained(tmp_path / "model")
    file = write_file(tmp_path / "t.parquet", prompts())
    words = (
        file,
        "--to",
        tmp_path / "o.parquet",
        "--anchors",
        3,
        "--embedder",
        "folder",
        "--source",
        tmp_path / "model",
    )
    code, said = run(*words, "--compare", tmp_path / "model")
    assert code == 0
    assert float(said.rpartition(": ")[2]) > 0.9


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["in.parquet", "--to", "out.jsonl"], ["out.jsonl", ".parquet"]),
        (["in.parquet", "--to", "in.parquet"], ["is the file that is read"]),
        (["none.parquet", "--to", "o.parquet"], ["none.parquet: there is no such file"]),
        (["text.parquet", "--to", "o.parquet"], ["cannot be read as parquet", "data convert"]),
        (["bare.parquet", "--to", "o.parquet"], ["has no column 'prompt'"]),
        (["in.parquet", "--to", "o.parquet", "--column", "data_source"], ["'data_source' already", "--column"]),
        (["mute.parquet", "--to", "o.parquet"], ["row 2 of", "no text of a user's"]),
        (["in.parquet", "--to", "o.parquet", "--val", "in.parquet"], ["--val-to", "give both"]),
        (["in.parquet", "--to", "o.parquet", "--anchors", "31"], ["--anchors 31", "only 30 prompts differ"]),
        (["in.parquet", "--to", "o.parquet", "--embedder", "hash"], ["--embedder is 'hash'", "did you mean 'hashing'"]),
        (["in.parquet", "--to", "o.parquet", "--embedder", "folder"], ["embedder=folder needs a source"]),
        (["in.parquet", "--to", "o.parquet", "--long-text", "head"], ["--long-text is 'head'"]),
    ],
)
def test_what_cannot_be_done(words: list[str], parts: list[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_file(Path("in.parquet"), prompts())
    write_file(Path("mute.parquet"), ["a", " "])
    Path("text.parquet").write_text("no parquet")
    pyarrow.parquet.write_table(pyarrow.table({"question": ["a"]}), "bare.parquet")
    code, said = run(*words)
    assert code != 0
    for part in parts:
        assert part in said.replace("\n", " ")
    assert not Path("o.parquet").exists() and not list(Path().glob(".o.parquet*"))
