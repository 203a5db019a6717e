"""The report on an assistant: which tasks it gets right.

N instructions   K samples of each
"""

from typing import Any

import numpy as np

from jaxgpt.posttrain.rewards import decode_responses
from jaxgpt.posttrain.rollout import Rules, respond, special_ids
from jaxgpt.run import Run, text_tokenizer
from jaxgpt.text.assistant import make_tasks
from jaxgpt.text.instructions import FAMILIES, LONGEST, Task, is_right
from jaxgpt.text.preferences import encode_prompts
from jaxgpt.text.tables import SPLITS

_SAMPLES = 8  # K
_EACH = 100  # most instructions of a family
_SEED = 1337


def evaluate_tasks(run: Run, split: str) -> dict[str, Any]:
    """Measures pass@1 and pass@8 on instructions of a split, up to 100 of a family.

    Once phrased as in training, and once in ways that training never has. The arguments
    of the instructions are those of the split in both.

    Returns a dict of "instructions" and "phrasings", each with `pass_rates`.
    """
    report = {}
    for part in ("instructions", "phrasings"):
        families: dict[str, dict[str, Task]] = {name: {} for name in FAMILIES}
        for task in make_tasks(part == "phrasings"):
            if split in ("all", SPLITS[task.split]):
                families[task.family][task.instruction.rstrip(".?").casefold()] = task
        tasks = [t for found in families.values() for t in [*found.values()][:_EACH]]
        report[part] = pass_rates(tasks, right_answers(run, tasks))
    return report


def right_answers(run: Run, tasks: list[Task]) -> np.ndarray:
    """Whether the greedy response and K sampled ones are right, bool [N, 1 + K].

    The samples are at temperature 1.
    """
    prompts = [[("user", task.instruction)] for task in tasks]
    rows = encode_prompts(text_tokenizer(run), run.config, prompts)
    texts = _responses(run, rows, 0.0) + _responses(run, rows * _SAMPLES, 1.0)
    asked = zip(tasks * (1 + _SAMPLES), texts, strict=True)
    right = [is_right(task.instruction, text) for task, text in asked]
    return np.array(right).reshape(1 + _SAMPLES, -1).T


def _responses(run: Run, rows: list[np.ndarray], temperature: float) -> list[str]:
    tokenizer = text_tokenizer(run)
    rules = Rules(LONGEST, special_ids(tokenizer), temperature=temperature)
    return decode_responses(respond(run, rows, rules, _SEED), tokenizer)[1]


def pass_rates(tasks: list[Task], right_NK: np.ndarray) -> dict[str, Any]:
    """The share of tasks whose first response is right, and that of any other one.

    These are pass@1 of the greedy response, and pass@K, K being one less than the
    columns; of all tasks, and of each family. The standard error is that of pass@1.
    """
    family_N = np.array([task.family for task in tasks])
    families = {f: _rates(right_NK[family_N == f]) for f in FAMILIES if f in family_N}
    return {**_rates(right_NK), "families": families}


def _rates(right_NK: np.ndarray) -> dict[str, Any]:
    p, count = float(right_NK[:, 0].mean()), len(right_NK)
    return {
        "count": count,
        "pass_at_1": p,
        "standard_error": (p * (1 - p) / count) ** 0.5,
        f"pass_at_{_SAMPLES}": float(right_NK[:, 1:].any(axis=1).mean()),
    }


def show_tasks(report: dict[str, Any]) -> None:
    """Prints a line for each family, and one for all."""
    print(f"{'pass@1 and pass@' + str(_SAMPLES):24}instructions    held-out phrasings")
    for family in [*report["instructions"]["families"], "all"]:
        line = f"{family:24}"
        for rates in report.values():
            row = rates if family == "all" else rates["families"].get(family)
            names = "pass_at_1", f"pass_at_{_SAMPLES}"
            line += "   ".join(f"{row[name]:.3f}" if row else "-" for name in names)
            line += "   "
        print(line.rstrip())
