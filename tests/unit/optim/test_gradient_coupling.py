"""How gradients of roles lie: by hand, whatever their scale, and which parameters and steps are looked at."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from verl_plugins import Batch, CompositionError, DataError
from verl_plugins.composition.compose import changeable, verl_config
from verl_plugins.optim.gradient_coupling import FIELD, MOST_ROLES, GradientCoupling, coupling, products
from verl_plugins.testing import FakeRun


def of(*rows: list[float]):
    return coupling(products([torch.tensor(row) for row in rows]))


def test_two_at_a_right_angle_and_one_against() -> None:
    found = of([2.0, 0.0], [0.0, 1.0], [-1.0, 0.0])
    assert found.cosine.tolist() == [[1, 0, -1], [0, 1, 0], [-1, 0, 1]]
    assert found.mean_cosine == pytest.approx(-1 / 3)
    assert found.conflict_fraction == pytest.approx(1 / 3)
    assert found.coherence == pytest.approx(math.sqrt(2) / 4)


def test_of_one_direction_is_full_coherence_and_against_each_other_none() -> None:
    assert of([1.0, 1.0], [2.0, 2.0])[1:] == pytest.approx((1, 0, 1))
    assert of([1.0, 1.0], [-1.0, -1.0])[1:] == pytest.approx((-1, 1, 0), abs=1e-7)


def test_a_gradient_of_zeros_has_no_direction() -> None:
    found = of([0.0, 0.0], [3.0, 4.0])
    assert found.cosine.tolist() == [[0, 0], [0, 1]]
    assert (found.mean_cosine, found.conflict_fraction, found.coherence) == (0, 0, 1)
    assert of([0.0, 0.0], [0.0, 0.0])[1:] == (0, 0, None)


def test_tiny_gradients_are_told_apart() -> None:
    assert of([1e-30, 0.0], [-1e-30, 0.0]).mean_cosine == pytest.approx(-1)


def test_one_role_has_nothing_to_be_compared_with() -> None:
    assert of([1.0, 2.0])[1:3] == (None, None)


class Actor:
    """A model with two blocks, and gradients in parts."""

    def __init__(self, *values: float, step: int = 1, mini_batch: int = 0, adapters: bool = False) -> None:
        self.module = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(2)])})
        if adapters:
            self.module["lora_A"] = torch.nn.Linear(2, 2, bias=False)
        self.step, self.mini_batch, self.values, self.logged = step, mini_batch, values, {}
        self.asked = None

    def gradients(self, name, parameters):
        self.asked = name, parameters
        return {value: [value * torch.ones_like(one) for one in parameters] for value in self.values}

    def log(self, metrics) -> None:
        self.logged |= metrics


def stepped(actor: Actor, **config: object) -> dict[str, float]:
    step = GradientCoupling(GradientCoupling.Config(**config)).optimizer_step(actor)
    next(step)
    with pytest.raises(StopIteration) as ended:
        step.send(0.5)
    assert ended.value.value == 0.5
    return actor.logged


def test_parts_are_joined_over_parameters() -> None:
    assert stepped(Actor(1.0, -2.0)) == pytest.approx(
        {"roles": 2, "mean_cosine": -1, "conflict_fraction": 1, "coherence": 1 / 3}
    )
    assert stepped(Actor(3.0)) == {"roles": 1}
    assert stepped(Actor()) == {"roles": 0}


@pytest.mark.parametrize(("step", "mini_batch", "measured"), [(1, 0, 1), (1, 1, 0), (2, 0, 0), (4, 0, 1), (7, 0, 1)])
def test_the_first_mini_batch_of_every_so_many_steps(step: int, mini_batch: int, measured: bool) -> None:
    actor = Actor(1.0, 2.0, step=step, mini_batch=mini_batch)
    assert bool(stepped(actor, every=3)) == measured == (actor.asked is not None)


@pytest.mark.parametrize(
    ("config", "adapters", "count"),
    [({}, False, 2), ({}, True, 1), ({"parameters": "last_block"}, True, 2), ({"parameters": "all"}, True, 5)],
)
def test_which_parameters(config: dict, adapters: bool, count: int) -> None:
    actor = Actor(1.0, 2.0, adapters=adapters)
    stepped(actor, **config)
    name, parameters = actor.asked
    assert name == FIELD and len(parameters) == count
    if count == 2:
        assert parameters[0] is actor.module["layers"][1].weight


def test_parameters_that_are_not_trained_are_left_out() -> None:
    actor = Actor(1.0, 2.0)
    actor.module["layers"][1].weight.requires_grad_(False)
    stepped(actor)
    assert len(actor.asked[1]) == 1


def test_a_model_without_numbered_blocks_is_taken_whole() -> None:
    plugin = GradientCoupling(GradientCoupling.Config())
    weights = {"lm_head.weight": torch.nn.Parameter(torch.ones(1)), "embed": torch.nn.Parameter(torch.ones(1))}
    assert plugin.chosen(weights) == weights


def batch(roles: list[str]) -> Batch:
    rows = len(roles)
    return Batch.from_tensors(
        uid=["1-1-0"] * rows, role=roles, response_mask=torch.ones(rows, 1), rm_scores=torch.zeros(rows, 1)
    )


def test_roles_are_numbered_by_their_names() -> None:
    found = batch(["solver", "planner", "solver", "critic"])
    GradientCoupling(GradientCoupling.Config()).observe(FakeRun(), found)
    assert found.written[FIELD].tolist() == [3, 2, 3, 1]


def test_steps_that_are_not_measured_send_nothing() -> None:
    found = batch(["a", "b"])
    GradientCoupling(GradientCoupling.Config(every=2)).observe(FakeRun(step=2), found)
    assert found.written == {}


def test_too_many_roles_are_refused(sentence) -> None:
    with pytest.raises(DataError) as error:
        GradientCoupling(GradientCoupling.Config()).observe(FakeRun(), batch([str(k) for k in range(MOST_ROLES + 1)]))
    sentence(error.value, "plugins.gradient_coupling.role", "17", "16")


def test_other_engines_are_refused(sentence) -> None:
    config = changeable(verl_config())
    config.actor_rollout_ref.actor.strategy = "fsdp"
    with pytest.raises(CompositionError) as error:
        GradientCoupling(GradientCoupling.Config()).check(config)
    sentence(error.value, "actor_rollout_ref.actor.strategy is 'fsdp'", "fsdp2")


def test_gradients_split_over_ranks_are_added_up(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums, group: calls.append(group) or sums.mul_(2))
    actor = Actor(1.0, 2.0)
    split = SimpleNamespace(get_group=lambda dim: f"ranks {dim}")
    weight = actor.module["layers"][1].weight
    weight.placements, weight.device_mesh = [SimpleNamespace(is_shard=lambda: True)], split
    assert stepped(actor)["mean_cosine"] == pytest.approx(1)
    assert calls == ["ranks 0"]
