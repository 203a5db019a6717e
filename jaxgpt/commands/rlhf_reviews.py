"""RLHF on movie reviews, from pre-training to the report: rlhf-reviews."""

import json
from pathlib import Path
from typing import Literal

import tyro

from jaxgpt.config import check_seed
from jaxgpt.files import replace_file
from jaxgpt.rlhf_reviews.arms import SCALES
from jaxgpt.rlhf_reviews.judges import check_installed
from jaxgpt.rlhf_reviews.stages import run_experiment
from jaxgpt.terminal import log_line
from jaxgpt.text.reviews import find_reviews
from jaxgpt.text.tables import digest_files


def rlhf_reviews(
    out_dir: Path | None = None,
    seeds: tuple[int, ...] = (1337, 1338, 1339),
    scale: Literal["full", "tiny"] = "full",
    without_beta_zero: tyro.conf.FlagCreatePairsOff[bool] = False,
    reviews: Path | None = None,
) -> int:
    """Tunes a language model for positive reviews in several ways, and judges them.

    The same command goes on where an earlier one was stopped. It ends with report.md,
    report.json and gold.png in the folder.

    Args:
        out_dir: folder of the experiment; default: runs/rlhf-reviews, or with tiny
            runs/rlhf-reviews-trial
        seeds: seeds of everything from the reward model on
        scale: all of the experiment, or a trial that shows only that everything works
        without_beta_zero: leave out PPO without a penalty, which takes long
        reviews: JSONL of text, label (0 or 1) and source in place of the package's
    """
    check_installed()
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {seeds} must be one or more distinct seeds")
    for seed in seeds:
        check_seed(seed)
    name = "rlhf-reviews" if scale == "full" else "rlhf-reviews-trial"
    out, settings = (out_dir or Path("runs", name)).resolve(), SCALES[scale]
    reviews = reviews or find_reviews(log_line)
    content = settings.to_dict() | {"reviews_sha256": digest_files([reviews])}
    _check_settings(out / "settings.json", json.loads(json.dumps(content)))
    arms = [arm for arm in settings.arms if not (without_beta_zero and arm == "beta-0")]
    run_experiment(out, settings, reviews, seeds, arms)
    print((out / "report.md").read_text(encoding="utf-8"), end="")
    return 0


def _check_settings(path: Path, content: dict[str, object]) -> None:
    """Writes the settings, or raises ValueError if the folder has others."""
    if not path.exists():
        text = json.dumps(content, indent=1) + "\n"
        replace_file(path, lambda tmp_path: tmp_path.write_text(text, encoding="utf-8"))
    saved = json.loads(path.read_text(encoding="utf-8"))
    if changed := [n for n in content if saved.get(n) != content[n]]:
        raise ValueError(
            f"{path.parent} holds an experiment with other settings ({changed[0]}); "
            "choose another --out-dir"
        )
