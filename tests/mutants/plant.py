"""Planted errors: cosmic-ray's small changes of a file, one at a time, and which of them its tests do not notice.

    python tests/mutants/plant.py [FILE…] [--sample N] [--seed S] [--again]

`mutants.yaml` says which tests belong to which file, and which changes are no errors and why. Every change is tried in
a process that is forked after torch has been imported, and never written to the file.
"""

from __future__ import annotations

import argparse
import ast
import gc
import importlib.machinery
import importlib.util
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CONFIG = yaml.safe_load(Path(__file__).with_name("mutants.yaml").read_text(encoding="utf-8"))
RESULTS = ROOT / ".mutants"
GOLDEN = ROOT / "tests/golden"
SWAPS = {
    *("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Div", "Mod_FloorDiv", "Pow_Mul", "BitAnd_BitOr"),
    *("BitOr_BitAnd", "MatMul_Mul", "Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Eq_NotEq", "NotEq_Eq", "Is_IsNot"),
    *("IsNot_Is", "In_NotIn", "NotIn_In", "Lt_Gt", "Gt_Lt", "UAdd_USub", "Delete_USub", "USub_UAdd", "Delete_Not"),
    *("Delete_Invert", "Delete_UAdd"),
}
"""The replacements of operators that are made, of all that cosmic-ray knows."""
EXAMPLES = 12
"""Of each property, in place of what the test asks for."""
WARM_UP = ("tests/unit/advantage/test_grpo.py", "tests/unit/sampling/test_sage.py")
LAB = "lab"
"""The function that makes a module a lab."""
OTHERS = {
    *("NumberReplacer", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd"),
    *("ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ZeroIterationForLoop"),
}


class Mutant(NamedTuple):
    """One change of a file."""

    line: int
    before: str
    after: str
    """The line, without the space around it."""
    source: str
    """The whole file as changed."""

    @property
    def key(self) -> str:
        return f"{self.before} => {self.after}"


def operators() -> Iterator[Any]:
    from cosmic_ray.plugins import get_operator, operator_names

    for name in sorted(operator_names()):
        short = name.rpartition("/")[2]
        if short in OTHERS or any(short.endswith(f"_{swap}") for swap in SWAPS):
            yield get_operator(name)()


def left_out(source: str) -> list[tuple[int, int]]:
    """First and last position, as line and column, of what states or says something and computes nothing."""
    spans, module = [], ast.parse(source)
    if any(getattr(node, "name", "") == LAB for node in module.body):
        spans += [extent(node) for node in module.body if is_experiment(node)]
    for node in ast.walk(module):
        parts: list[Any] = [getattr(node, name, None) for name in ("annotation", "returns")]
        parts += getattr(node, "decorator_list", [])
        settings = isinstance(node, ast.ClassDef) and node.name.endswith(("Config", "Settings"))
        said = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "progress"
        if isinstance(node, ast.Raise) or settings or said:
            parts.append(node)
        spans += [extent(part) for part in parts if part]
    return spans


def extent(node: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)


def is_experiment(node: ast.stmt) -> bool:
    """What a lab tries and draws, in place of what it computes: sizes and problems, the run itself, the picture."""
    name = getattr(node, "name", "")
    return isinstance(node, ast.Assign) or name in (LAB, "problems") or name.startswith("_panel")


def mutants(source: str) -> Iterator[Mutant]:
    """Every change of a file's text."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code

    spans, lines, seen = left_out(source), source.splitlines(), set()
    for operator in operators():
        places = (place for node in ast_nodes(get_ast(source)) for place in operator.mutation_positions(node))
        for occurrence, (start, _) in enumerate(places):
            if any(first <= start < last for first, last in spans):
                continue
            changed = mutate_code(source, operator, occurrence)
            if changed is None or changed in seen:
                continue
            seen.add(changed)
            pairs = zip(lines, changed.splitlines(), strict=False)
            line = next(number for number, (old, new) in enumerate(pairs) if old != new)
            yield Mutant(line + 1, lines[line].strip(), changed.splitlines()[line].strip(), changed)


class Loader(importlib.machinery.SourceFileLoader):
    """Reads one module with a change in it, without a cache."""

    changed = ""

    def get_data(self, path: str) -> bytes:
        return self.changed.encode() if path == self.path else super().get_data(path)

    def get_code(self, fullname: str) -> Any:
        return self.source_to_code(self.get_data(self.path), self.path)


class Finder:
    """Finds the one module that is changed."""

    def __init__(self, file: Path, source: str) -> None:
        self.name, self.file, self.source = ".".join(file.with_suffix("").parts), file, source

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name:
            return None
        loader = Loader(name, str(ROOT / self.file))
        loader.changed = self.source
        return importlib.util.spec_from_file_location(name, loader.path, loader=loader)


def golden_folder(methods: Sequence[str], folder: Path) -> None:
    """The recorded cases of some methods, as links."""
    for method in methods:
        for file in (GOLDEN / "data").glob(f"{method}*.json"):
            if file.stem in (method, f"{method}_more"):
                (folder / file.name).symlink_to(file)


class Quick:
    """A plugin of pytest: the tests that took least come first, of properties a few examples are tried.

    Tests that go through several methods are run for this one.
    """

    def __init__(self, method: str, record: Path) -> None:
        self.method, self.record, self.took = method, record, Counter()
        self.known = json.loads(record.read_text()) if record.is_file() else {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        import hypothesis

        items[:] = sorted(filter(self.is_about, items), key=lambda item: self.known.get(item.nodeid, 0))
        for test in {getattr(item.obj, "__func__", item.obj) for item in items}:
            if asked := getattr(test, "_hypothesis_internal_use_settings", None):
                test._hypothesis_internal_use_settings = hypothesis.settings(
                    asked,
                    **{"max_examples": EXAMPLES, "derandomize": True, "database": None},
                    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
                )

    def is_about(self, item: Any) -> bool:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        return item.path.name not in CONFIG["shared"] or values.get("name", self.method) == self.method

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, call: Any) -> None:
        """A changed file that fails a test is noticed: the rest, and the report, can be saved."""
        if self.known and call.excinfo and not call.excinfo.errisinstance(pytest.skip.Exception):
            os._exit(1)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.took[report.nodeid] += report.duration

    def pytest_sessionfinish(self) -> None:
        if not self.known:
            self.record.write_text(json.dumps(self.took))


def run_tests(file: Path, source: str, tests: Sequence[str], golden: Path) -> int:
    """pytest's exit status, in this process."""
    os.environ["VERL_PLUGINS_GOLDEN"] = str(golden)
    sys.meta_path.insert(0, Finder(file, source))
    quick = Quick(file.stem, golden.with_suffix(".json"))
    paths = [*tests, *([str(GOLDEN / "test_golden.py")] if any(golden.iterdir()) else [])]
    without = [f"no:{name}" for name in ("cacheprovider", "unraisableexception", "threadexception")]
    options = [part for name in without for part in ("-p", name)]
    return int(pytest.main(["-x", "-q", "-n", "0", "--assert=plain", *options, *paths], plugins=[quick]))


def survives(file: Path, source: str, tests: Sequence[str], golden: Path, limit: float) -> bool:
    """Whether the tests pass in a forked process, within a limit in seconds."""
    child = os.fork()
    if not child:
        os.setsid()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        status = 1
        try:
            status = run_tests(file, source, tests, golden)
        finally:
            os._exit(int(status != 0))
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def is_none(name: str, mutant: Mutant) -> bool:
    """Whether the configuration says why this change is no error."""
    before, after = ("".join(text.split()) for text in (mutant.before, mutant.after))
    for rule in CONFIG["rules"]:
        if "".join(rule["in"].split()) in before and before.replace(*map(str, rule["change"]), 1) == after:
            return True
    same = [one for one in CONFIG["equivalent"].get(name) or [] if one["before"] == mutant.before]
    return any(one.get("after", mutant.after) == mutant.after for one in same)


def try_file(name: str, sample: int | None, seed: int, again: bool) -> Counter:
    """Tries the changes of one file that have not been tried, or those that survived; prints what survives."""
    file, entry = Path(name), CONFIG["files"][name]
    source = (ROOT / file).read_text(encoding="utf-8")
    record = RESULTS / f"{'lab_' if file.parent.name == 'labs' else ''}{file.stem}.json"
    known = json.loads(record.read_text()) if record.is_file() else {}
    found = [mutant for mutant in mutants(source) if not is_none(name, mutant)]
    picked = random.Random(seed).sample(found, len(found))[:sample]
    with tempfile.TemporaryDirectory() as folder:
        golden = Path(folder) / "golden"
        golden.mkdir()
        golden_folder(entry.get("golden", []), golden)
        begun = time.monotonic()
        if not survives(file, source, entry["tests"], golden, 600):
            print(f"{name}: its tests fail without any change, so nothing was tried", flush=True)
            return Counter(noticed=0, planted=len(picked))
        limit = 20 + 5 * (time.monotonic() - begun)
        for mutant in picked:
            if mutant.key not in known or (again and known[mutant.key]):
                known[mutant.key] = survives(file, mutant.source, entry["tests"], golden, limit)
                record.write_text(json.dumps(known, indent=0))
    for mutant in picked:
        if known[mutant.key]:
            print(f"{name}:{mutant.line}\n  - {mutant.before}\n  + {mutant.after}", flush=True)
    alive = sum(known[mutant.key] for mutant in picked)
    print(f"{name}: {len(picked) - alive} of {len(picked)} noticed, {len(found)} in all", flush=True)
    return Counter(noticed=len(picked) - alive, planted=len(picked))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", default=[], help="of those in mutants.yaml; default: all")
    parser.add_argument("--sample", type=int, help="changes tried per file; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="try those that survived before once more")
    options = parser.parse_args()
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    RESULTS.mkdir(exist_ok=True)
    prepare()
    total = Counter()
    for name in options.files or CONFIG["files"]:
        total += try_file(name, options.sample, options.seed, options.again)
    share = total["noticed"] / max(total["planted"], 1)
    print(f"{total['noticed']} of {total['planted']} noticed, {share:.1%}; {CONFIG['least']:.0%} are asked for")
    sys.exit(share < CONFIG["least"])


def prepare() -> None:
    """Import what takes long and is not changed: all that some tests import, but for this repository's own modules."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        golden = Path(folder) / "golden"
        golden.mkdir()
        golden_folder(["grpo"], golden)
        file = Path("verl_plugins/advantage/grpo.py")
        if run_tests(file, (ROOT / file).read_text(encoding="utf-8"), WARM_UP, golden):
            sys.exit("the tests that warm up fail")
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, Finder)]
    own = [name for name, module in sys.modules.items() if is_own(getattr(module, "__file__", None))]
    for name in own:
        del sys.modules[name]
    gc.collect()
    gc.freeze()


def is_own(path: str | None) -> bool:
    """Whether a module belongs to this repository."""
    parts = Path(path or "/").parts
    return parts[: len(ROOT.parts)] == ROOT.parts and "site-packages" not in parts and Path(path).stem != "plant"


if __name__ == "__main__":
    main()
