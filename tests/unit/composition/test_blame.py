"""Whose error it is reaches the terminal's sentence: plugin, stage, file and line, also from another process."""

from __future__ import annotations

import pickle
import traceback

import pytest
import torch
from ray.exceptions import RayTaskError

from verl_plugins import DataError, Plugin, hookimpl
from verl_plugins.batch import Batch
from verl_plugins.composition.blame import crossing, sentence, told, whose, words
from verl_plugins.composition.manager import Plugins
from verl_plugins.errors import PluginFailed
from verl_plugins.testing import FakeRun


class Unpicklable(Exception):
    """Cannot be made again from its message."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code}: {reason}")


class Frozen(Exception):
    """Takes no notes."""

    def __setattr__(self, name, value):
        if name == "__notes__":
            raise AttributeError(name)
        super().__setattr__(name, value)


def helper(error: Exception) -> None:
    raise error


class Raising(Plugin):
    """Raises what it is given, in a helper of its own module."""

    name = "raising"

    @hookimpl
    def observe(self, run, batch):
        helper(self.config)


HELPER = helper.__code__.co_firstlineno + 1
PLACE = f"plugin 'raising' in observe, {__file__}:{HELPER}"


def raised(error: Exception) -> Exception:
    """The error as it leaves the stage."""
    with pytest.raises(type(error)) as caught:
        Plugins([Raising(error)]).hook.observe(run=FakeRun(), batch=None)
    return caught.value


def over_ray(error: Exception) -> Exception:
    """The error as the driver gets it from a worker."""
    text = "".join(traceback.format_exception(error))
    task = RayTaskError("update_actor", text, error, proctitle="worker", pid=1, ip="127.0.0.1")
    return pickle.loads(pickle.dumps(task)).as_instanceof_cause()


class TestSentence:
    """One line with the words and the place."""

    @pytest.mark.parametrize(
        ("error", "said"),
        [
            (KeyError("sequence_weight"), f"KeyError: 'sequence_weight' ({PLACE})"),
            (DataError("no such column"), f"no such column ({PLACE})"),
            (ValueError("several\n  lines"), f"ValueError: several lines ({PLACE})"),
            (AssertionError(), f"AssertionError ({PLACE})"),
        ],
        ids=["KeyError", "DataError", "lines", "AssertionError"],
    )
    def test_here_and_from_a_worker(self, error: Exception, said: str) -> None:
        found = raised(error)
        assert sentence(found) == said
        assert sentence(over_ray(found)) == said

    def test_without_a_plugin(self) -> None:
        assert sentence(RuntimeError("CUDA\nis gone")) == "training stopped (RuntimeError: CUDA is gone)"
        assert sentence(over_ray(RuntimeError("CUDA is gone"))) == "training stopped (RuntimeError: CUDA is gone)"
        assert sentence(DataError("a row is missing")) == "a row is missing"

    def test_a_long_message_is_cut_and_says_so(self) -> None:
        assert len(words(ValueError("x" * 5000))) < 450
        assert words(ValueError("x" * 5000)).endswith("…")

    def test_what_takes_no_note_keeps_its_words(self) -> None:
        found = raised(Frozen("cold"))
        assert whose(found) is None
        assert sentence(found) == "training stopped (Frozen: cold)"

    def test_notes_that_ray_lost_are_found_in_its_traceback(self) -> None:
        found = raised(ValueError("x"))
        task = RayTaskError("f", "".join(traceback.format_exception(found)), ValueError("x"), "worker", 1, "127.0.0.1")
        assert told(task.as_instanceof_cause()) == f"ValueError: x ({PLACE})"


class TestCrossing:
    """Out of a worker go words, whatever the class."""

    @pytest.mark.parametrize("error", [Unpicklable(3, "gone"), KeyError("x"), torch.OutOfMemoryError("all of it")])
    def test_a_plugins_own_error(self, error: Exception) -> None:
        with pytest.raises(PluginFailed) as caught, crossing():
            raise raised(error)
        again = pickle.loads(pickle.dumps(caught.value))
        assert sentence(again) == f"{type(error).__name__}: {error} ({PLACE})"
        assert caught.value.__cause__ is error

    def test_one_of_ours_keeps_its_class(self) -> None:
        with pytest.raises(DataError) as caught, crossing():
            raise raised(DataError("no column"))
        assert sentence(over_ray(caught.value)) == f"no column ({PLACE})"

    def test_what_is_nobodys_passes(self) -> None:
        with pytest.raises(RuntimeError, match="engine"), crossing():
            raise RuntimeError("engine")

    def test_twice_is_once(self) -> None:
        with pytest.raises(PluginFailed) as caught, crossing(), crossing():
            raise raised(KeyError("x"))
        assert str(caught.value).count("raising") == 1


def test_a_built_in_method_is_blamed_where_it_is_written_and_not_in_the_batch() -> None:
    class Reads(Raising):
        name = "reads"

        @hookimpl
        def observe(self, run, batch):
            return batch.entropy

    batch = Batch.from_tensors(uid=["1-1-0"], response_mask=torch.ones(1, 2), rm_scores=torch.zeros(1, 2))
    with pytest.raises(DataError) as caught:
        Plugins([Reads(None)]).hook.observe(run=FakeRun(), batch=batch)
    assert f"{__file__}:{Reads.observe.__code__.co_firstlineno + 2}" in whose(caught.value)


def test_what_verl_does_for_a_stage_is_not_a_plugins_error() -> None:
    class Around(Plugin):
        name = "around"

        @hookimpl(wrapper=True)
        def observe(self):
            return (yield)

    plugins = Plugins([Around(None)])
    plugins.add_fallback(Raising(ValueError("inside")))
    with pytest.raises(ValueError) as caught:
        plugins.hook.observe(run=FakeRun(), batch=None)
    assert whose(caught.value).startswith("verl itself in observe")
