"""`actor.logits` in verl's own engine: those of plain Transformers, at any parameters, on any number of ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_of_ranks import FEW, TEMPERATURE, rows

from verl_plugins.bridge.moving import moved
from verl_plugins.cpu.model import make_model, make_tokenizer

SCRIPT = Path(__file__).with_name("engine_of_ranks.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, and what one rank and two have seen."""
    folder = tmp_path_factory.mktemp("engine")
    for part in (make_model(), make_tokenizer()):
        part.save_pretrained(folder / "model")
    for ranks in ("1", "2"):
        done = subprocess.run([sys.executable, SCRIPT, ranks, folder], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def of_ranks(folder: Path, ranks: int) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{ranks}_{rank}.pt", weights_only=True) for rank in range(ranks)]


def together(found: list[dict[str, Any]], name: str) -> torch.Tensor:
    """Rows of all ranks in an order of their own."""
    values = torch.cat([one[name] for one in found])
    return values[values[:, 0].argsort()]


def plain(factor: float = 1.0) -> torch.Tensor:
    """The same from the model itself, a row at a time."""
    model, found = make_model().eval(), []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
        for prompt, response, mask in rows():
            logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
            found.append(logits[mask.bool()] / TEMPERATURE)
    values = torch.cat(found)
    return values[values[:, 0].argsort()]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("name", "factor"), [("here", 1.0), ("packed", 1.0), ("moved", 1.1), ("again", 1.0)])
def test_logits_of_generated_tokens(folder: Path, ranks: int, name: str, factor: float) -> None:
    torch.testing.assert_close(together(of_ranks(folder, ranks), name), plain(factor), atol=1e-4, rtol=0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_nothing_is_left_of_the_visit(folder: Path, ranks: int) -> None:
    for found in of_ranks(folder, ranks):
        assert found["raised"] and found["kept"] and found["training"] and found["own method"]
        for name in ("again", "after an error"):
            assert torch.equal(found[name], found["here"])


def test_ranks_share_what_is_asked_for_and_tell_each_other(folder: Path) -> None:
    (one,), two = of_ranks(folder, 1), of_ranks(folder, 2)
    assert len(one["few"]) == FEW and [len(found["few"]) for found in two] == [FEW // 2] * 2
    whole = {tuple(row) for row in one["here"].tolist()}
    assert {tuple(row) for row in one["few"].tolist()} < whole
    assert one["gathered"].tolist() == [0]
    assert [found["gathered"].tolist() for found in two] == [[0, 0, 1]] * 2


def test_a_step_is_measured_and_shortened_on_two_ranks_as_on_one(folder: Path) -> None:
    (one,), two = of_ranks(folder, 1), of_ranks(folder, 2)
    assert one["metrics"]["capped"] == 1 and one["metrics"]["r_applied"] == pytest.approx(1)
    start = make_model().parameters()
    steps = [after - before.detach() for after, before in zip(one["parameters"], start, strict=True)]
    length = float(torch.cat([part.flatten() for part in steps]).norm())
    assert length == pytest.approx(one["metrics"]["scale"] * one["metrics"]["update_norm"], rel=1e-3)
    for found in two:
        for name, value in one["metrics"].items():
            assert found["metrics"][name] == pytest.approx(value, rel=1e-3), name
        # Not entry by entry: of a gradient that is nothing but rounding, Adam makes a whole step.
        apart = [a - b for a, b in zip(one["parameters"], found["parameters"], strict=True)]
        assert float(torch.cat([part.flatten() for part in apart]).norm()) < 0.1 * length


class TestMoved:
    def test_back_to_the_last_bit_whatever_happens(self) -> None:
        parameters = [torch.tensor([0.1, 1e8]), torch.tensor([[3.0]])]
        before = [one.clone() for one in parameters]
        with pytest.raises(ZeroDivisionError), moved(parameters, (one + 1 / 3 for one in before)):
            assert parameters[1].item() == pytest.approx(3.333, abs=1e-3)
            raise ZeroDivisionError
        assert all(map(torch.equal, parameters, before))

    def test_as_many_values_as_parameters(self) -> None:
        parameters = [torch.ones(1), torch.ones(1)]
        with pytest.raises(ValueError), moved(parameters, [torch.zeros(1)]):
            pass
        assert parameters[0].item() == 1

    def test_nowhere_else(self) -> None:
        parameter = torch.ones(1)
        with moved([parameter], None):
            parameter.add_(1)
        assert parameter.item() == 2
