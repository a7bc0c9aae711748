"""EPO: turns, their history and the gate on the driver; what leaves the band in the loss."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from fakes import FakeRun
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from verl_plugins import Batch, CompositionError, DataError, Tokens
from verl_plugins.bridge.defaults import ActorDefaults, clipped_loss
from verl_plugins.composition import needs
from verl_plugins.composition.compose import compose
from verl_plugins.composition.manager import Plugins
from verl_plugins.entropy.epo import (
    GATE,
    REFERENCE,
    Epo,
    History,
    for_the_loss,
    left_padded,
    outside,
    outside_by,
    phase_weight,
    turn_index,
    turn_means,
)

FEW = settings(max_examples=30, deadline=None)
SEEDS = st.integers(0, 10_000)
FORMS = st.sampled_from(["hinge", "indicator", "mask_pg"])
BAND = {"min_ratio": 0.8, "max_ratio": 1.2}
CONFIG = {
    "clip_ratio": 0.2,
    "clip_ratio_low": 0.2,
    "clip_ratio_high": 0.28,
    "clip_ratio_c": 3.0,
    "entropy_coeff": 0.01,
}


def method(**options) -> Epo:
    return Epo(Epo.Config(**options))


def run_of(turns: int | None = None, step: int = 1) -> FakeRun:
    multi_turn = {"enable": turns is not None, "max_assistant_turns": turns}
    return FakeRun(config=OmegaConf.create({"actor_rollout_ref": {"rollout": {"multi_turn": multi_turn}}}), step=step)


def batch(mask: list[list[int]], entropy: list[list[float]], **fields) -> Batch:
    entropy = torch.tensor(entropy)
    return Batch.from_tensors(
        **{"uid": [f"{row}-1-0" for row in range(len(mask))]} | fields,
        response_mask=torch.tensor(mask),
        rm_scores=torch.zeros_like(entropy),
        entropy=entropy,
    )


def fields(seed=0, rows=6, length=12) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(rows, length, generator=rng, dtype=torch.float64)
    mask = torch.arange(length)[None] < torch.randint(1, length + 1, (rows, 1), generator=rng)
    mask[:, 3] &= torch.rand(rows, generator=rng) > 0.3  # tool tokens
    reference = torch.rand(rows, length, generator=rng, dtype=torch.float64) * mask
    reference[0, 0] = 0.0  # a turn without a history
    return {
        "log_probs": old + 0.2 * torch.randn(rows, length, generator=rng, dtype=torch.float64),
        "old_log_probs": old,
        "advantages": torch.randn(rows, 1, generator=rng, dtype=torch.float64) * mask,
        "response_mask": mask,
        "entropy": torch.rand(rows, length, generator=rng, dtype=torch.float64),
        REFERENCE: reference,
        GATE: 0.5 * (torch.rand(rows, generator=rng, dtype=torch.float64) < 0.5),
    }


def tokens_of(given: dict, logged=None) -> Tokens:
    given, logged = dict(given), {} if logged is None else logged
    extra = {name: given.pop(name) for name in (REFERENCE, GATE)}
    for name in ("log_probs", "entropy"):
        given[name] = given[name].detach().clone().requires_grad_()
    return Tokens(
        config=SimpleNamespace(**CONFIG, get=CONFIG.get),
        log=lambda owner, metrics, reduce: logged.update(metrics),
        extra=extra.__getitem__,
        **given,
    )


def term_of(plugin: Epo, tokens: Tokens) -> torch.Tensor:
    return plugin.loss_terms(tokens)["epo_smooth"]


def losses_of(plugin: Epo, tokens: Tokens) -> torch.Tensor:
    """Everything the plugin adds or changes, per token."""
    plugins = Plugins([plugin])
    plugins.add_fallback(ActorDefaults(lambda: 0.0))
    total = plugins.hook.policy_loss(tokens=tokens)
    for terms in plugins.hook.loss_terms(tokens=tokens):
        total = total + sum(terms.values())
    return total


class TestTurns:
    """Runs of generated tokens count up; the outputs of one session are turns too."""

    def test_index(self):
        mask = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1], [0, 1, 1, 1, 1, 0, 0, 0], [1, 0, 1, 0, 0, 0, 0, 0]]).bool()
        found = turn_index(mask, torch.tensor([0, 1, 2]), torch.zeros(3, dtype=torch.int64))
        assert found[mask].tolist() == [0, 0, 1, 2, 2, 0, 0, 0, 0, 0, 1]

    def test_outputs_of_a_session_count_on(self):
        """In any order of the rows; an output without generated tokens counts as a turn."""
        mask = torch.tensor([[1, 0], [1, 1], [1, 1], [0, 0], [1, 0]]).bool()
        mask = torch.nn.functional.pad(mask, (0, 2))
        mask[1, 3] = True  # two turns
        session, output = torch.tensor([4, 4, 0, 4, 4]), torch.tensor([3, 0, 0, 1, 2])
        found = turn_index(mask, session, output)
        assert [sorted(set(row[inside].tolist())) for row, inside in zip(found, mask, strict=True)] == [
            [4],
            [0, 1],
            [0],
            [],
            [3],
        ]

    @FEW
    @given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.randoms())
    def test_outputs_of_one_turn_have_their_numbers(self, sizes, random):
        rows = [(session, output) for session, size in enumerate(sizes) for output in range(size)]
        random.shuffle(rows)
        session, output = torch.tensor(rows).T
        assert torch.equal(turn_index(torch.ones(len(rows), 2).bool(), session, output)[:, 0], output)

    def test_single_turn_rows_have_turn_0(self):
        mask = torch.arange(5)[None] < torch.tensor([[5], [2]])
        assert (turn_index(mask, torch.arange(2), torch.zeros(2, dtype=torch.int64)) == 0).all()

    @FEW
    @given(SEEDS)
    def test_means_are_over_the_tokens_of_each_turn(self, seed):
        rng = torch.Generator().manual_seed(seed)
        mask = torch.rand(5, 9, generator=rng) < 0.7
        mask[0, 0] = True
        entropy, session = torch.rand(5, 9, generator=rng), torch.tensor([0, 0, 0, 1, 2])
        turns = turn_index(mask, session, torch.tensor([0, 1, 2, 0, 0]))
        found = turn_means(entropy, mask, turns)
        for turn in range(int(turns[mask].max()) + 1):
            tokens = entropy[mask & (turns == turn)]
            assert float(found[turn]) == pytest.approx(float(tokens.double().mean()), nan_ok=True)

    def test_the_published_form_pads_on_the_left_or_keeps_the_last(self):
        means = torch.tensor([0.1, 0.2, 0.3])
        assert left_padded(means, 5).tolist() == pytest.approx([0, 0, 0.1, 0.2, 0.3])
        assert left_padded(means, 2).tolist() == pytest.approx([0.2, 0.3])


class TestHistory:
    """Per turn, the mean over the steps that reached it."""

    @FEW
    @given(st.lists(st.lists(st.one_of(st.floats(0.01, 5), st.just(math.nan)), max_size=5), min_size=1, max_size=6))
    def test_is_the_mean_over_the_steps_that_reached_the_turn(self, steps):
        history = History()
        for step in steps:
            history.add(torch.tensor(step, dtype=torch.float64))
        for turn, found in enumerate(history.means().tolist()):
            reached = [step[turn] for step in steps if turn < len(step) and not math.isnan(step[turn])]
            assert found == pytest.approx(sum(reached) / len(reached) if reached else 0)

    def test_the_driver_sends_each_token_the_mean_of_its_turn(self):
        plugin, run = method(gate_turn=1), run_of()
        first = batch([[1, 1, 0, 1]], [[0.2, 0.4, 9.0, 1.0]])
        second = batch([[1, 0, 1, 0, 1], [1, 1, 0, 0, 0]], [[0.5, 9.0, 2.0, 9.0, 3.0], [0.7, 0.9, 9.0, 9.0, 9.0]])
        plugin.observe(run, first)
        torch.testing.assert_close(first.written[REFERENCE], torch.tensor([[0.3, 0.3, 0.0, 1.0]]))
        plugin.observe(run, second)
        expected = torch.tensor([[0.5, 0.0, 1.5, 0.0, 3.0], [0.5, 0.5, 0.0, 0.0, 0.0]])
        torch.testing.assert_close(second.written[REFERENCE], expected)
        assert second.written[GATE].tolist() == [1, 0]
        assert run.metrics["entropy/turn_0"] == pytest.approx(0.7)
        assert run.metrics["history/turn_0"] == pytest.approx(0.5)
        assert run.metrics["history/turn_2"] == pytest.approx(3.0)
        assert run.metrics["rows_at_gate"] == 0.5

    def test_the_authors_alignment(self):
        plugin, run = method(history="left_padded", gate_turn=0), run_of(turns=4)
        plugin.observe(run, batch([[1, 0, 1, 0, 1, 0, 1]], [[0.9, 9, 0.8, 9, 0.7, 9, 0.6]]))
        short = batch([[1, 0, 1]], [[0.5, 9, 0.4]])
        plugin.observe(run, short)
        torch.testing.assert_close(short.written[REFERENCE], torch.tensor([[0.45, 0.0, 0.4]]))

    def test_the_authors_have_0_for_a_turn_without_tokens(self):
        plugin, run = method(history="left_padded", gate_turn=0), run_of(turns=3)
        outputs = {"uid": ["0-1-0"] * 3, "session": [0, 0, 0], "turn": [0, 1, 2]}
        plugin.observe(run, batch([[1, 1], [0, 0], [1, 1]], [[0.5] * 2] * 3, **outputs))
        assert [run.metrics[f"history/turn_{turn}"] for turn in range(3)] == [0.5, 0, 0.5]

    def test_outputs_of_a_session_are_its_turns(self):
        plugin, run = method(gate_turn=1), run_of()
        given = Batch.from_tensors(
            uid=["1-1-0"] * 2,
            session=[0, 0],
            turn=[0, 1],
            response_mask=torch.ones(2, 2),
            rm_scores=torch.zeros(2, 2),
            entropy=torch.tensor([[0.2, 0.4], [1.0, 2.0]]),
        )
        plugin.observe(run, given)
        torch.testing.assert_close(given.written[REFERENCE], torch.tensor([[0.3, 0.3], [1.5, 1.5]]))
        assert given.written[GATE].tolist() == [0, 1]

    def test_survives_a_restart(self):
        steps = [batch([[1, 1, 0, 1]], [[0.2 * n, 0.4, 9.0, 1.0 / n]]) for n in range(1, 5)]
        whole, before, after = method(gate_turn=1), method(gate_turn=1), method(gate_turn=1)
        runs = run_of(), run_of()
        for step in steps:
            whole.observe(runs[0], step)
        for step in steps[:2]:
            before.observe(runs[1], step)
        after.load_state_dict(before.state_dict())
        expected = [step.written[REFERENCE] for step in steps[2:]]
        for step in steps[2:]:
            after.observe(runs[1], step)
        assert all(torch.equal(step.written[REFERENCE], value) for step, value in zip(steps[2:], expected, strict=True))
        assert runs[0].metrics == runs[1].metrics

    def test_variance_over_steps(self):
        plugin, run = method(), run_of()
        for value in (0.5, 0.7, 1.2):
            plugin.observe(run, batch([[1, 1]], [[value, value]]))
        values = torch.tensor([0.5, 0.7, 1.2], dtype=torch.float64)
        assert run.metrics["entropy_variance"] == pytest.approx(float(values.var(correction=0)), rel=1e-5)


class TestGateAndSchedule:
    """Where P is on, and how much it weighs."""

    def test_more_turns_than_the_settings_allow(self, sentence):
        given = batch([[1, 0, 1, 0, 1]], [[1.0] * 5])
        for options, turns in (({}, None), ({"history": "left_padded", "gate_turn": 0}, 2)):
            with pytest.raises(DataError) as error:
                method(**options).observe(run_of(turns), given)
            sentence(error.value, "has 3 turns", f"allow {turns or 1}", "multi_turn.max_assistant_turns", "gate_turn")
        method(gate_turn=1).observe(run_of(), given)

    @pytest.mark.parametrize(("turns", "gate"), [(4, 2), (5, 2), (6, 3)])
    def test_without_a_setting_it_is_half_of_the_turns(self, turns, gate):
        plugin, run = method(), run_of(turns)
        given = batch([([1, 0] * last + [1] + [0] * 6)[:7] for last in range(4)], [[1.0] * 7] * 4)
        plugin.observe(run, given)
        assert given.written[GATE].tolist() == [float(last >= gate) for last in range(4)]

    def test_micro_batch_or_row(self):
        given = fields(0) | {GATE: torch.tensor([0, 0, 0.5, 0, 0, 0], dtype=torch.float64)}
        for scope, rows in (("micro_batch", range(6)), ("row", [2])):
            term = term_of(method(**BAND, gate_scope=scope), tokens_of(given)).detach() * given["response_mask"]
            assert [row for row in range(6) if term[row].any()] == list(rows)
        closed = given | {GATE: torch.zeros(6, dtype=torch.float64)}
        assert not term_of(method(**BAND), tokens_of(closed)).any()
        masked = method(**BAND, smooth_form="mask_pg")
        assert torch.equal(losses_of(masked, tokens_of(closed)), clipped_loss(tokens_of(closed)))

    def test_the_weight_scales_the_term(self):
        given = fields(0)
        double = given | {GATE: 2 * given[GATE]}
        one, two = (term_of(method(**BAND), tokens_of(part)).detach() for part in (given, double))
        assert one.any()
        torch.testing.assert_close(two, 2 * one)

    @pytest.mark.parametrize(
        ("options", "step", "weight"),
        [
            ({}, 1, 1.0),
            ({"schedule_steps": 10}, 11, 0.8 * math.exp(-3)),
            ({"schedule_steps": 10}, 99, 0.8 * math.exp(-3)),
            ({"schedule": "constant"}, 99, 1.0),
            ({"schedule": "exp", "schedule_steps": 10}, 1, 2.0),
            ({"schedule": "exp", "schedule_steps": 10, "gamma": 2.0}, 6, 1 + math.exp(-2)),
        ],
    )
    def test_schedules(self, options, step, weight):
        plugin, run = method(**options), run_of(step=step)
        given = batch([[1, 1]], [[1.0, 1.0]])
        plugin.observe(run, given)
        assert run.metrics["phase_weight"] == pytest.approx(weight)
        assert given.written[GATE].tolist() == [pytest.approx(weight)]

    @FEW
    @given(st.integers(-5, 400), st.integers(-2, 300))
    def test_phase_weight_stays_within_0_and_1(self, step, steps):
        assert 0.03 < phase_weight(step, steps) <= 1
        assert phase_weight(0, steps) == 1
        assert phase_weight(step + 1, steps) <= phase_weight(step, steps)


class TestRefusals:
    """Settings under which nothing, or nothing sensible, would happen."""

    @pytest.mark.parametrize(
        ("overrides", "parts"),
        [
            (["actor_rollout_ref.actor.entropy_coeff=0"], ["actor_rollout_ref.actor.entropy_coeff=0", "0.001"]),
            (["plugins.epo.min_ratio=2.0"], ["plugins.epo.min_ratio=2.0", "max_ratio=2.0"]),
            (
                ["actor_rollout_ref.rollout.multi_turn.enable=True"],
                ["plugins.epo.gate_turn", "actor_rollout_ref.rollout.multi_turn.max_assistant_turns"],
            ),
            (["algorithm.rollout_correction.bypass_mode=True"], ["'epo'", "entropy", "bypass_mode=True"]),
        ],
    )
    def test_one_sentence(self, overrides, parts, sentence):
        with pytest.raises(CompositionError) as error:
            needs.check(compose("epo", "cpu", overrides))
        sentence(error.value, *parts)

    def test_what_makes_sense_is_accepted(self):
        for overrides in (
            [],
            ["plugins.epo.smooth_form=mask_pg", "actor_rollout_ref.actor.entropy_coeff=0"],
            ["actor_rollout_ref.rollout.multi_turn.enable=True", "plugins.epo.gate_turn=3"],
        ):
            composed = compose("epo", "cpu", overrides)
            needs.check(composed)
            assert composed.config.actor_rollout_ref.actor.calculate_entropy


class TestEdges:
    """Strict or not: where the band, the gate and the halves of the schedule begin."""

    @pytest.mark.parametrize(
        ("entropy", "far"), [(0.25, 1), (0.3, 0), (0.5, 0), (0.75, 0), (1.0, 1), (0.2, 1), (1.1, 1)]
    )
    def test_the_ends_of_the_band_are_outside_and_cost_nothing(self, entropy, far):
        """With Hbar 0.5: 0.25 to 1."""
        given, usual = torch.tensor([entropy]), torch.tensor([0.5])
        assert outside(given, usual, 0.5, 2.0).tolist() == [far]
        beyond = max(0.25 - entropy, 0, entropy - 1)
        assert outside_by(given, usual, 0.5, 2.0).tolist() == pytest.approx([beyond])

    def test_without_a_history_nothing_is_outside(self):
        given, usual = torch.tensor([0.0, 3.0]), torch.zeros(2)
        assert outside(given, usual, 0.5, 2.0).tolist() == outside_by(given, usual, 0.5, 2.0).tolist() == [0, 0]

    @pytest.mark.parametrize(("gate", "opened"), [(0, [2, 2, 2]), (1, [0, 2, 2]), (2, [0, 0, 2]), (3, [0, 0, 0])])
    def test_the_gate_is_open_from_its_turn_on(self, gate, opened):
        turns = torch.tensor([[0, 0, 0], [0, 1, 1], [0, 1, 2]])
        mask = torch.ones(3, 3, dtype=torch.bool)
        assert for_the_loss(torch.ones(3), turns, mask, gate, 2.0)[1].tolist() == opened
        mask[2, 2] = False  # a turn without a token of the policy does not open it
        assert for_the_loss(torch.ones(3), turns, mask, 2, 2.0)[1].tolist() == [0, 0, 0]

    def test_a_turn_beyond_the_history_has_its_last(self):
        reference, _ = for_the_loss(
            torch.tensor([1.0, 2.0]), torch.tensor([[0, 1, 5]]), torch.ones(1, 3).bool(), 0, 1.0
        )
        assert reference.tolist() == [[1, 2, 2]]

    @pytest.mark.parametrize(
        ("step", "steps", "weight"),
        [
            (0, 10, 1.0),
            (5, 10, 1 - 0.2 * (1 - math.exp(-2))),
            (6, 10, 0.8 * math.exp(-3 / 5)),
            (10, 10, 0.8 * math.exp(-3)),
            (99, 10, 0.8 * math.exp(-3)),
            (-1, 10, 1.0),
            (0, 1, 1.0),
            (1, 1, 0.8 * math.exp(-3)),
            (5, 0, 1.0),
        ],
    )
    def test_schedule(self, step, steps, weight):
        assert phase_weight(step, steps) == pytest.approx(weight)
