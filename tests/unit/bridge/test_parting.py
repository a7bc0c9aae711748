"""Gradients in parts, and gaps between the two likeliest tokens, in verl's own engine, on one rank and on two."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_of_ranks import TEMPERATURE, rows
from parts_of_ranks import VALUES

from verl_plugins import DataError
from verl_plugins.bridge import parting
from verl_plugins.bridge.gap import ahead, tell_gaps
from verl_plugins.bridge.joined import JoinedMetrics
from verl_plugins.bridge.loss import PluginLoss
from verl_plugins.cpu.model import make_model, make_tokenizer

SCRIPT = Path(__file__).with_name("parts_of_ranks.py")
each_ranks = pytest.mark.parametrize("ranks", [1, 2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, and what one rank and two have found."""
    folder = tmp_path_factory.mktemp("parts")
    for part in (make_model(), make_tokenizer()):
        part.save_pretrained(folder / "model")
    for ranks in ("1", "2"):
        done = subprocess.run([sys.executable, SCRIPT, ranks, folder], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def of_ranks(folder: Path, ranks: int) -> list[dict[str, Any]]:
    return [torch.load(folder / f"parts_{ranks}_{rank}.pt", weights_only=True) for rank in range(ranks)]


@each_ranks
def test_every_value_of_any_rank_has_a_part(folder: Path, ranks: int) -> None:
    for found in of_ranks(folder, ranks):
        assert list(found["parts"]) == sorted(set(VALUES) - {0.0})


@each_ranks
def test_the_parts_add_up_to_the_gradient_that_is_there(folder: Path, ranks: int) -> None:
    for found in of_ranks(folder, ranks):
        for whole, *parts in zip(found["whole"], *found["parts"].values(), strict=True):
            torch.testing.assert_close(sum(parts), whole, rtol=1e-4, atol=1e-6)
        for parts in found["parts"].values():
            assert any(part.any() for part in parts)


def test_parts_on_two_ranks_are_those_of_one(folder: Path) -> None:
    (one,), two = of_ranks(folder, 1), of_ranks(folder, 2)
    for value, parts in one["parts"].items():
        for place, part in enumerate(parts):
            whole = torch.cat([found["parts"][value][place] for found in two])
            torch.testing.assert_close(whole, part, rtol=1e-3, atol=1e-5)


@each_ranks
def test_nothing_is_left_of_it(folder: Path, ranks: int) -> None:
    for found in of_ranks(folder, ranks):
        assert found["same"] and found["kept"] and found["drawn"] and found["of one"]


@each_ranks
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_gaps_are_those_of_the_models_log_probs(folder: Path, ranks: int, layout: str) -> None:
    found = [row for one in of_ranks(folder, ranks) for row in one[layout]]
    model = make_model().eval()
    for (prompt, response, _), row in zip(rows(), found, strict=True):
        with torch.no_grad():
            logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        first, second = logits.log_softmax(-1).topk(2).values.unbind(-1)
        torch.testing.assert_close(row[: len(response)], first - second, atol=1e-4, rtol=0)
        assert not row[len(response) :].any()


def test_equal_logits_are_no_distance_apart() -> None:
    assert ahead(torch.tensor([[2.0, 2.0, -1.0], [0.0, -3.0, -1.0]])).tolist() == [0, 1]


def test_logits_are_read_before_verl_scales_them_in_place() -> None:
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu

    from verl_plugins.bridge.gap import NAME, WANTED

    def scaling(output: Any, output_args: Any, *_: Any) -> dict[str, Any]:
        output.logits.mul_(100)
        return {}

    engine = SimpleNamespace(prepare_model_outputs=scaling)
    tell_gaps(engine)
    ids = torch.nested.as_nested_tensor([torch.tensor([1, 2]), torch.tensor([3])], layout=torch.jagged)
    batch = TensorDict({"input_ids": ids}, batch_size=2)
    tu.assign_non_tensor(batch, **{WANTED: True})
    logits = torch.tensor([[[1.0, 3.0, 0.0], [5.0, 4.0, 0.0]], [[0.0, 0.0, 8.0], [0.0, 0.0, 0.0]]])
    temperature = {"temperature": torch.tensor([2.0, 4.0])}
    found = engine.prepare_model_outputs(SimpleNamespace(logits=logits), temperature, batch, None)
    assert found[NAME].values().tolist() == [1, 0.5, 2]


def test_a_field_that_was_not_put_is_named(sentence) -> None:
    with pytest.raises(DataError) as error:
        parting.gradients(None, {}, None, "role_number", [])
    sentence(error.value, "'role_number'", "batch.put in observe")


def test_losses_computed_once_more_leave_no_trace() -> None:
    loss = object.__new__(PluginLoss)
    loss._metrics, loss.micro_batch = metrics, _ = JoinedMetrics(), 3
    with pytest.raises(ZeroDivisionError), loss.aside():
        assert loss.micro_batch == 0
        loss._metrics.add("told", 1.0, "mean")
        loss.micro_batch = 2
        raise ZeroDivisionError
    assert (loss._metrics, loss.micro_batch) == (metrics, 3)
    assert metrics.leave() == {}
