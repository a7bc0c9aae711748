"""What the split into micro-batches changes in Clip-Cov and KL-Cov, and that the pages show it."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def split(monkeypatch):
    """The computation that prints the tables of the pages."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import micro_batches

    return micro_batches


def rows(table: str) -> list[list[int]]:
    return [[int(cell) for cell in line.strip("| ").split("|")] for line in table.splitlines()[2:]]


def test_in_micro_batches_of_one_response_clip_cov_selects_nothing(split):
    (size, candidates, left_out, _), *others = rows(split.clip_cov_table())
    assert (size, candidates, left_out) == (1, 0, 0)
    assert all(candidates > left_out > 0 for _, candidates, left_out, _ in others)


def test_in_micro_batches_of_one_response_kl_cov_penalises_by_chance(split):
    (size, penalised, right, _), *_, whole = rows(split.kl_cov_table())
    assert (size, penalised) == (1, 64)
    assert right < penalised / 10
    assert whole[1] == whole[2] == whole[3]


@pytest.mark.parametrize("method", ["clip_cov", "kl_cov"])
def test_chosen_for_the_batch_the_split_does_not_matter(split, method):
    assert len({cells[-1] for cells in rows(getattr(split, f"{method}_table")())}) == 1


@pytest.mark.parametrize("method", ["clip_cov", "kl_cov"])
def test_the_page_has_the_table(split, method):
    assert getattr(split, f"{method}_table")() in (ROOT / "docs/recipes" / f"{method}.md").read_text()
