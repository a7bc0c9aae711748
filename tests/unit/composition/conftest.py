"""Runs that are composed and checked, as far as no process is needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from verl_plugins.composition import needs
from verl_plugins.composition.compose import Composed, compose
from verl_plugins.errors import CompositionError


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Composed]:
    """Composed and checked; on GPU presets with data files that exist."""
    data = tmp_path / "data.parquet"
    data.touch()

    def checked(recipe: str, *overrides: str, preset: str = "cpu") -> Composed:
        files = [] if preset == "cpu" else [f"data.{key}={data}" for key in ("train_files", "val_files")]
        composed = compose(recipe, preset, [*files, *overrides])
        needs.check(composed)
        return composed

    return checked


@pytest.fixture
def refused(run: Callable[..., Composed], sentence: Callable) -> Callable[..., None]:
    """Asserts that it is, in one sentence with these parts, and that the override named there mends it."""

    def check(
        recipe: str, *overrides: str, parts: tuple[str, ...], mended: tuple[str, ...] = (), **preset: str
    ) -> None:
        with pytest.raises(CompositionError) as error:
            run(recipe, *overrides, **preset)
        sentence(error.value, *parts, *mended)
        if mended:
            run(recipe, *overrides, *mended, **preset)

    return check
