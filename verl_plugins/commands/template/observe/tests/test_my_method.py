"""My method: the formula by hand."""

import pytest
from my_method.method import averaged


def test_by_hand() -> None:
    assert averaged(None, 0.4, keep=0.75) == 0.4
    assert averaged(0.4, 0.8, keep=0.75) == pytest.approx(0.5)
    assert averaged(0.4, 0.8, keep=0.0) == 0.8
