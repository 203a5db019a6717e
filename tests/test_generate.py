import gzip
import re
from functools import partial

import pytest
from conftest import start_script

from jaxgpt import generate, load_run


@pytest.fixture
def sample(call, tiny_run):
    """Calls generate.py on a run; returns stdout and stderr."""
    return partial(call, "generate.py", "--run-dir", tiny_run)


SAMPLING = {"temperature": 0.9, "top_k": 9, "top_p": 0.95}


@pytest.mark.parametrize(
    ("flags", "prompt", "options"),
    [
        ("", "\n", {}),
        ("--prompt To --stop e", "To", {"stop": "e"}),
        (
            "--prompt be --max-new-tokens 60 --num-samples 3 --seed 5"
            " --temperature 0.9 --top-k 9 --top-p 0.95",
            "be",
            dict(max_new_tokens=60, num_samples=3, seed=5, **SAMPLING),
        ),
    ],
)
def test_stdout_is_the_prompt_and_the_librarys_text_of_each_sample(
    sample, tiny_run, flags, prompt, options
):
    texts = generate(load_run(tiny_run), prompt, **options)
    assert len(set(texts)) == options.get("num_samples", 1)
    samples = [f"{prompt}{text}\n" for text in texts]
    assert sample(*flags.split()) == (f"{'-' * 40}\n".join(samples), "")


def test_the_prompt_is_printed_once_even_if_the_text_stops_at_once(sample):
    greedy = ["--prompt", "To", "--temperature", "0"]
    first = sample(*greedy).out[2]
    out, err = sample(*greedy, "--stop", first, "--num-samples", "2")
    assert out == "To\n" + "-" * 40 + "\nTo\n"
    assert "2 samples are the same" in err


def test_a_prompt_comes_from_a_file_and_is_cropped_to_the_window(sample, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("not to be or not", encoding="utf-8-sig")
    out, err = sample("--prompt", f"FILE:{path}", "--max-new-tokens", "20")
    assert re.findall(r"\d+", err) == ["16", "8"]  # tokens, and those that fit
    cropped = sample("--prompt", "e or not", "--max-new-tokens", "20").out
    assert out == "not to b" + cropped
    utf16, gz = "be".encode("utf-16"), gzip.compress(b"be")
    advice = {utf16: "iconv -f UTF-16 ", b"\xe9": "iconv -f LATIN1 ", gz: "zcat "}
    for content, way_out in advice.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"prompt\.txt .*{way_out}"):
            sample("--prompt", f"FILE:{path}")


def test_every_checkpoint_can_be_sampled(sample, tiny_run):
    step = load_run(tiny_run).step
    assert sample("--checkpoint", step).out == sample("--checkpoint", "latest").out


@pytest.mark.processes
def test_a_reader_that_goes_away_ends_the_command_without_a_message(tiny_run):
    process = start_script("generate.py", "--run-dir", tiny_run)
    process.stdout.close()
    said = process.stderr.read().splitlines()
    assert [line for line in said if not line.startswith("compiled ")] == []
    process.stderr.close()
    assert process.wait(timeout=1200) == 1
