"""The table "what works with what" is the list docs/capabilities.yaml, and the list says what tests do.

`python tests/docs/test_capabilities.py` prints the table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from verl_plugins.composition import needs
from verl_plugins.composition.compose import compose
from verl_plugins.errors import CompositionError

ROOT = Path(__file__).parents[2]
ENTRIES: list[dict[str, Any]] = yaml.safe_load((ROOT / "docs" / "capabilities.yaml").read_text())
STATES = ("trained in tests", "checked in units", "refused", "trained by hand", "not tried")
NAMED = [entry for entry in ENTRIES if "test" in entry]
COMPOSED = [entry for entry in ENTRIES if "overrides" in entry]


def table() -> str:
    """The list in Markdown, sorted by state."""
    rows = ["| what | state | |", "|---|---|---|"]
    for entry in sorted(ENTRIES, key=lambda entry: STATES.index(entry["state"])):
        told = entry.get("why") or (f"`{entry['test'].partition('::')[0]}`" if "test" in entry else "")
        rows.append(f"| {entry['what']} | {entry['state']} | {told} |")
    return "\n".join(rows)


def test_the_guide_has_the_table() -> None:
    assert table() in (ROOT / "docs" / "guide.md").read_text()


@pytest.mark.parametrize("entry", NAMED, ids=lambda entry: entry["what"])
def test_what_is_claimed_names_its_test(entry: dict[str, Any]) -> None:
    file, _, name = entry["test"].partition("::")
    assert name in (ROOT / file).read_text()
    assert file.startswith("tests/e2e/") == (entry["state"] == "trained in tests")


def test_what_is_tested_and_only_that_names_a_test() -> None:
    assert [e["what"] for e in NAMED] == [e["what"] for e in ENTRIES if e["state"] in STATES[:2]]


@pytest.mark.parametrize("entry", COMPOSED, ids=lambda entry: entry["what"])
def test_it_composes_or_is_refused(entry: dict[str, Any], tmp_path: Path) -> None:
    data, preset = tmp_path / "data.parquet", entry.get("preset", "cpu")
    data.touch()
    files = [] if preset == "cpu" else [f"data.{key}={data}" for key in ("train_files", "val_files")]
    composed = compose(entry.get("recipe", "grpo"), preset, [*files, *entry["overrides"]])
    if entry["state"] == "refused":
        with pytest.raises(CompositionError):
            needs.check(composed)
    else:
        needs.check(composed)


if __name__ == "__main__":
    print(table())
