"""Plugin state in a checkpoint folder: what goes in comes out, and what belongs to another run is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from verl_plugins import Plugin, StateError
from verl_plugins.bridge import checkpoint

STATES = {
    "driver": {
        "memory": {
            "float32": torch.tensor([0.1, float("nan"), -0.0]),
            "half": torch.tensor([1.5], dtype=torch.bfloat16),
            "flags": torch.tensor([[True, False]]),
            "transposed": torch.arange(6).reshape(2, 3).T,
            "empty": torch.zeros(0, 3),
            "float64": np.array([1 / 3, np.inf]),
            "int64": np.arange(4).reshape(2, 2)[:, ::-1],
            "count": 3,
            "share": 0.1 + 0.2,
            "names": ["é", "b"],
            "nested": {"x": [1, None, {"y": True}]},
        },
        "without": {},
    },
    "actor": {"memory": {"float32": torch.tensor([7.0])}},
}


def plugin(name: str, version: str = "1") -> Plugin:
    return type(name.title(), (Plugin,), {"name": name, "version": version})(None)


PLUGINS = [plugin("memory"), plugin("without")]


def save(folder: Path, states: Any = STATES, **changes: Any) -> None:
    given = {"step": 2, "fingerprint": "abc", "plugins": PLUGINS, **changes}
    checkpoint.save(folder, given["step"], given["fingerprint"], given["plugins"], states)


def load(folder: Path, **changes: Any) -> Any:
    given = {"step": 2, "fingerprint": "abc", "plugins": PLUGINS, **changes}
    return checkpoint.load(folder, given["step"], given["fingerprint"], given["plugins"])


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.dtype == other.dtype and np.array_equal(one, other)
    return type(one) is type(other) and one == other


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.uint8)


class TestRoundTrip:
    """Tensors, numpy arrays and JSON come back with type, shape and every bit; processes keep apart."""

    def test_every_kind(self, tmp_path: Path) -> None:
        save(tmp_path)
        loaded = load(tmp_path)
        before, after = STATES["driver"]["memory"], loaded["driver"]["memory"]
        assert before.keys() == after.keys()
        assert [name for name in before if not same(before[name], after[name])] == []
        assert "without" not in loaded["driver"]
        assert loaded["actor"]["memory"]["float32"].tolist() == [7.0]

    def test_no_state_at_all(self, tmp_path: Path) -> None:
        save(tmp_path, {"driver": {}, "actor": {}})
        assert load(tmp_path) == {"driver": {}, "actor": {}}

    def test_nothing_is_pickled(self, tmp_path: Path) -> None:
        save(tmp_path)
        assert sorted(file.name for file in (tmp_path / "plugins").iterdir()) == ["arrays.safetensors", "state.json"]
        assert json.loads((tmp_path / "plugins/state.json").read_text())["versions"] == {"memory": "1", "without": "1"}

    @pytest.mark.parametrize("value", [object(), {1: "key is not text"}, (1, 2), [torch.zeros(1)], {"set"}])
    def test_what_would_come_back_changed_is_refused(self, tmp_path: Path, value: Any, sentence) -> None:
        with pytest.raises(StateError) as error:
            save(tmp_path, {"driver": {"memory": {"what": value}}})
        sentence(error.value, "driver/memory/what", type(value).__name__)
        assert not (tmp_path / "plugins").exists()


class TestAtomic:
    """A kill while saving leaves the old state or the new one."""

    def test_a_half_written_folder_is_ignored_and_replaced(self, tmp_path: Path) -> None:
        (tmp_path / ".plugins.123").mkdir()
        (tmp_path / ".plugins.123/state.json").write_text("{")
        with pytest.raises(StateError):
            load(tmp_path)
        save(tmp_path)
        assert load(tmp_path)["driver"]["memory"]["count"] == 3

    def test_saving_again_replaces(self, tmp_path: Path) -> None:
        save(tmp_path)
        save(tmp_path, {"driver": {"memory": {"count": 4}}})
        assert load(tmp_path) == {"driver": {"memory": {"count": 4}}}

    def test_a_save_that_fails_leaves_the_old_state(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        save(tmp_path)

        def full(*_: Any, **__: Any) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(checkpoint, "save_file", full)
        with pytest.raises(OSError, match="disk full"):
            save(tmp_path, {"driver": {"memory": {"count": 4}}})
        assert load(tmp_path)["driver"]["memory"]["count"] == 3


class TestRefusal:
    """State of another run ends in one sentence that says what differs and what to do."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        save(tmp_path)
        return tmp_path

    @pytest.mark.parametrize(
        ("changes", "parts"),
        [
            ({"fingerprint": "xyz"}, ["another training dataset", "abc", "xyz", "data.train_files", "--out"]),
            ({"plugins": PLUGINS[:1]}, ["memory, without", "this run has memory", "same recipe"]),
            ({"plugins": [*PLUGINS, plugin("more")]}, ["this run has memory, more, without"]),
            ({"plugins": []}, ["this run has none"]),
            ({"plugins": [plugin("memory", "2"), PLUGINS[1]]}, ["plugin memory version 1", "version 2"]),
            ({"step": 3}, ["state of step 2", "checkpoint of step 3"]),
        ],
        ids=["dataset", "fewer plugins", "more plugins", "no plugins", "version", "step"],
    )
    def test_another_run(self, folder: Path, changes: dict, parts: list[str], sentence) -> None:
        with pytest.raises(StateError) as error:
            load(folder, **changes)
        sentence(error.value, str(folder), *parts)

    def test_a_checkpoint_of_plain_verl(self, tmp_path: Path, sentence) -> None:
        with pytest.raises(StateError) as error:
            load(tmp_path)
        sentence(error.value, "has no plugin state", "plain verl")

    def test_a_later_format(self, folder: Path, sentence) -> None:
        file = folder / "plugins/state.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "format": 2}))
        with pytest.raises(StateError) as error:
            load(folder)
        sentence(error.value, "state format 2", "reads 1")


class TestOpenWhole:
    """A file is replaced in one piece."""

    def test_readers_see_the_old_content_until_the_new_is_complete(self, tmp_path: Path) -> None:
        marker = tmp_path / "latest"
        marker.write_text("2")
        with checkpoint.open_whole(marker, "w") as file:
            file.write("4")
            file.flush()
            assert marker.read_text() == "2"
        assert marker.read_text() == "4"
        assert [path.name for path in tmp_path.iterdir()] == ["latest"]

    def test_a_writer_that_fails_leaves_the_old_content(self, tmp_path: Path) -> None:
        marker = tmp_path / "latest"
        marker.write_text("2")
        with pytest.raises(RuntimeError), checkpoint.open_whole(marker, "w") as file:
            file.write("4")
            raise RuntimeError
        assert marker.read_text() == "2"

    def test_reading_is_plain_open(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"1")
        with checkpoint.open_whole(tmp_path / "file", "rb") as file:
            assert file.read() == b"1"


class TestTried:
    """Before the first step: what could not be saved is found then."""

    @pytest.mark.parametrize(
        ("value", "parts"),
        [
            ({1, 2}, ("set", "neither as an array nor as JSON")),
            ((1, 2), ("[1, 2]", "lists in place of tuples")),
            ({3: "a"}, ("texts as keys",)),
            ([float("nan")], ("no NaN inside",)),
            (np.array(["a", None], dtype=object), ("ndarray of object",)),
            (torch.eye(2).to_sparse(), ("Tensor of torch.float32", "sparse")),
            (object(), ("object", "neither")),
        ],
    )
    def test_what_cannot_be_saved_is_named(self, value, parts, sentence) -> None:
        with pytest.raises(StateError) as error:
            checkpoint.try_saving({"driver": {"mine": {"good": 1, "bad": value}}, "actor": {}})
        sentence(error.value, "state driver/mine/bad", *parts)

    def test_a_state_that_is_no_dict(self, sentence) -> None:
        with pytest.raises(StateError) as error:
            checkpoint.try_saving({"driver": {}, "actor": {"mine": [1]}})
        sentence(error.value, "state actor/mine", "list", "must give a dict")

    def test_what_can_be_saved_passes(self) -> None:
        shared = torch.arange(6.0)
        state = {"a": shared, "b": shared[2:], "c": np.arange(3)[::-1], "d": float("nan"), "e": {"f": [1, None, "x"]}}
        checkpoint.try_saving({"driver": {"mine": state, "none": {}}, "actor": {}})

    def test_tensors_that_share_memory_come_back(self, tmp_path) -> None:
        shared = torch.arange(6.0)
        states = {"driver": {"mine": {"a": shared, "b": shared[2:]}}, "actor": {}}
        save(tmp_path, states)
        assert (tmp_path / "plugins" / "arrays.safetensors").is_file()
