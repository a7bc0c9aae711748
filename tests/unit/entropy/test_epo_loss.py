"""EPO in the loss: what is done to tokens outside the band, and what is logged of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_epo import BAND, CONFIG, FEW, FORMS, SEEDS, fields, losses_of, method, term_of, tokens_of
from verl.trainer.ppo.core_algos import agg_loss

from verl_plugins.bridge.defaults import clipped_loss
from verl_plugins.entropy.epo import GATE, REFERENCE


class TestLoss:
    """Outside the band the hinge pulls, the indicator only counts, and mask_pg weighs down."""

    @FEW
    @given(SEEDS)
    def test_the_hinge_pulls_towards_the_band(self, seed):
        given = fields(seed) | {GATE: torch.ones(6, dtype=torch.float64)}
        tokens, mask = tokens_of(given), given["response_mask"]
        term = term_of(method(**BAND, out_range_penalty=0.3, smooth_coeff=2.0), tokens)
        (term * mask).sum().backward()
        entropy, usual, scale = given["entropy"], given[REFERENCE], CONFIG["entropy_coeff"] * 2.0 * 0.3
        below, above = (entropy < 0.8 * usual) & mask, (entropy > 1.2 * usual) & mask & (usual > 0)
        expected = torch.zeros_like(entropy)
        expected[below], expected[above] = -scale, scale
        torch.testing.assert_close(tokens.entropy.grad, expected)
        torch.testing.assert_close(
            term.detach()[mask],
            scale * (below * (0.8 * usual - entropy) + above * (entropy - 1.2 * usual))[mask],
        )

    @FEW
    @given(SEEDS)
    def test_the_indicator_has_no_gradient(self, seed):
        tokens = tokens_of(fields(seed))
        assert not term_of(method(**BAND, smooth_form="indicator"), tokens).requires_grad

    @FEW
    @given(SEEDS)
    def test_mask_pg_weighs_the_policy_loss_outside_the_band(self, seed):
        given = fields(seed) | {GATE: torch.ones(6, dtype=torch.float64)}
        found = losses_of(method(**BAND, smooth_form="mask_pg", out_range_penalty=0.1), tokens_of(given))
        entropy, usual = given["entropy"], given[REFERENCE]
        far = ((entropy <= 0.8 * usual) | (entropy >= 1.2 * usual)) & (usual > 0)
        torch.testing.assert_close(found, clipped_loss(tokens_of(given)) * torch.where(far, 0.1, 1.0).double())

    def test_sequences_are_compared_by_their_means(self):
        given = fields(3) | {GATE: torch.ones(6, dtype=torch.float64)}
        term = term_of(method(**BAND, smooth_mode="sequence", out_range_penalty=1.0), tokens_of(given)).detach()
        for row, mask in enumerate(given["response_mask"]):
            entropy, usual = (float(given[name][row][mask].mean()) for name in ("entropy", REFERENCE))
            distance = max(0.8 * usual - entropy, 0) + max(entropy - 1.2 * usual, 0) if usual else 0
            assert term[row].tolist() == pytest.approx([CONFIG["entropy_coeff"] * distance] * 12)

    @FEW
    @given(SEEDS, st.floats(0.1, 10), FORMS)
    def test_the_unit_of_entropy_does_not_decide_who_is_outside(self, seed, factor, form):
        given, logs = fields(seed), ({}, {})
        scaled = given | {name: factor * given[name] for name in ("entropy", REFERENCE)}
        one, other = (
            losses_of(method(**BAND, smooth_form=form), tokens_of(part, logged))
            for part, logged in zip((given, scaled), logs, strict=True)
        )
        assert logs[0]["within_band_fraction"] == pytest.approx(logs[1]["within_band_fraction"])
        if form != "hinge":
            torch.testing.assert_close(one, other)

    @FEW
    @given(SEEDS, FORMS, st.sampled_from(["token", "sequence"]), st.integers(1, 9))
    def test_row_order_and_padding_do_not_matter(self, seed, form, mode, width):
        given, plugin = fields(seed), method(**BAND, smooth_form=form, smooth_mode=mode)
        mask = given["response_mask"]
        plain = losses_of(plugin, tokens_of(given)).detach() * mask
        order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
        wide = {n: torch.nn.functional.pad(v, (0, width)) if v.dim() == 2 else v for n, v in given.items()}
        wide["entropy"] = wide["entropy"].masked_fill(~wide["response_mask"], 7.0)
        found = losses_of(plugin, tokens_of({name: value[order] for name, value in wide.items()})).detach()
        torch.testing.assert_close(found[:, :-width] * mask[order], plain[order])

    @FEW
    @given(SEEDS, FORMS, st.sampled_from([1, 4, 16]))
    def test_split_does_not_matter_with_gates_by_row(self, seed, form, size):
        given, plugin = fields(seed, rows=16), method(**BAND, smooth_form=form, gate_scope="row")

        def run(rows: slice) -> tuple[torch.Tensor, ...]:
            tokens = tokens_of({name: value[rows] for name, value in given.items()})
            losses = losses_of(plugin, tokens)
            losses.sum().backward()
            return losses.detach(), tokens.log_probs.grad, *([tokens.entropy.grad] if form == "hinge" else [])

        parts = [run(slice(start, start + size)) for start in range(0, 16, size)]
        for together, pieces in zip(run(slice(None)), zip(*parts, strict=True), strict=True):
            torch.testing.assert_close(together, torch.cat(pieces))

    def test_the_published_gate_depends_on_the_split(self):
        given = fields(0) | {GATE: torch.tensor([0, 0, 0, 0, 0, 1.0], dtype=torch.float64)}
        whole, half = (term_of(method(**BAND), tokens_of({n: v[:rows] for n, v in given.items()})) for rows in (6, 3))
        assert whole[:3].any()
        assert not half.any()

    @pytest.mark.parametrize("entropy", [0.1, 0.5, 3.0])
    def test_a_response_of_one_token_is_its_mean(self, entropy):
        given = {name: value[:1, :1] if value.dim() == 2 else value[:1] for name, value in fields(0).items()}
        given |= {"entropy": torch.full((1, 1), entropy).double(), REFERENCE: torch.ones(1, 1).double()}
        given[GATE] = torch.ones(1)
        by_token, by_mean = (
            term_of(method(**BAND, smooth_mode=mode), tokens_of(given)) for mode in ("token", "sequence")
        )
        assert torch.equal(by_token, by_mean) and by_token.all()

    @pytest.mark.parametrize("mode", ["token", "sequence"])
    @pytest.mark.parametrize("form", ["hinge", "indicator", "mask_pg"])
    def test_whole_call_masked(self, form, mode):
        given, logged = fields(0), {}
        given["response_mask"] = torch.zeros_like(given["response_mask"])
        given[REFERENCE] = torch.zeros_like(given[REFERENCE])
        total = losses_of(method(**BAND, smooth_form=form, smooth_mode=mode), tokens_of(given, logged))
        assert total.isfinite().all()
        assert agg_loss(total, given["response_mask"], "token-mean", batch_num_tokens=1) == 0
        assert "penalty" not in logged

    @FEW
    @given(SEEDS)
    def test_metrics(self, seed):
        given, logged = fields(seed), {}
        term = term_of(method(**BAND), tokens_of(given, logged)).detach()
        mask, usual, entropy = given["response_mask"], given[REFERENCE], given["entropy"]
        inside = ((entropy > 0.8 * usual) & (entropy < 1.2 * usual)) | (usual == 0)
        assert logged["within_band_fraction"] == pytest.approx(float(inside[mask].double().mean()))
        assert logged["penalty"] == pytest.approx(float(term[mask].mean()) / CONFIG["entropy_coeff"])
        assert logged["gate_open_share"] == float(bool(given[GATE].any()))

    def test_open_gates_are_counted_by_rows_that_have_tokens(self):
        given, logged = fields(2, rows=8), {}
        given[GATE] = (torch.arange(8) % 2).double()
        given["response_mask"][:3] = False
        term_of(method(**BAND, gate_scope="row"), tokens_of(given, logged))
        assert logged["gate_open_share"] == pytest.approx(3 / 5)
