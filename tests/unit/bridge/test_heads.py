"""The stage `distillation_loss` in verl's own engine: which gradients reach which layers, on one rank and on two."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from heads_of_ranks import HEADS

from verl_plugins.bridge.heads import AFTER_THE_HEAD, refuse_what_follows_the_head
from verl_plugins.cpu.model import make_model, make_tokenizer
from verl_plugins.errors import DataError

SCRIPT = Path(__file__).with_name("heads_of_ranks.py")
HEAD, OURS = "lm_head.weight", ("lowrank", "full")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each rank of one and of two has seen, of an untied model."""
    folder = tmp_path_factory.mktemp("heads")
    for part in (make_model(), make_tokenizer()):
        part.save_pretrained(folder / "model")
    seen = {}
    for ranks in (1, 2):
        script = [sys.executable, SCRIPT, str(ranks), folder]
        done = subprocess.run(script, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        seen[ranks] = [torch.load(folder / f"heads_{ranks}_{rank}.pt", weights_only=True) for rank in range(ranks)]
    return seen


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], *, but: tuple[str, ...] = ()) -> None:
    for name in a.keys() - {*but}:
        assert float((a[name] - b[name]).norm()) <= 1e-4 * float(a[name].norm()) + 1e-6, name


def each(found: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [found[1][0], *found[2]]


def test_verls_own_distillation_trains_the_head(found) -> None:
    for one in each(found):
        assert one["verl"][HEAD].norm() > 0.01


@pytest.mark.parametrize("head", HEADS)
def test_the_head_gets_nothing_of_the_distillation_and_the_layers_below_all_of_it(found, head) -> None:
    for one in each(found):
        assert not one[head][HEAD].any()
        close(one["verl"], one[head], but=(HEAD,))


@pytest.mark.parametrize("head", HEADS)
def test_in_the_real_step_the_head_gets_the_reward_s_gradient_alone(found, head) -> None:
    for one in each(found):
        assert float((one["verl_both"][HEAD] - one["reward"][HEAD]).norm()) > 0.01
        close({HEAD: one["reward"][HEAD]}, one[f"{head}_both"])
        close(one["verl_both"], one[f"{head}_both"], but=(HEAD,))


@pytest.mark.parametrize("head", HEADS)
def test_packed_rows_and_two_ranks_make_no_difference(found, head) -> None:
    (alone,) = found[1]
    for one in each(found):
        close(alone[head], one[f"{head}_packed"])
        close(alone[f"{head}_both"], one[f"{head}_both"])


@pytest.mark.parametrize("head", OURS)
def test_an_auxiliary_head_is_trained_alike_on_every_rank_and_is_no_part_of_the_model(found, head) -> None:
    (alone,), (first, second) = found[1], found[2]
    state = f"{head}_state"
    assert first[state].keys() == second[state].keys() == alone[state].keys()
    for name, value in first[state].items():
        assert torch.equal(value, second[state][name]), name
        if "." not in name:
            assert float((value - alone[state][name]).norm()) < 0.1 * float(value.norm()), name
    assert all(value == 2 for name, value in first[state].items() if name.endswith(".step"))
    start = make_model().state_dict()
    for one in each(found):
        assert set(one[f"{head}_sent"]) == set(one[f"{head}_kept"]) == start.keys()
        assert one[f"{head}_metrics"]["plugins/dhkd/head_vs_aux_kl"] > 0


def test_the_second_pass_gives_the_distillation_s_gradient_and_leaves_the_others(found) -> None:
    for one in each(found):
        assert one["gradients_stay"]
    (alone,) = found[1]
    close(alone["detached"], alone["second_pass"])
    signs = {one["aligned_metrics"]["plugins/dhkd/grad_dot_sign"] for one in each(found)}
    assert len(signs) == 1 and signs <= {-1.0, 1.0}


@pytest.mark.parametrize("name", AFTER_THE_HEAD)
def test_a_model_that_bends_its_logits_behind_the_head(name, sentence) -> None:
    def config(value: Any) -> Any:
        text = SimpleNamespace(**{name: value})
        return SimpleNamespace(get_text_config=lambda: text)

    refuse_what_follows_the_head(config(None))
    with pytest.raises(DataError) as error:
        refuse_what_follows_the_head(config(30.0))
    sentence(error.value, "actor_rollout_ref.model.path", f"{name}=30.0")
