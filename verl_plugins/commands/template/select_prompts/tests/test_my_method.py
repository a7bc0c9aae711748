"""My method: which prompts can be drawn, by hand."""

from my_method.method import candidates


def test_by_hand() -> None:
    assert candidates(10, 0.5, 2, []).tolist() == [0, 1, 2, 3, 4]
    assert candidates(10, 2.0, 2, []).tolist() == list(range(10))


def test_enough_are_left() -> None:
    assert candidates(10, 0.1, 3, []).tolist() == [0, 1, 2]
    assert candidates(10, 0.1, 3, [1]).tolist() == [0, 2, 3]
