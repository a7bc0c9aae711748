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
STATES = ("trained in tests", "checked in units", "refused", "not tried")
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


def test_every_entry_is_written_as_the_list_says() -> None:
    for entry in ENTRIES:
        assert entry.keys() <= {"what", "state", "test", "overrides", "recipe", "preset", "why"}, entry["what"]
        assert entry["state"] in STATES
        assert "test" in entry or entry["state"] not in STATES[:2]
        assert "test" in entry or "overrides" in entry


@pytest.mark.parametrize("entry", NAMED, ids=lambda entry: entry["what"])
def test_what_is_claimed_is_in_its_test(entry: dict[str, Any]) -> None:
    file, _, name = entry["test"].partition("::")
    text = (ROOT / file).read_text()
    assert name in text
    trains = file.startswith(("tests/e2e/", "tests/cluster/"))
    assert trains == (entry["state"] == "trained in tests")
    if trains and "capabilities.yaml" not in text:
        text += (ROOT / "tests/e2e/training.py").read_text()
        parts = [part for override in entry.get("overrides", ()) for part in override.split("=", 1)]
        assert [part for part in parts if part not in text] == []


@pytest.mark.parametrize("entry", COMPOSED, ids=lambda entry: entry["what"])
def test_it_composes_or_is_refused(entry: dict[str, Any], tmp_path: Path) -> None:
    data, preset, asked = tmp_path / "data.parquet", entry.get("preset", "cpu"), entry["overrides"]
    data.touch()
    files = [] if preset == "cpu" else [f"data.{key}={data}" for key in ("train_files", "val_files")]

    def checked() -> None:
        needs.check(compose(entry.get("recipe", "grpo"), preset, [*files, *asked]))

    if entry["state"] != "refused":
        checked()
        return
    with pytest.raises(CompositionError) as error:
        checked()
    assert asked[0].partition("=")[0].removesuffix(".enable") in str(error.value)


if __name__ == "__main__":
    print(table())
