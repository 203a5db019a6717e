"""Continues a prompt with a trained model, as it is drawn.

python generate.py --run-dir runs/shakespeare-char-cpu --prompt "ROMEO:"
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from jaxgpt import exits, start
from jaxgpt.config import MeshConfig, SamplingConfig
from jaxgpt.files import log_line
from jaxgpt.generation.stream import stream_text
from jaxgpt.parallel.mesh import model_mesh
from jaxgpt.run import Run, load_config, load_run, text_tokenizer
from jaxgpt.text.tokenizer import encode_prompt


@dataclass(frozen=True)
class Arguments:
    """Samples from a run: prompt and continuation on stdout, all else on stderr."""

    run_dir: Path  # as train.py --out-dir made it
    checkpoint: str = "best"  # best (lowest val loss), latest, or a step
    # text to continue (--prompt=TEXT if it begins with a dash), or FILE:name; empty
    # stands for a newline
    prompt: str = ""
    max_new_tokens: int = 500  # tokens to draw for each sample
    num_samples: int = 1  # continuations; the first is shown live, the others after it
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = field(
        default_factory=SamplingConfig
    )
    seed: int = 1337  # the same seed gives the same text
    # a sample ends before this text, or where the model ends the document
    stop: str = ""
    # how devices share a model that is too large for one: by fsdp, by tensor
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1))


def main() -> None:
    """Parses the command line, loads the run, prints the samples."""
    arguments = tyro.cli(Arguments, prog="generate.py")
    start.start()
    mesh = model_mesh(load_config(arguments.run_dir), arguments.mesh)
    run = load_run(arguments.run_dir, arguments.checkpoint, mesh)
    prompt = read_prompt(arguments.prompt, run)
    # A prompt may hold what stdout cannot encode: argv's bytes that are no UTF-8.
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    texts, shown = [""] * arguments.num_samples, prompt
    for new_texts in stream_text(
        run,
        prompt,
        max_new_tokens=arguments.max_new_tokens,
        num_samples=arguments.num_samples,
        sampling=arguments.sampling,
        seed=arguments.seed,
        stop=arguments.stop,
    ):
        print(shown + new_texts[0], end="", flush=True)
        shown = ""
        texts = [text + new for text, new in zip(texts, new_texts, strict=True)]
    for text in texts[1:]:
        print(f"\n{'-' * 40}\n{prompt}{text}", end="")
    print()


def read_prompt(prompt: str, run: Run) -> str:
    """The prompt's text; says so if the model will not see all of it."""
    if prompt.startswith("FILE:"):
        path = Path(prompt.removeprefix("FILE:"))
        try:
            prompt = path.read_bytes().decode("utf-8")
        except ValueError as error:  # also of a name that no file can have
            raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    tokenizer = text_tokenizer(run)
    prompt = prompt or tokenizer.start
    count, window = len(encode_prompt(tokenizer, prompt)), run.config.model.block_size
    if count > window:
        log_line(f"the prompt has {count} tokens; the model sees the last {window}")
    return prompt


if __name__ == "__main__":
    with exits.plain_errors():
        main()
