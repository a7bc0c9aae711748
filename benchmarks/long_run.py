"""Memory, open files, log and temporary folder of a long run as curves: does anything grow?

    python benchmarks/long_run.py OUT [STEPS]

trains `vade` on the preset `cpu` and looks at every process after each step; writes OUT/long_run.jsonl and prints the
slope of each curve per 100 steps, over the second half of the run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil

MIB = 1 << 20
COMMAND = Path(sys.executable).with_name("verl-plugins")


def main(out: Path, steps: int) -> None:
    words = ["run", "vade", "--preset", "cpu", "--out", str(out), f"trainer.total_training_steps={steps}"]
    words += ["trainer.val_before_train=false", "trainer.test_freq=-1"]
    records: list[dict[str, float]] = []
    with subprocess.Popen([COMMAND, *words]) as run, (out.with_suffix(".long_run.jsonl")).open("w") as file:
        while run.poll() is None:
            step = lines(out / "metrics.jsonl")
            if step > len(records):
                records.append({"step": step, **looked_at(run.pid, out)})
                file.write(json.dumps(records[-1]) + "\n")
            time.sleep(0.5)
    for name, slope, last in slopes(records):
        print(f"{name:55} {last:10.1f} at the end  {slope:+9.2f} per 100 steps")


def looked_at(pid: int, out: Path) -> dict[str, float]:
    """MiB of memory and open files by kind of process, MiB of the log and of the temporary folder."""
    found: dict[str, float] = {"MiB of verl.log": size(out / "verl.log")}
    for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        try:
            kind = process.name() if process.pid != pid else "driver"
            kind = "verifier" if any("verifier.py" in word for word in process.cmdline()) else kind
            memory, files = process.memory_full_info().uss / MIB, process.num_fds()
            temporary = process.environ().get("TMPDIR", "")
        except (psutil.Error, OSError):
            continue
        found[f"MiB of {kind}"] = found.get(f"MiB of {kind}", 0) + memory
        found[f"files of {kind}"] = found.get(f"files of {kind}", 0) + files
        if "/vp_" in temporary:
            found["MiB of the temporary folder"] = size(Path(temporary).parent)
    return found


def size(path: Path) -> float:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if file.is_file() and not file.is_symlink()) / MIB


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def slopes(records: list[dict[str, float]]) -> Iterator[tuple[str, float, float]]:
    """(curve, slope per 100 steps, last value)."""
    half = records[len(records) // 2 :]
    for name in sorted({name for record in half for name in record} - {"step"}):
        curve = [(record["step"], record[name]) for record in half if name in record]
        if len(curve) > 2:
            yield name, 100 * np.polyfit(*zip(*curve, strict=True), 1)[0], curve[-1][1]


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2000)
