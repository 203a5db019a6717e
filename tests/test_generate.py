import re
from functools import partial

import pytest
from conftest import assert_every_flag_is_explained, finish, start_script

from jaxgpt import load_run


@pytest.fixture
def sample(call, tiny_run):
    """Calls generate.py on a run; returns stdout and stderr."""
    return partial(call, "generate.py", "--run-dir", tiny_run)


def test_stdout_is_prompt_and_continuation_and_nothing_else(sample):
    out, err = sample("--prompt", "be", "--max-new-tokens", "30")
    assert out.startswith("be")
    assert len(out) == 2 + 30 + 1
    assert err == ""


def test_the_same_seed_gives_the_same_text(sample):
    one, again, other = (sample("--seed", seed).out for seed in ("1", "1", "2"))
    assert one == again != other
    assert one.startswith("\n")  # the empty prompt
    assert len(one) == 1 + 500 + 1


def test_samples_are_separated_by_dashes_and_the_first_is_the_single_one(sample):
    single = sample("--prompt", "To", "--max-new-tokens", "40").out
    out = sample("--prompt", "To", "--max-new-tokens", "40", "--num-samples", "3").out
    samples = re.split(r"\n-{40}\n", out)
    assert samples[0] + "\n" == single
    assert len(samples) == len(set(samples)) == 3
    assert all(text.startswith("To") for text in samples)


def test_a_prompt_comes_from_a_file_and_is_cropped_to_the_window(sample, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("not to be or not")
    out, err = sample("--prompt", f"FILE:{path}", "--max-new-tokens", "20")
    assert out.startswith("not to be or not")
    assert err == "the prompt has 16 tokens; the model sees the last 8\n"
    cropped = sample("--prompt", "e or not", "--max-new-tokens", "20").out
    assert out.endswith(cropped)


def test_greedy_does_not_depend_on_the_seed(sample):
    one, other = (sample("--temperature", "0", "--seed", s).out for s in ("1", "2"))
    assert one == other


def test_the_prompt_is_printed_once_even_if_the_text_stops_at_once(sample):
    greedy = ["--prompt", "To", "--temperature", "0"]
    first = sample(*greedy).out[2]
    out = sample(*greedy, "--stop", first, "--num-samples", "2").out
    assert out == "To\n" + "-" * 40 + "\nTo\n"


def test_text_ends_before_the_stop_text(sample):
    whole = sample("--prompt", "To").out
    stopped = sample("--prompt", "To", "--stop", whole[20:22]).out
    assert stopped == "To" + whole[2:-1].split(whole[20:22])[0] + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stop", "Zounds"], "'Z' at position 0 is not in the vocabulary"),
        (["--seed", "99999999999"], "seed=99999999999 must be from 0 to 4294967295"),
        (
            ["--prompt", "Zounds"],
            "character 'Z' at position 0 is not in the vocabulary",
        ),
        (["--top-k", "99"], "top_k=99 is above vocab_size=11"),
        (["--max-new-tokens", "0"], "max_new_tokens=0 must be at least 1"),
        (["--num-samples", "0"], "num_samples=0 must be at least 1"),
        (["--checkpoint", "3"], "checkpoint '3' is not one of: best, latest, 8"),
        (["--prompt", "FILE:/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_is_an_error_that_names_it(sample, arguments, message):
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        sample(*arguments)


def test_an_unknown_flag_names_the_nearest(sample, capsys):
    with pytest.raises(SystemExit):
        sample("--tmperature", "1")
    assert "--temperature" in capsys.readouterr().err


def test_help_explains_every_flag(sample, capsys):
    with pytest.raises(SystemExit):
        sample("--help")
    assert_every_flag_is_explained(capsys.readouterr().out)


def test_a_prompt_file_that_is_not_utf8_is_named(sample, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"prompt\.txt is not UTF-8 text"):
        sample("--prompt", f"FILE:{path}")


def test_the_command_prints_errors_as_one_line(tmp_path):
    process = start_script("generate.py", "--run-dir", tmp_path)
    out, err = finish(process, code=1)
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(f"error: {tmp_path} is not a run")


def test_a_reader_that_goes_away_ends_the_command_quietly(smoke):
    process = start_script("generate.py", "--run-dir", smoke[0])
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=120) == 1


def test_every_checkpoint_can_be_sampled(sample, tiny_run):
    step = str(load_run(tiny_run).step)
    assert sample("--checkpoint", step).out == sample("--checkpoint", "latest").out
