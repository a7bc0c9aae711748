"""The lab of perp_grad as it is: its claims, its page, its picture."""

from __future__ import annotations

import pytest
from lab_page import not_on_page

from verl_plugins.labs import grokking
from verl_plugins.labs.grokking import PerpGradSettings


@pytest.fixture(scope="module")
def found():
    return grokking.perp_grad(PerpGradSettings(), 0, lambda share, what: None)


def test_every_claim_holds_and_stands_on_the_page(found):
    assert found.failed == []
    assert not_on_page("perp_grad", found, close=0.1) == []


def test_what_is_drawn(found):
    accuracy, along = found.panels
    assert [curve.label for curve in accuracy.curves] == ["⊥AdamW, held out", "", "AdamW, held out", ""]
    orthogonal, _, plain, known = (list(curve.y) for curve in accuracy.curves)
    assert orthogonal[-1] > 0.99 > 0.05 > max(plain) and known[-1] > 0.99
    assert [curve.label for curve in along.curves] == ["⊥AdamW", "AdamW"]
    assert all(0 <= share <= 1.001 for curve in along.curves for share in curve.y)
