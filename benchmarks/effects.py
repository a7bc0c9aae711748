"""What each method changes, measured on the CPU preset against plain GRPO: the tables of the recipe pages.

    python benchmarks/effects.py vade            # runs every variant with every seed, then prints the table
    python benchmarks/effects.py bnpo adora --jobs 2

Finished runs are kept in `--out` and not repeated, also where two comparisons share one (mostly grpo's). A seed changes
the order of prompts and every sampled token; model, task and warm-up stay the same.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import formatted_sums
import hinted_sums
import numpy as np
import worked_sums

from verl_plugins.cpu.demo import read_metrics, validation_accuracy
from verl_plugins.cpu.task import TaskSettings

Steps = Sequence[dict]
SUM = re.compile(r"\b\d(\+\d)+=")
"""A prompt of the CPU task."""
HINTS = ("plugins.sage.hint_max_tokens=40", f"plugins.sage.wording={hinted_sums.WORDING}")
AGAIN = f"plugins.r3.wording={Path(__file__).with_name('again.yaml')}"


@dataclass(frozen=True)
class Measure:
    """One column: a number per run; None where the run has no such metric."""

    title: str
    value: Callable[..., float | None]
    """Of steps and validations, and with `equal_tokens` of the tokens that the cheapest run has generated in all."""
    equal_tokens: bool = False


@dataclass(frozen=True)
class Effect:
    """The variants of one comparison (name -> arguments of `verl-plugins run`) and what is measured of each.

    `prepare` makes a model and a task in a folder and gives the overrides that use them.
    """

    variants: dict[str, list[str]]
    measures: list[Measure]
    common: tuple[str, ...] = ()
    steps: int = 45
    prepare: Callable[[Path], list[str]] | None = None


def mean_of(key: str, first: int = 0, last: int | None = None) -> Callable:
    """Mean of a metric over steps first+1..last."""
    return lambda steps, _: statistics.fmean(step[key] for step in steps[first:last]) if key in steps[0] else None


def mean_where_known(key: str, first: int = 0, last: int | None = None) -> Callable:
    """Mean of a metric over those of the steps first+1..last that have it; None if none has."""

    def value(steps: Steps, _: Sequence) -> float | None:
        found = [step[key] for step in steps[first:last] if key in step]
        return statistics.fmean(found) if found else None

    return value


def groups_with_signal(steps: Steps, _: Sequence) -> float:
    """Share of prompts that teach something, over all steps: for copo its own metric, else the mixed ones."""
    return statistics.fmean(step.get("plugins/copo/groups_with_signal", step["health/mixed_groups"]) for step in steps)


def at(key: str, step: int) -> Callable:
    """A metric around a step (mean of five)."""
    return lambda steps, _: statistics.fmean(entry[key] for entry in steps[max(step - 3, 0) : step + 2])


def held_out(index: int) -> Callable:
    """Accuracy of sampled answers to held-out prompts: first or last validation."""
    return lambda _, validations: validation_accuracy(validations[index][1])


def tokens_so_far(steps: Steps) -> list[float] | None:
    """Tokens generated before the first step and after each, trained on or not; None where they were not counted."""
    if any("rollout/tokens" not in step for step in steps):
        return None
    return [0.0, *itertools.accumulate(step["rollout/tokens"] for step in steps)]


def held_out_at(steps: Steps, validations: Sequence[tuple[int, dict]], tokens: float) -> float | None:
    """Accuracy of sampled answers to held-out prompts when so many tokens were generated, between two validations."""
    generated = tokens_so_far(steps)
    if generated is None:
        return None
    places = [generated[step] for step, _ in validations]
    return float(np.interp(tokens, places, [validation_accuracy(metrics) for _, metrics in validations]))


def steps_to(accuracy: float) -> Callable:
    """First step at which sampled answers to held-out prompts are so often right, between two validations; or None."""

    def value(_: Steps, validations: Sequence[tuple[int, dict]]) -> float | None:
        points = [(step, validation_accuracy(metrics)) for step, metrics in validations]
        for (before, low), (after, high) in itertools.pairwise(points):
            if low < accuracy <= high:
                return before + (after - before) * (accuracy - low) / (high - low)
        return None

    return value


def level_accuracy(level: int, index: int = -1) -> Callable:
    """Accuracy of sampled answers to held-out prompts of one level of the CPU task: first or last validation."""
    return lambda _, validations: validations[index][1].get(f"accuracy/level {level}")


def step_variance(key: str) -> Callable:
    """Variance of a metric over the steps of a run."""
    return lambda steps, _: statistics.pvariance(step[key] for step in steps)


def advantage_variance(steps: Steps, _: Sequence[tuple[int, dict]]) -> float:
    """Mean over steps of the variance of the advantages, by formula for grpo: (n-1)/n of the rows that have one."""
    if "plugins/bnpo/advantage_var" in steps[0]:
        return statistics.fmean(step["plugins/bnpo/advantage_var"] for step in steps)
    return statistics.fmean(
        (1 - 1 / step["plugins/grpo/group_size_min"]) * (1 - step["plugins/grpo/zero_advantage_rows"]) for step in steps
    )


def law_at_half(key: str) -> Callable:
    """A number of the entropy law as it was after half of the steps; None where there was none."""
    return lambda steps, _: steps[len(steps) // 2 - 1].get(f"plugins/entropy_law/{key}")


def law_error(steps: Steps, validations: Sequence[tuple[int, dict]]) -> float | None:
    """How far the law of the first half is from the scores of the second: root mean square."""
    half = len(steps) // 2
    a, b = (law_at_half(key)(steps, validations) for key in ("a", "b"))
    entropy = {step["step"]: step["plugins/entropy_law/entropy"] for step in steps}
    later = [(entropy[step + 1], metrics) for step, metrics in validations if half <= step < len(steps)]
    if a is None or not later:
        return None
    return statistics.fmean((validation_accuracy(found) - b + a * math.exp(h)) ** 2 for h, found in later) ** 0.5


def reweighted(steps: Steps, _: Sequence[tuple[int, dict]]) -> float | None:
    """Share of groups whose weight ADORA changed: the advantageous ones where these are scaled up, else the others."""
    if "plugins/adora/frac_tas" not in steps[0]:
        return None
    changed = "tas" if max(step["plugins/adora/weight_mean"] for step in steps) > 1 else "tds"
    return statistics.fmean(step[f"plugins/adora/frac_{changed}"] for step in steps)


COLLAPSE = ("actor_rollout_ref.actor.ppo_mini_batch_size=4", "actor_rollout_ref.actor.optim.lr=2e-4")
"""Four updates per batch at four times the preset's rate, where the entropy of grpo halves within 30 steps."""
EPO = ("actor_rollout_ref.actor.entropy_coeff=0.02", "actor_rollout_ref.actor.use_kl_loss=false")
EPO += ("plugins.epo.min_ratio=0.8", "plugins.epo.max_ratio=1.2", "plugins.epo.out_range_penalty=1.0")
EPO += ("plugins.epo.schedule=constant",)
"""A band and a penalty that can be seen in 30 steps, and no KL term, which grpo has not either."""
LAW = ("+plugins.entropy_law.min_points=5", "trainer.test_freq=3")
ACCURACY = [Measure("held-out before", held_out(0)), Measure("held-out after", held_out(-1))]
AT_EQUAL_TOKENS = Measure("held-out at equal tokens", held_out_at, equal_tokens=True)
VALIDATED = ("trainer.test_freq=10",)
"""What that column needs: accuracy while training."""
CHOICE = Effect(
    {"grpo (uniform)": ["grpo"], "vade": ["vade"], "mopps": ["mopps"]},
    [
        Measure("mixed groups, all steps", mean_of("health/mixed_groups")),
        Measure("mixed groups, last 15", mean_of("health/mixed_groups", -15)),
        Measure("steps to 0.55 held-out", steps_to(0.55)),
        *ACCURACY,
        AT_EQUAL_TOKENS,
    ],
    common=("trainer.test_freq=5",),
)
EFFECTS = {
    "vade": CHOICE,
    "mopps": CHOICE,
    "clip_cov": Effect(
        {
            "grpo": ["grpo"],
            "clip_cov (authors' settings)": ["clip_cov"],
            "clip_cov, ratio 0.02": ["clip_cov", "plugins.clip_cov.clip_cov_ratio=0.02"],
        },
        [
            Measure("entropy, step 3", at("actor/entropy", 3)),
            Measure("entropy, step 15", at("actor/entropy", 15)),
            Measure("entropy, step 30", at("actor/entropy", 28)),
            *ACCURACY,
        ],
        common=("actor_rollout_ref.actor.optim.lr=3e-4",),
        steps=30,
    ),
    "mc_grpo": Effect(
        {"grpo": ["grpo"], "mc_grpo": ["mc_grpo"]},
        [
            Measure("mixed groups", mean_of("health/mixed_groups")),
            Measure("entropy, last 15", mean_of("actor/entropy", -15)),
            *ACCURACY,
        ],
        common=("actor_rollout_ref.rollout.n=3",),
    ),
    "bnpo": Effect(
        {
            "grpo": ["grpo"],
            "bnpo, grpo's loss": [
                "bnpo",
                "actor_rollout_ref.actor.loss_agg_mode=token-mean",
                "actor_rollout_ref.actor.clip_ratio_high=0.2",
                "actor_rollout_ref.actor.clip_ratio_c=3.0",
            ],
            "bnpo (authors' settings)": ["bnpo"],
        },
        [
            Measure("variance of advantages", advantage_variance),
            Measure("variance of gradient norm", step_variance("actor/grad_norm")),
            *ACCURACY,
        ],
        steps=30,
    ),
    "a_grae": Effect(
        {"grpo": ["grpo"], "a_grae": ["a_grae"]},
        [
            Measure("omega, first 5", mean_of("health/accuracy", 0, 5)),
            Measure("omega, last 5", mean_of("health/accuracy", -5)),
            Measure("positive share, first 5", mean_of("plugins/a_grae/positive_share", 0, 5)),
            Measure("positive share, last 5", mean_of("plugins/a_grae/positive_share", -5)),
            *ACCURACY,
        ],
        steps=30,
    ),
    "adora": Effect(
        {"grpo": ["grpo"], "adora": ["adora"], "adora, paper_llm": ["adora", "plugins.adora.variant=paper_llm"]},
        [
            Measure("re-weighted", reweighted),
            *(Measure(f"level {level} after", level_accuracy(level)) for level in range(4)),
            *ACCURACY,
        ],
        steps=30,
    ),
    "riskpo": Effect(
        {
            "grpo": ["grpo"],
            "riskpo, bundles of 4": ["riskpo", "plugins.riskpo.bundle_size=4"],
            "riskpo, own quantiles": ["riskpo", "plugins.riskpo.bundle_size=4", "plugins.riskpo.quantiles=batch"],
        },
        [
            Measure("entropy, first 5", mean_of("actor/entropy", 0, 5)),
            Measure("entropy, last 5", mean_of("actor/entropy", -5)),
            Measure("hard prompts before", level_accuracy(3, 0)),
            Measure("hard prompts after", level_accuracy(3)),
            *ACCURACY,
        ],
        steps=30,
    ),
    "progrpo": Effect(
        {
            "grpo": ["grpo"],
            "progrpo (alpha 0.3)": ["progrpo"],
            "progrpo, alpha 1": ["progrpo", "plugins.progrpo.alpha=1.0"],
        },
        [
            Measure("entropy, steps 11 to 15", mean_of("health/entropy_mean", 10, 15)),
            Measure("entropy, last 15", mean_of("health/entropy_mean", -15)),
            Measure("mixed groups, last 15", mean_of("health/mixed_groups", -15)),
            *ACCURACY,
        ],
        steps=30,
    ),
    "copo": Effect(
        {
            "grpo": ["grpo"],
            "copo (soft-with-zero)": ["copo"],
            "copo, soft": ["copo", "plugins.copo.gate=soft"],
        },
        [
            Measure("prompts with a signal", groups_with_signal),
            Measure("all wrong groups, last 15", mean_of("health/all_wrong_groups", -15)),
            Measure("entropy, last 15", mean_of("health/entropy_mean", -15)),
            *ACCURACY,
        ],
        steps=30,
    ),
    "drpo": Effect(
        {"grpo": ["grpo"], "drpo": ["drpo"], "drpo, Lambda 1": ["drpo", "plugins.drpo.length_temperature=1.0"]},
        [
            Measure("length of right answers, first 3", mean_where_known("health/length_right", 0, 3)),
            Measure("length of right answers, last 3", mean_where_known("health/length_right", -3)),
            Measure("accuracy, last 3", mean_of("health/accuracy", -3)),
            *ACCURACY,
        ],
        common=("actor_rollout_ref.actor.optim.lr=1e-4",),
        steps=30,
        prepare=worked_sums.prepare,
    ),
    "kl_cov": Effect(
        {
            "grpo": ["grpo"],
            "kl_cov (authors' settings)": ["kl_cov"],
            "kl_cov, ratio 0.2": ["kl_cov", "plugins.kl_cov.kl_cov_ratio=0.2"],
        },
        [
            Measure("entropy, first 5", mean_of("actor/entropy", 0, 5)),
            Measure("entropy, last 5", mean_of("actor/entropy", -5)),
            Measure("accuracy, last 5", mean_of("health/accuracy", -5)),
            *ACCURACY,
        ],
        common=("actor_rollout_ref.actor.ppo_mini_batch_size=4", "actor_rollout_ref.actor.optim.lr=1e-4"),
        steps=20,
    ),
    "steer": Effect(
        {
            "grpo": ["grpo"],
            "steer (exp)": ["steer"],
            "steer, linear": ["steer", "plugins.steer.map=linear"],
            "steer, exp to 0.2": ["steer", "plugins.steer.token_weight_min=0.2"],
        },
        [
            Measure("weight", mean_of("plugins/steer/token_weight_mean")),
            Measure("entropy, first 5", mean_of("actor/entropy", 0, 5)),
            Measure("entropy, steps 11 to 15", mean_of("actor/entropy", 10, 15)),
            Measure("entropy, last 5", mean_of("actor/entropy", -5)),
            *ACCURACY,
        ],
        common=COLLAPSE,
        steps=30,
    ),
    "sage": Effect(
        {"grpo": ["grpo"], "sage": ["sage", *HINTS], "sage-light": ["sage", *HINTS, "plugins.sage.variant=sage-light"]},
        [
            Measure("groups with a success", lambda steps, _: 1 - mean_of("health/all_wrong_groups")(steps, _)),
            Measure("extra responses per failed group", mean_where_known("plugins/sage/extra_rollouts")),
            *(Measure(f"level {level} before", level_accuracy(level, 0)) for level in (2, 3)),
            *(Measure(f"level {level} after", level_accuracy(level)) for level in (2, 3)),
            *ACCURACY,
            AT_EQUAL_TOKENS,
        ],
        common=("data.train_max_samples=96", "actor_rollout_ref.actor.optim.lr=1e-4", *VALIDATED),
        prepare=hinted_sums.prepare,
    ),
    "r3": Effect(
        {"grpo": ["grpo"], "r3": ["r3", AGAIN], "r3, replay only": ["r3", "plugins.r3.reflect_share=0"]},
        [
            Measure("rows with a signal", lambda steps, _: 1 - mean_of("health/zero_advantage_rows")(steps, _)),
            *(Measure(f"level {level} before", level_accuracy(level, 0)) for level in (2, 3)),
            *(Measure(f"level {level} after", level_accuracy(level)) for level in (2, 3)),
            *ACCURACY,
            AT_EQUAL_TOKENS,
        ],
        common=("data.train_max_samples=96", "data.max_prompt_length=48", *VALIDATED),
        steps=30,
    ),
    "prompt_augmentation": Effect(
        {
            "grpo (one format)": ["grpo"],
            "prompt_augmentation": [
                "prompt_augmentation",
                f"plugins.prompt_augmentation.templates=[{formatted_sums.TEMPLATES}]",
                "plugins.prompt_augmentation.validation=plain",
            ],
        },
        [
            Measure("entropy, first 5", mean_of("actor/entropy", 0, 5)),
            Measure("entropy, last 5", mean_of("actor/entropy", -5)),
            Measure("distinct in 8, first 5", mean_of("rollouts/distinct", 0, 5)),
            Measure("distinct in 8, last 5", mean_of("rollouts/distinct", -5)),
            Measure("format reward, first 5", mean_where_known("plugins/prompt_augmentation/format_mean", 0, 5)),
            Measure("format reward, last 5", mean_where_known("plugins/prompt_augmentation/format_mean", -5)),
            *ACCURACY,
            AT_EQUAL_TOKENS,
        ],
        common=("data.train_max_samples=96", *COLLAPSE, *VALIDATED),
        steps=30,
        prepare=formatted_sums.prepare,
    ),
    "dcpo": Effect(
        {
            "grpo": ["grpo"],
            "dcpo (target 0.25)": ["dcpo"],
            "dcpo, target 0.5": ["dcpo", "plugins.dcpo.entropy_base=0.5"],
        },
        [
            Measure("entropy, first 5", mean_of("actor/entropy", 0, 5)),
            Measure("entropy, last 5", mean_of("actor/entropy", -5)),
            Measure("T, first 5", mean_of("plugins/dcpo/temperature", 0, 5)),
            Measure("T, last 5", mean_of("plugins/dcpo/temperature", -5)),
            Measure("alpha", mean_of("plugins/dcpo/alpha")),
            Measure("seconds per step", mean_of("timing_s/step", 5)),
            Measure("seconds in stages", mean_of("timing_s/stages", 5)),
            *ACCURACY,
        ],
        common=COLLAPSE,
        steps=30,
    ),
    "epo": Effect(
        {
            "grpo": ["grpo"],
            "bonus 0.02": ["grpo", "actor_rollout_ref.actor.entropy_coeff=0.02"],
            "epo, bonus 0.02, hinge": ["epo", *EPO],
        },
        [
            Measure("entropy, first 5", mean_of("actor/entropy", 0, 5)),
            Measure("entropy, last 5", mean_of("actor/entropy", -5)),
            Measure("variance of entropy", step_variance("actor/entropy")),
            Measure("inside the band", mean_of("plugins/epo/within_band_fraction")),
            *ACCURACY,
        ],
        common=COLLAPSE,
        steps=30,
    ),
    "entropy_law": Effect(
        {"grpo": ["grpo"], "clip_cov": ["clip_cov"], "bonus 0.02": ["grpo", EPO[0]]},
        [
            Measure("ceiling at half", law_at_half("ceiling")),
            Measure("r2 at half", law_at_half("r2")),
            Measure("error in the second half", law_error),
            Measure("entropy, last 5", mean_of("actor/entropy", -5)),
            *ACCURACY,
        ],
        common=(*COLLAPSE, *LAW),
        steps=30,
    ),
    "siri": Effect(
        {
            "grpo (32 tokens)": ["grpo"],
            "siri (32 to 8 to 32)": ["siri", "plugins.siri.cycle_length=30", "plugins.siri.min_length=8"],
        },
        [
            Measure("length, first 3", mean_of("response_length/mean", 0, 3)),
            Measure("length, steps 15 to 17", mean_of("response_length/mean", 14, 17)),
            Measure("length, last 3", mean_of("response_length/mean", -3)),
            Measure("truncated, steps 15 to 17", mean_of("health/truncated", 14, 17)),
            Measure("truncated, last 3", mean_of("health/truncated", -3)),
            *ACCURACY,
        ],
        common=("actor_rollout_ref.actor.optim.lr=1e-4",),
        steps=30,
        prepare=worked_sums.prepare,
    ),
    "ttrl": Effect(
        {
            "grpo (with labels)": ["grpo", "actor_rollout_ref.rollout.n=8"],
            "ttrl (32 votes, 8 trained on)": ["ttrl", "plugins.ttrl.n_votes=32", "actor_rollout_ref.rollout.n=8"],
        },
        [
            Measure("majority right, first 5", mean_of("plugins/ttrl/label_accuracy", 0, 5)),
            Measure("majority right, last 5", mean_of("plugins/ttrl/label_accuracy", -5)),
            Measure("rewards right, last 5", mean_of("plugins/ttrl/reward_accuracy", -5)),
            *ACCURACY,
        ],
        steps=40,
    ),
}


def run_folder(out: Path, arguments: Sequence[str], steps: int, seed: int) -> Path:
    """The same for the same run, whichever comparison asks for it."""
    digest = hashlib.sha256(json.dumps([*arguments, steps]).encode()).hexdigest()[:8]
    return out / f"{arguments[0]}-{digest}-seed{seed}"


def run(folder: Path, arguments: Sequence[str], steps: int, seed: int) -> Path:
    """One training, unless its metrics are already there."""
    done = folder / "done"
    folder.mkdir(parents=True, exist_ok=True)
    if not done.exists():
        recipe, *overrides = arguments
        command = [sys.executable, "-m", "verl_plugins", "run", recipe, *overrides, "--preset", "cpu"]
        command += ["--out", str(folder), f"trainer.total_training_steps={steps}", "trainer.resume_mode=disable"]
        command += [f"trainer.{kind}_data_dir={folder / f'{kind}s'}" for kind in ("rollout", "validation")]
        command += [f"data.seed={seed}", f"actor_rollout_ref.rollout.seed={seed}"]
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
        done.touch()
    return folder


def read_run(folder: Path) -> tuple[list[dict], list[tuple[int, dict]]]:
    """Metrics of every step with the mean number of distinct answers to a prompt, and of every validation with the
    accuracy by level of the CPU task."""
    steps, validations = read_metrics(folder / "metrics.jsonl")
    for metrics in steps:
        answers: dict[str, set[str]] = {}
        dump = folder / "rollouts" / f"{metrics['step']}.jsonl"
        for row in map(json.loads, dump.read_text().splitlines() if dump.exists() else ()):
            answers.setdefault(row["input"], set()).add(row["output"])
        if answers:
            metrics["rollouts/distinct"] = statistics.fmean(map(len, answers.values()))
    for step, metrics in validations:
        levels: dict[int, list[float]] = {}
        dump = folder / "validations" / f"{step}.jsonl"
        for row in map(json.loads, dump.read_text().splitlines() if dump.exists() else ()):
            if asked := SUM.search(row["input"]):
                level = sum(int(digit) >= TaskSettings.large_from for digit in asked[0][:-1].split("+"))
                levels.setdefault(level, []).append(row["acc"])
        metrics |= {f"accuracy/level {level}": statistics.fmean(right) for level, right in levels.items()}
    return steps, validations


def table(effect: Effect, folders: dict[tuple[str, int], Path]) -> str:
    """A markdown table: mean and standard deviation over seeds."""
    lines = ["| variant | " + " | ".join(measure.title for measure in effect.measures) + " |"]
    lines.append("|---" * (len(effect.measures) + 1) + "|")
    runs = {key: read_run(folder) for key, folder in folders.items()}
    counted = [generated[-1] for steps, _ in runs.values() if (generated := tokens_so_far(steps))]
    cheapest = min(counted, default=0.0)
    for variant in effect.variants:
        data = [run for (name, _), run in runs.items() if name == variant]
        cells = []
        for measure in effect.measures:
            values = [measure.value(*one, *([cheapest] if measure.equal_tokens else [])) for one in data]
            if None in values:
                cells.append("—")
                continue
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.fmean(values):.3f} ± {spread:.3f}")
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("effects", nargs="+", choices=EFFECTS, metavar="METHOD", help=", ".join(EFFECTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at the same time")
    parser.add_argument("--out", type=Path, default=Path("runs/effects"))
    options = parser.parse_args()
    seeds = range(1, options.seeds + 1)
    folders: dict[str, dict[tuple[str, int], Path]] = {}
    todo: dict[Path, tuple[list[str], int, int]] = {}
    for name in options.effects:
        effect, folders[name] = EFFECTS[name], {}
        common = [*effect.common, *(effect.prepare(options.out / effect.prepare.__module__) if effect.prepare else [])]
        for seed, (variant, arguments) in itertools.product(seeds, effect.variants.items()):
            one = ([*arguments, *common], effect.steps, seed)
            folders[name][variant, seed] = run_folder(options.out, *one)
            todo[folders[name][variant, seed]] = one
    with ThreadPoolExecutor(options.jobs) as pool:
        running = [pool.submit(run, folder, *one) for folder, one in todo.items()]
        for number, future in enumerate(running, 1):
            print(f"{number}/{len(running)} {future.result().name}", file=sys.stderr, flush=True)
    for name in options.effects:
        text = table(EFFECTS[name], folders[name])
        (options.out / f"{name}.json").write_text(json.dumps({"seeds": options.seeds, "table": text}))
        print(f"{name}, {options.seeds} seeds\n\n{text}\n")


if __name__ == "__main__":
    main()
