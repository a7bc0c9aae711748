"""`verl-plugins compare`: curves of several runs in one picture and one page, with mean and spread over seeds.

Runs whose configurations differ only in seeds and folders are one curve. Curves are named after their plugins, and
where that is not enough after the settings in which they differ. Drawn over the tokens generated so far, methods are
compared at equal cost of their rollouts.
"""

from __future__ import annotations

import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from verl_plugins.errors import RunError, nearest

PANELS = {
    "held-out accuracy": "validation",
    "accuracy of the step's rollouts": "health/accuracy",
    "reward": "critic/rewards/mean",
    "entropy (nats per token)": "health/entropy_mean",
    "response length (tokens)": "response_length/mean",
    "mixed groups": "health/mixed_groups",
}
"""Title -> metric."""
INFRASTRUCTURE = ("math_verify",)
"""Plugins that score and are no method: they do not name a curve."""
AXES = {"steps": "step", "tokens": "tokens generated so far"}
"""What curves can be drawn over, and the label."""
TOKENS = "rollout/tokens"
LAST = 5
"""Steps whose mean the page's table shows."""
STYLE = "body{font-family:sans-serif;margin:2em;max-width:75em}table{border-collapse:collapse}"
STYLE += "td,th{border-bottom:1px solid #ccc;padding:.3em .8em;text-align:right}td:first-child,th:first-child"
STYLE += "{text-align:left}svg{max-width:100%;height:auto}"


@dataclass(frozen=True)
class Run:
    """One finished or running training."""

    folder: Path
    label: str | None
    """What the user calls it."""
    settings: Mapping[str, Any]
    """Flat configuration without seeds and folders."""
    steps: pd.DataFrame
    """One row per step, metrics as columns, `validation` the held-out accuracy where there was one."""


def read_run(argument: str) -> Run:
    """A run folder, or `LABEL=FOLDER`.

    Raises:
        RunError: the folder has no metrics or no configuration, or not one step.
    """
    label, separator, name = argument.partition("=")
    if not separator or Path(argument).is_dir():
        label, name = "", argument
    folder = Path(name)
    for file in ("metrics.jsonl", "config.yaml"):
        if not (folder / file).is_file():
            raise RunError(f"{folder} has no {file}; give folders of runs, as `verl-plugins run … --out FOLDER` makes")
    steps = _steps(folder / "metrics.jsonl")
    if steps.empty:
        raise RunError(f"{folder / 'metrics.jsonl'} has no step yet; leave this run out or wait for its first step")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    return Run(folder, label or None, _settings(config, folder), steps)


def _steps(file: Path) -> pd.DataFrame:
    table: dict[int, dict[str, float]] = {}
    whole, _, _ = file.read_text().rpartition("\n")  # a running training may be writing its next line
    for line in whole.splitlines():
        record = json.loads(line)
        row = table.setdefault(record["step"], {})
        if "validation" in record:
            accuracy = [value for key, value in record["validation"].items() if "/acc/mean@" in key]
            row |= {"validation": sum(accuracy) / len(accuracy)} if accuracy else {}
        else:
            row |= record
    return pd.DataFrame.from_dict(table, orient="index").sort_index()


def _settings(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    flat = pd.json_normalize(config, sep=".").iloc[0].to_dict()
    own = (str(folder), str(folder.absolute()))
    return {
        key: json.dumps(value, default=str)
        for key, value in flat.items()
        if not key.endswith("seed") and not any(path in str(value) for path in own) and not key.endswith("_dir")
    }


def curves(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Name of each curve -> its runs, in the order given."""
    grouped: dict[Any, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run.label or tuple(sorted(run.settings.items())), []).append(run)
    firsts = [same[0] for same in grouped.values()]
    names = [run.label or _methods(run) for run in firsts]
    found = {}
    for name, run, same in zip(names, firsts, grouped.values(), strict=True):
        namesakes = [other for other, twin in zip(firsts, names, strict=True) if twin == name]
        if len(namesakes) > 1 and run.label is None:
            name = ", ".join([name, *_differences(run, namesakes)])
        found[name] = same
    return found


def _methods(run: Run) -> str:
    plugins = dict.fromkeys(key.split(".")[1] for key in run.settings if key.startswith("plugins."))
    return "+".join(name for name in plugins if name not in INFRASTRUCTURE)


def _differences(run: Run, others: Sequence[Run]) -> list[str]:
    keys = dict.fromkeys(key for other in others for key in other.settings)
    differing = [key for key in keys if len({other.settings.get(key) for other in others}) > 1]
    return [f"{key.rsplit('.', 1)[-1]}={run.settings.get(key, 'unset').strip(chr(34))}" for key in differing]


def tokens_so_far(run: Run) -> pd.Series:
    """Tokens the policy has generated for training up to each step; 0 before the first.

    Raises:
        RunError: the run has steps in which they were not counted.
    """
    steps = run.steps.reindex(columns=["step", TOKENS])
    if steps.loc[steps["step"].notna(), TOKENS].isna().any():
        raise RunError(
            f"--by tokens adds up {TOKENS}, which {run.folder} does not have in every step; leave it out or train it "
            "again with this version"
        )
    return steps[TOKENS].where(steps.index > 0, 0.0).cumsum()


def _values(run: Run, metric: str, by: str) -> pd.Series:
    """The metric where the run has it, over steps or tokens."""
    values = run.steps[metric].dropna()
    if by == "steps":
        return values
    values = values.set_axis(tokens_so_far(run)[values.index])
    return values[values.index.notna()]  # a running training may have validated a step that is not written yet


def statistics(runs: Sequence[Run], metric: str, by: str = "steps") -> pd.DataFrame:
    """Mean and standard deviation over the runs at each step where any has the metric: columns `mean`, `std`.

    By `tokens`, at each number of tokens where any has it; a run is interpolated between its own places.
    """
    columns = [_values(run, metric, by) for run in runs if metric in run.steps]
    if not columns:
        return pd.DataFrame(columns=["mean", "std"], dtype=float)
    table = pd.concat(columns, axis=1).sort_index()
    if by == "tokens":
        table = table.interpolate(method="index", limit_area="inside")
    return pd.DataFrame({"mean": table.mean(axis=1), "std": table.std(axis=1).fillna(0.0)})


def compare(arguments: Sequence[str], out: Path, metrics: Sequence[str] = (), by: str = "steps") -> list[Path]:
    """Write `curves.png` and the self-contained `index.html` to `out`; further metrics get a panel each.

    Raises:
        RunError: a folder is no run, a metric asked for is in none of the runs, or a run does not know its tokens.
    """
    if by not in AXES:
        raise RunError(f"--by {by}: curves are drawn over {' or '.join(AXES)}{nearest(by, AXES)}")
    named = curves([read_run(argument) for argument in arguments])
    for metric in metrics:
        if not any(metric in run.steps for runs in named.values() for run in runs):
            known = {key for runs in named.values() for run in runs for key in run.steps}
            raise RunError(f"--metric {metric} is in none of the runs{nearest(metric, known)}")
    panels = PANELS | {metric: metric for metric in metrics}
    data = {title: {name: statistics(runs, key) for name, runs in named.items()} for title, key in panels.items()}
    data = {title: lines for title, lines in data.items() if any(len(line) for line in lines.values())}
    drawn = {title: {name: statistics(named[name], panels[title], by) for name in named} for title in data}
    out.mkdir(parents=True, exist_ok=True)
    picture, page = out / "curves.png", out / "index.html"
    page.write_text(_page(named, data, _draw(drawn, AXES[by], picture)))
    return [picture, page]


def _draw(data: Mapping[str, Mapping[str, pd.DataFrame]], label: str, picture: Path) -> str:
    """Draw the panels into a file and as SVG text."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 2 if len(data) > 1 else 1
    rows = -(-len(data) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(11, 3.2 * rows + 0.6), squeeze=False, layout="constrained")
    for axis, (title, lines) in zip(axes.flat, data.items(), strict=False):
        for number, (name, line) in enumerate(lines.items()):
            few = "o-" if len(line) < 4 else "-"
            axis.plot(line.index, line["mean"], few, color=f"C{number}", label=name)
            axis.fill_between(line.index, line["mean"] - line["std"], line["mean"] + line["std"], alpha=0.2, lw=0)
        axis.set_title(title)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    for axis in figure.axes[len(data) :]:
        axis.set_axis_off()
    text = io.StringIO()
    figure.savefig(picture, dpi=120)
    figure.savefig(text, format="svg")
    plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]


def _page(named: Mapping[str, Sequence[Run]], data: Mapping[str, Mapping[str, pd.DataFrame]], svg: str) -> str:
    """Picture, table of the last steps, and which folders a curve is made of; nothing is loaded from anywhere."""
    cell = lambda line: f"{line['mean'].tail(LAST).mean():.3f} ± {line['std'].tail(LAST).mean():.3f}"  # noqa: E731
    rows = [
        f"<tr><td>{html.escape(name)}</td><td>{len(runs)}</td>"
        + "".join(f"<td>{cell(lines[name]) if len(lines[name]) else '–'}</td>" for lines in data.values())
        + "</tr>"
        for name, runs in named.items()
    ]
    heads = "".join(f"<th>{html.escape(title)}</th>" for title in ("", "runs", *data))
    folders = [
        f"<li>{html.escape(name)}: {', '.join(html.escape(str(run.folder)) for run in runs)}</li>"
        for name, runs in named.items()
    ]
    return "\n".join(
        [
            f"<!doctype html><html lang='en'><meta charset='utf-8'><title>runs</title><style>{STYLE}</style>",
            f"<h1>{html.escape(' / '.join(named))}</h1>",
            "<p>Lines are means over the runs of a curve, bands one standard deviation to either side.</p>",
            svg,
            f"<h2>Mean of the last {LAST} steps that have it</h2>",
            f"<table><tr>{heads}</tr>{''.join(rows)}</table>",
            f"<h2>Folders</h2><ul>{''.join(folders)}</ul></html>",
        ]
    )
