"""`verl-plugins lab`: a paper's claim against what was measured here, as a table, a picture and data."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_plugins.composition import labs, manifest
from verl_plugins.composition.recipe import of_lab
from verl_plugins.errors import RunError, printable
from verl_plugins.lab import Findings, Panel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from verl_plugins.lab import Progress

MARKERS = {"line": "-", "dashed": "--", "points": "o"}


def lab(name: str, given: Sequence[str] = (), seed: int = 0, out: Path | None = None) -> int:
    """Run the lab of recipe `name`; 0 when all its claims hold, 1 when one does not.

    With `out`, the picture `<name>.png` and the data `<name>.json` are written there.

    Raises:
        CompositionError: there is no such lab, or a setting does not fit.
        RunError: nothing can be written to `out`.
    """
    recipe = of_lab(name, manifest.folders(manifest.entries()))
    if out:
        _make(out)
    with _one_thread(), _progress(name) as progress:
        settings, found = labs.run(recipe, given, seed, progress)
    data = {"lab": name, "seed": seed, "settings": asdict(settings), "holds": not found.failed, **asdict(found)}
    _print(recipe.title or name, found)
    if out:
        text = json.dumps(_plain(data), indent=1, allow_nan=False)
        (out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        print(f"data: {out / f'{name}.json'}")
        if found.panels:
            draw(found.panels, out / f"{name}.png")
            print(f"picture: {out / f'{name}.png'}")
    for claim in found.failed:
        print(printable(f"does not hold: {claim.name}: measured {claim.measured}"), file=sys.stderr)
    return int(bool(found.failed))


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"--out {out} cannot be made ({error.strerror}): give a folder that can be written to"
        ) from error
    if not os.access(out, os.W_OK):
        raise RunError(f"--out {out} cannot be written to: give a folder that can")


@contextmanager
def _one_thread() -> Iterator[None]:
    """What labs compute is small: threads would wait for each other, and sums would depend on how many there are."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _progress(name: str) -> Iterator[Progress]:
    """A bar on the terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = [TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(name, total=1.0)
        yield lambda share, what: bar.update(task, completed=share, description=f"{name}: {what}")


def _print(title: str, found: Findings) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 140, markup=False, highlight=False)
    table = Table(title=Text(printable(title)), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("claim", "whose", "expected", "measured here", "holds"):
        table.add_column(column, overflow="fold", no_wrap=column in ("whose", "holds"))
    for claim in found.claims:
        row = (claim.name, claim.source, claim.expected, claim.measured, "yes" if claim.holds else "NO")
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)
    for note in found.notes:
        console.print(printable(note))


def _plain(value: Any) -> Any:
    """As JSON takes it: numbers of numpy or torch as plain ones, what is not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw(panels: Sequence[Panel], picture: Path) -> None:
    """The panels side by side, each with its legend."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.8), squeeze=False, layout="constrained")
    for axis, panel in zip(axes.flat, panels, strict=True):
        number = -1
        for curve in panel.curves:
            number += bool(curve.label)
            label, color = curve.label or None, f"C{max(number, 0) % 10}"
            axis.plot(curve.x, curve.y, MARKERS[curve.style], label=label, color=color, markersize=4)
        axis.set_title(panel.title, parse_math=False, fontsize=10)
        axis.set_xlabel(panel.x, parse_math=False)
        axis.set_ylabel(panel.y, parse_math=False)
        axis.set_xscale("log" if "x" in panel.log else "linear")
        axis.set_yscale("log" if "y" in panel.log else "linear")
        axis.grid(alpha=0.3)
        for text in axis.legend(fontsize=8).get_texts():
            text.set_parse_math(False)
    figure.savefig(picture, dpi=72)
    plt.close(figure)
