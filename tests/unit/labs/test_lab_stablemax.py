"""The lab of stablemax as it is: its claims, its page, its picture."""

from __future__ import annotations

import pytest
from lab_page import not_on_page

from verl_plugins.labs import grokking
from verl_plugins.labs.grokking import StableMaxSettings

BY_ROUNDING = "the softmax of symlog is the paper's quotient"


@pytest.fixture(scope="module")
def found():
    return grokking.stablemax(StableMaxSettings(), 0, lambda share, what: None)


def test_every_claim_holds_and_stands_on_the_page(found):
    assert found.failed == []
    assert [row for row in not_on_page("stablemax", found, close=0.2) if BY_ROUNDING not in row] == []


def test_what_is_drawn(found):
    accuracy, largest = found.panels
    assert [curve.label for curve in accuracy.curves] == ["StableMax, held out", "", "softmax, held out", ""]
    assert largest.curves[0].label == "StableMax" and largest.curves[0].y[-1] > 10
    assert "80,000 epochs" in found.notes[0]
