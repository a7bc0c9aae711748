"""What `list` and `show` print: tables for people, plain data for `--json`. Loads neither torch nor verl nor Hydra."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict
from typing import Any

from verl_plugins.composition.manifest import Folder, Manifest, Setting, lab_settings
from verl_plugins.composition.recipe import Preset, Recipe, combine, leaves
from verl_plugins.errors import CompositionError, nearest, printable

OWN_DISTRIBUTION = "verl-plugins"
PROBLEMS = ("baseline", "dead groups", "noisy advantages", "entropy collapse", "exploration", "length", "credit")
PROBLEMS += ("label-free", "stability", "asynchrony", "diagnosis", "a claim measured outside RL")
"""The order in which `list` shows problems; others come after them, recipes that name none at the end."""
OTHER = "other"
_BOUND = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}", "choices": "{}"}


def overview(
    recipes: Sequence[Recipe], presets: Sequence[Preset], plugins: Sequence[Manifest], folders: Sequence[Folder]
) -> dict[str, list[dict[str, Any]]]:
    """Everything installed, as plain data."""
    broken = [folder for folder in folders if folder.broken]
    return {
        "recipes": [_recipe_row(item, _status(item, recipes)) for item in recipes],
        "plugins": [_plugin_row(item, _status(item, plugins)) for item in plugins],
        "presets": [_preset_row(item, _status(item, presets)) for item in presets],
        "broken_folders": [{"distribution": folder.distribution, "status": folder.broken} for folder in broken],
    }


def _recipe_row(item: Recipe, fault: str) -> dict[str, Any]:
    return {
        "name": item.name,
        "title": item.title,
        "problem": (_line(item.problem) if isinstance(item.problem, str) else "") or OTHER,
        "does": _line(item.does or item.summary or item.title),
        "paper": f"arXiv:{item.arxiv}" if item.arxiv else "",
        "stages": item.stages,
        "plugins": list(item.plugins),
        "kind": item.kind,
        "lab": item.lab,
        "distribution": item.distribution,
        "status": _line(fault or item.status),
    }


def _plugin_row(item: Manifest, fault: str) -> dict[str, Any]:
    return {
        "name": item.name,
        "idea": item.idea,
        "paper": item.paper,
        "stages": [f"{hook.stage} ({hook.kind})" for hook in item.hooks],
        "distribution": item.distribution,
        "version": item.distribution_version,
        "status": fault or "ok",
    }


def _preset_row(item: Preset, fault: str) -> dict[str, Any]:
    return {"name": item.name, "title": item.title, "distribution": item.distribution, "status": fault or "ok"}


def print_choice(data: dict[str, list[dict[str, Any]]]) -> None:
    """Which recipe one wants: grouped by the problem it treats, a line each, with what was measured."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in data["recipes"]:
        groups.setdefault(row["problem"], []).append(row)
    ordered = [*PROBLEMS, *sorted(groups.keys() - {*PROBLEMS, OTHER}), OTHER]
    _choice([(problem, groups[problem]) for problem in ordered if problem in groups])
    print(f"presets: {', '.join(row['name'] for row in data['presets'])}")
    if labs := ", ".join(row["name"] for row in data["recipes"] if row["lab"]):
        print(f"labs, a paper's own claim measured by verl-plugins lab NAME: {labs}")
    print("verl-plugins show RECIPE says more, list --long has papers, stages, plugins and presets")
    _print_broken(data)


def _print_broken(data: dict[str, list[dict[str, Any]]]) -> None:
    for row in data["plugins"]:
        if row["status"] != "ok":
            print(f"plugin {row['name']} of {row['distribution']}: {row['status']}")
    for folder in data["broken_folders"]:
        print(f"recipes of {folder['distribution']} cannot be read: {folder['status']}")


def print_overview(data: dict[str, list[dict[str, Any]]]) -> None:
    """Tables of recipes, plugins and presets."""
    _table("recipes", ["name", "title", "paper", "stages", "distribution", "status"], data["recipes"])
    _table("plugins", ["name", "paper", "stages", "distribution", "status"], data["plugins"])
    _table("presets", ["name", "title", "distribution", "status"], data["presets"])
    _print_broken({**data, "plugins": []})


def details(
    name: str,
    recipes: Sequence[Recipe],
    presets: Sequence[Preset],
    plugins: Sequence[Manifest],
    folders: Sequence[Folder] = (),
) -> list[Recipe | Preset | Manifest]:
    """What is called `name`; of a recipe, or several joined by `+`, the plugins it switches on too.

    Raises:
        CompositionError: nothing is called so, or the recipes do not fit together.
    """
    if "+" in name:
        found: list[Any] = list(combine([part.strip() for part in name.split("+")], folders).parts)
        name = ""
    else:
        found = [item for item in recipes if item.name == name]
    switched = {plugin for recipe in found for plugin in recipe.plugins}
    found += [item for item in presets if item.name == name]
    found += [item for item in plugins if item.name == name or item.name in switched]
    if not found:
        known = {item.name for item in (*recipes, *presets, *plugins) if not item.broken}
        raise CompositionError(f"there is no recipe, preset or plugin {name!r}{nearest(name, known)}")
    return found


def print_details(items: Sequence[Recipe | Preset | Manifest]) -> None:
    """One section per item."""
    for item in items:
        if isinstance(item, Manifest):
            _print_plugin(item, given(item, items))
        else:
            _print_file(item)
            absent = _absent(item, items)
            _pairs({"not installed": ", ".join(f"plugin {name}" for name in absent)})
        print()


def given(plugin: Manifest, items: Iterable[Recipe | Preset | Manifest]) -> dict[str, Any] | None:
    """What the recipes and presets among the items set for the plugin; None where none of them switches it on."""
    sections = [item.plugins[plugin.name] for item in items if plugin.name in getattr(item, "plugins", {})]
    return {key: value for section in sections for key, value in section.items()} if sections else None


def _absent(item: Recipe | Preset, items: Iterable[Recipe | Preset | Manifest]) -> list[str]:
    if not isinstance(item, Recipe):
        return []
    there = {other.name for other in items if isinstance(other, Manifest)}
    return [name for name in item.plugins if name not in there]


def plain(item: Recipe | Preset | Manifest, items: Sequence[Recipe | Preset | Manifest] = ()) -> dict[str, Any]:
    """An item as data for `--json`; a plugin's settings with what the recipes among the items set."""
    data = asdict(item)
    data["kind"] = {Recipe: "recipe", Preset: "preset", Manifest: "plugin"}[type(item)]
    if isinstance(item, Recipe):
        data["trains"] = item.kind != "lab"
    if isinstance(item, Manifest):
        data["needs"] = sorted(item.needs)
        data["settings"] = _settings(item, given(item, items))
    else:
        data["file"] = str(item.file)
    return data


def _print_file(item: Recipe | Preset) -> None:
    kind = "recipe" if isinstance(item, Recipe) else "preset"
    _heading(kind, item.name, item.title)
    if item.broken:
        print(f"  broken: {item.broken}")
        return
    print(f"  {item.summary}")
    if isinstance(item, Recipe):
        about = {"paper": f"arXiv:{item.arxiv}" if item.arxiv else "", "stages": ", ".join(item.stages)}
        about |= {"plugins": ", ".join(item.plugins), "the paper reports": item.results}
        about |= {"treats": item.problem, "measured here": item.status}
        about |= {"its lab": f"verl-plugins lab {item.name}" if item.lab else ""}
        about |= {"trains": "" if item.kind == "training" else "nothing: it is a lab"}
        own = item.distribution == OWN_DISTRIBUTION
        about |= {"page": f"docs/recipes/{item.name}.md" if own else "", "file": str(item.file)}
    else:
        about = {"based on": f"preset {item.base}" if item.base else "", "requires": ", ".join(item.requires)}
        about |= {"environment": ", ".join(f"{key}={value}" for key, value in item.env.items())}
        about |= {"prepare": item.prepare, "file": str(item.file)}
    _pairs(about)
    if isinstance(item, Recipe) and item.authors:
        _table("authors' settings", ["what", "value"], [{"what": k, "value": v} for k, v in item.authors.items()])
    if isinstance(item, Recipe) and item.lab:
        _print_lab(item)
    rows = [{"key": key, "value": value} for key, value in _flat(item.overrides)]
    _table("verl settings", ["key", "value"], rows)


def _print_lab(item: Recipe) -> None:
    try:
        rows = [_row(setting) for setting in lab_settings(item.lab)]
    except CompositionError as error:
        print(f"  broken: {printable(error)}")
        return
    rows = [{**row, "setting": f"--set {row['setting']}="} for row in rows]
    _table("settings of the lab", ["setting", "default", "authors", "accepts", "doc"], rows)


def _print_plugin(item: Manifest, given: Mapping[str, Any] | None) -> None:
    _heading("plugin", item.name, f"{item.distribution} {item.distribution_version}")
    if item.broken:
        print(f"  broken: {item.broken}")
        return
    print(f"  {item.idea}")
    stages = ", ".join(f"{hook.stage} ({hook.kind})" for hook in item.hooks)
    _pairs({"paper": item.paper, "stages": stages, "needs": ", ".join(sorted(item.needs)), "verl": item.verl})
    rows = [{**row, "setting": f"plugins.{item.name}.{row['setting']}"} for row in _settings(item, given)]
    own = [] if given is None else ["recipe"]
    _table("settings", ["setting", "default", *own, "authors", "accepts", "doc"], rows)


def _settings(item: Manifest, given: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """One row per setting; `recipe` is the recipe's own value, empty where it leaves the default."""
    rows = [_row(setting) for setting in item.settings]
    known = {setting.name for setting in item.settings}
    strange = [name for name in given or {} if name not in known]
    rows += [{**_row(Setting(name, "", MISSING, "not a setting of this plugin"))} for name in strange]
    return [row | {"recipe": (given or {}).get(row["setting"], "")} for row in rows]


def _row(setting: Setting) -> dict[str, Any]:
    row = {"setting": setting.name, "type": setting.type, "doc": setting.doc, "accepts": _accepts(setting)}
    values = {"default": setting.default, "authors": setting.authors}
    return row | {key: "" if value is MISSING else value for key, value in values.items()}


def _accepts(setting: Setting) -> str:
    if choices := setting.bounds.get("choices"):
        return " | ".join(map(str, choices))
    return " ".join([setting.type, *(_BOUND[key].format(value) for key, value in setting.bounds.items())])


def _status(item: Recipe | Preset | Manifest, among: Sequence[Recipe | Preset | Manifest]) -> str:
    """Why an item cannot be used, or ''."""
    if Counter(other.name for other in among)[item.name] > 1:
        owners = sorted({other.distribution for other in among if other.name == item.name})
        return f"brought twice: {' and '.join(owners)}"
    return f"broken: {item.broken}" if item.broken else ""


def _flat(tree: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(".".join(path), value) for path, value in leaves(tree)]


def _heading(kind: str, name: str, title: str) -> None:
    print(f"{kind} {name}: {title}" if title else f"{kind} {name}")


def _pairs(about: dict[str, str]) -> None:
    for key, value in about.items():
        if value:
            print(f"  {key}: {value}")


def _choice(groups: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> None:
    """One table of recipes with a heading for each problem."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it does")
    table.add_column("measured (ours: preset cpu, three seeds; labs: seed 0)")
    for problem, rows in groups:
        table.add_row(Text(problem, style="bold"))
        for row in rows:
            table.add_row(*map(Text, (f"  {row['name']}", row["does"], row["status"])))
    _console().print(table)


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140, markup=False, highlight=False)


def _table(title: str, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    if not rows:
        return
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column in ("name", "setting"), overflow="fold")
    for row in rows:
        table.add_row(*[_text(row[column]) for column in columns])
    _console().print(table)


def _line(text: Any) -> str:
    """A text of somebody's recipe on one line, without control characters."""
    return "".join(sign if sign.isprintable() else " " for sign in " ".join(str(text).split()))


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
