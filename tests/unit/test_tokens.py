"""Random numbers in the loss: equal wherever the same rows are computed."""

from __future__ import annotations

import torch

from verl_plugins.tokens import Tokens, row_number

ROWS = [row_number(f"{prompt}-3-0_{session}_0") for prompt in range(4) for session in range(2)]


def draw(rows: list[int] | None = None, owner: str = "x", name: str = "", **place: int) -> list[float]:
    one = torch.zeros(1, 1)
    tokens = Tokens(
        log_probs=one,
        old_log_probs=one,
        advantages=one,
        response_mask=one.bool(),
        config=None,
        seed=7,
        rows=rows,
        owner=owner,
        **{"step": 3, **place},
    )
    return torch.rand(5, generator=tokens.rng(name)).tolist()


def test_equal_on_every_rank_that_holds_the_rows_whichever_micro_batch_they_are_in_there() -> None:
    assert draw(ROWS[:3], micro_batch=0) == draw(ROWS[:3], micro_batch=5)


def test_order_and_padding_of_the_rows_change_nothing() -> None:
    assert draw(ROWS[:3]) == draw([0, *ROWS[2::-1], 0])


def test_other_rows_steps_updates_plugins_and_names_draw_others() -> None:
    places = [draw(ROWS[:3]), draw(ROWS[:2]), draw(ROWS[:3], step=4), draw(ROWS[:3], mini_batch=1)]
    places += [draw(ROWS[:3], owner="y"), draw(ROWS[:3], name="z"), draw([0]), draw(), draw(micro_batch=1)]
    assert len({tuple(place) for place in places}) == len(places)


def test_no_real_row_has_the_number_of_padding() -> None:
    assert len(set(ROWS)) == len(ROWS) and min(ROWS) > 0 and max(ROWS) < 2**63
