"""Continues a prompt with a trained model, and prints the text as it is generated.

python generate.py --run-dir runs/shakespeare-char-cpu --prompt "ROMEO:"
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxgpt import exits, start
from jaxgpt.cli import parse_flags
from jaxgpt.config import MeshConfig, SamplingConfig, sampling_contradictions
from jaxgpt.files import not_utf8
from jaxgpt.generation.stream import stream_text
from jaxgpt.parallel.mesh import model_mesh
from jaxgpt.posttrain.best_of import best_of as find_best
from jaxgpt.run import Run, load_config, load_run, prompt_tokens, require_task
from jaxgpt.terminal import log_line


@dataclass(frozen=True)
class Arguments:
    """Samples from a run: text goes to stdout, everything else to stderr."""

    run_dir: Path  # run directory written by train.py
    checkpoint: str = "best"  # best (lowest val loss), latest, or a step
    # text to continue, or FILE:PATH to read it from a file; by default a newline, or
    # nothing if the run has packing=documents or conversations; use --prompt=TEXT if
    # the text begins with a dash
    prompt: str = ""
    max_new_tokens: int = 500  # tokens to generate for each sample
    num_samples: int = 1  # samples; the first is printed live, then the others
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = field(
        default_factory=SamplingConfig
    )
    seed: int = 1337  # random seed; the same seed gives the same text
    # a sample ends before this text, or where the model ends the document
    stop: str = ""
    # print the best of so many continuations for each sample, by a reward model
    best_of: int | None = None
    reward_model: Path | None = None  # run directory of the reward model
    # how to shard a model that is too large for one device: fsdp, tensor
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1))


def main() -> None:
    """Parses the command line, loads the run and prints samples."""
    arguments = parse_flags(tyro.cli, Arguments, sys.argv[1:], prog="generate.py")
    start.start()
    judge_dir, best_of = arguments.reward_model, arguments.best_of
    if (judge_dir is None) != (best_of is None):
        raise ValueError(
            "--best-of N and --reward-model RUN_DIR need each other; give both or none"
        )
    count = arguments.num_samples * (best_of or 1)
    for line in sampling_contradictions(arguments.sampling, count):
        log_line(line)
    config = load_config(arguments.run_dir)
    require_task(config, "next-token")
    mesh = model_mesh(config, arguments.mesh)
    run = load_run(arguments.run_dir, arguments.checkpoint, mesh)
    prompt = read_prompt(arguments.prompt, run)
    names = ("max_new_tokens", "num_samples", "sampling", "seed", "stop")
    options: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    if judge_dir is not None and best_of is not None:
        judge = load_run(judge_dir)
        for n, best in enumerate(find_best(run, judge, prompt, best_of, **options)):
            separator = f"{'-' * 40}\n" if n else ""
            print(f"{separator}{prompt}{best.text}", flush=True)
            log_line(f"reward {best.reward:.4f}, the highest of {best_of}")
        return
    texts, prefix = [""] * arguments.num_samples, prompt
    for new_texts in stream_text(run, prompt, **options):
        print(prefix + new_texts[0], end="", flush=True)
        prefix = ""
        texts = [text + new for text, new in zip(texts, new_texts, strict=True)]
    for text in texts[1:]:
        print(f"\n{'-' * 40}\n{prompt}{text}", end="")
    print()


def read_prompt(prompt: str, run: Run) -> str:
    """Returns the prompt's text; logs if it is longer than the context window."""
    if prompt.startswith("FILE:"):
        path = Path(prompt.removeprefix("FILE:"))
        try:
            prompt = path.read_bytes().decode("utf-8-sig")  # without a byte order mark
        except UnicodeDecodeError as error:
            raise not_utf8(path, error) from error
        except ValueError as error:  # a path with a null byte
            raise ValueError(f"{path} can't be read: {error}") from error
    (prompt, ids), window = prompt_tokens(run, prompt), run.config.model.block_size
    if len(ids) > window:
        log_line(f"the prompt has {len(ids)} tokens; the model sees the last {window}")
    return prompt


if __name__ == "__main__":
    with exits.plain_errors():
        main()
