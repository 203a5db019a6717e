"""Speed and memory of `python -m jaxgpt prepare`, against tiktoken alone.

python -m benchmarks.prepare [--megabytes N] [--rounds N] [--text FILE]

Both tokenize the same documents of 1,000 characters for GPT-2, cut from random places
of Tiny Shakespeare or of another text:
- jaxgpt: the whole command from its start to the manifest, from JSONL to shards.
- tiktoken: `encode_ordinary_batch` of documents that are in memory, on all cores.

They take turns (benchmarks/rounds.py). The peak of jaxgpt is the largest sum of PSS
(memory with shared pages divided among their processes) over its processes, sampled
twice a second. Writes benchmarks/prepare.json.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import tyro

from benchmarks.rounds import (
    ROOT,
    Facts,
    Run,
    compete,
    machine,
    rates,
    reasons,
    settle,
    wanted,
    write_json,
)

CONTENDERS = ("jaxgpt", "tiktoken")
OUT = Path(__file__).with_suffix(".json")
_DOCUMENT = 1000  # characters
_INTERVAL = 0.5  # seconds between samples of memory, which take 10 ms each
_BATCH = 10_000  # documents in a call of tiktoken, whose lists of ids take memory


@dataclass(frozen=True)
class Arguments:
    """Compares the speed of preparing a corpus with that of tiktoken, in turn."""

    megabytes: float = 200  # size of the text, in millions of bytes
    rounds: int = 3  # rounds per contender, in turn
    text: Path | None = None  # UTF-8 text to cut documents from
    contenders: tuple[str, ...] = ()  # only contenders whose names contain one of these
    out: Path = OUT  # the report


def main() -> int:
    """Measures, prints and writes the report; returns 1 if a contender failed."""
    arguments = tyro.cli(Arguments, prog="python -m benchmarks.prepare")
    settle("cpu")
    report = machine("benchmarks.prepare")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "documents.jsonl"
        report |= write_documents(path, read_text(arguments.text), arguments.megabytes)
        names = wanted(CONTENDERS, arguments.contenders)
        tasks: dict[str, Facts] = {
            name: {"contender": name, "documents": str(path)} for name in names
        }
        found = compete("benchmarks.prepare", tasks, arguments.rounds)
    report |= judge(found, report["text_bytes"])
    for name, facts in found.items():
        if "rounds" not in facts:
            print(f"{name:10}{reasons(facts)}")
            continue
        speed, peak = facts["mb_per_second"], facts["peak_mib"]
        spread = f"{speed['lowest']:.2f} - {speed['highest']:.2f}"
        memory = f"{peak:.0f} MiB" if peak else "unknown"
        print(f"{name:10}{speed['median']:7.2f} MB/s  ({spread}), peak {memory}")
    if report["ratio"]:
        print(f"jaxgpt has {report['ratio']:.2f} of tiktoken's speed")
    write_json(arguments.out, report)
    return int(any("failed" in facts for facts in found.values()))


def read_text(path: Path | None) -> str:
    """Reads the file, or Tiny Shakespeare, which is fetched on first use."""
    from jaxgpt.terminal import log_line
    from jaxgpt.text import tinyshakespeare

    return (path or tinyshakespeare.find_text(log_line)).read_text(encoding="utf-8")


def write_documents(path: Path, text: str, megabytes: float) -> dict[str, int]:
    """Writes JSONL with so many MB of text; returns its documents and bytes."""
    rng, documents, size = np.random.default_rng(0), 0, 0
    with path.open("w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            start = int(rng.integers(max(1, len(text) - _DOCUMENT)))
            document = text[start : start + _DOCUMENT]
            file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
            documents, size = documents + 1, size + len(document.encode())
    return {"documents": documents, "text_bytes": size}


def build(contender: str, documents: str) -> tuple[Facts, Run]:
    """Returns the facts and the round of a contender, for `compete`."""
    if contender == "jaxgpt":
        return {}, lambda: {"peak_mib": prepare(documents)}
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    from jaxgpt.text.pretrained import gpt2_tokenizer

    gpt2 = gpt2_tokenizer()
    ranks = {gpt2.decode_bytes([id_]): id_ for id_ in range(gpt2.end_of_text or 0)}
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={}
    )
    with Path(documents).open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]

    def encode() -> None:
        for first in range(0, len(texts), _BATCH):
            batch = texts[first : first + _BATCH]
            encoding.encode_ordinary_batch(batch, num_threads=os.cpu_count() or 1)

    return {}, encode


def prepare(documents: str) -> float:
    """Prepares the documents into a temporary folder; returns the peak PSS in MiB.

    Raises CalledProcessError if the command fails.
    """
    command, peak = [sys.executable, "-m", "jaxgpt", "prepare", documents], 0.0
    with tempfile.TemporaryDirectory() as folder:
        command += ["--out-dir", f"{folder}/tokens", "--tokenizer", "gpt2"]
        with subprocess.Popen(command, cwd=ROOT) as process:
            while process.poll() is None:
                peak = max(peak, sum(pss(process.pid)))
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_INTERVAL)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return peak


def pss(pid: int) -> Iterator[float]:
    """PSS in MiB of a process and of each of its descendants that still run."""
    with suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with suppress(OSError):  # it has ended, or this is not Linux
                rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                yield int(rollup.split("\nPss:")[1].split()[0]) / 1024


def judge(found: dict[str, Facts], size: int) -> Facts:
    """Adds MB/s to each contender's facts; returns them with the ratio of the medians.

    The ratio is None unless both have rounds.
    """
    for facts in found.values():
        if "rounds" in facts:
            facts["mb_per_second"] = rates(facts | {"MB": size / 1e6}, "MB")
    ours, theirs = (found.get(name, {}).get("mb_per_second") for name in CONTENDERS)
    ratio = ours["median"] / theirs["median"] if ours and theirs else None
    return {"contenders": found, "ratio": ratio}


if __name__ == "__main__":
    sys.exit(main())
