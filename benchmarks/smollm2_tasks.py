"""Where SmolLM2 starts on tasks of reasoning-gym: share of right answers, of mixed groups, of answers cut off.

    python benchmarks/smollm2_tasks.py [TASK[:key=value,…]]… [--questions N] [--tokens N]

Answers are sampled as in training, eight to a question, and scored by the plugin `reasoning_gym`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from verl_plugins.composition.cache import cache_folder, make_once
from verl_plugins.cpu.generation import Request, generate
from verl_plugins.cpu.smollm2 import FORMAT, VERSION, write_model
from verl_plugins.data.gym import Options, parse_settings, write
from verl_plugins.reward.gym_scoring import load
from verl_plugins.reward.reasoning_gym import answer_of

GROUP = 8
SUFFIX = "Put the final answer between <answer> and </answer>."
DEFAULT = ("basic_arithmetic:min_terms=2,max_terms=2", "chain_sum:min_terms=2,max_terms=3", "spell_backward")


def questions(task: str, settings: list[str], count: int, suffix: str) -> pd.DataFrame:
    """Rows as `verl-plugins data gym` writes them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.parquet"
        options = Options(rows=count, settings=parse_settings(settings, [task]), suffix=suffix)
        write({task: 1.0}, file, options)
        return pd.read_parquet(file)


def measure(model: torch.nn.Module, tokenizer, rows: pd.DataFrame, tokens: int) -> str:
    """One line about a task."""
    score, right, cut, length, said = load(), [], [], [], []
    for number, row in enumerate(rows.itertuples()):
        prompt = tokenizer.apply_chat_template([*row.prompt], add_generation_prompt=True, return_dict=False)
        length.append(len(prompt))
        asked = [Request(prompt, tokens, seed=number * GROUP + place) for place in range(GROUP)]
        for done in generate(model, tokenizer, asked):
            text = tokenizer.decode(done.token_ids, skip_special_tokens=True)
            request = {"task": row.extra_info["task"], "entry": row.extra_info["entry"], "answer": answer_of(text)}
            right.append(score(request)["score"])
            cut.append(not done.ended)
            said.append(text)
    groups = torch.tensor(right).view(-1, GROUP)
    solved = (groups >= 1).double().mean(1)
    mixed = ((solved > 0) & (solved < 1)).double().mean()
    shown = " | ".join(" ".join(text.split())[:60] for text in said[:: 3 * GROUP][:3])
    return (
        f"right {solved.mean():.3f}  score {groups.mean():.3f}  mixed groups {mixed:.2f}  cut off "
        f"{sum(cut) / len(cut):.2f}  prompts up to {max(length)} tokens  e.g. {shown}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", default=DEFAULT)
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--suffix", default=SUFFIX)
    options = parser.parse_args()
    folder = cache_folder() / f"smollm2-{VERSION}-{FORMAT}"
    make_once(folder, write_model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for one in options.tasks:
        task, _, settings = one.partition(":")
        rows = questions(task, settings.split(",") if settings else [], options.questions, options.suffix)
        print(f"{one}: {measure(model, tokenizer, rows, options.tokens)}", flush=True)


if __name__ == "__main__":
    main()
