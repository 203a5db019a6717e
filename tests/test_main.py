import pytest
from conftest import assert_every_flag_is_explained, finish, start_script

from jaxgpt.__main__ import COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_flag_of_a_command(call, capsys, command):
    with pytest.raises(SystemExit) as stopped:
        call("jaxgpt", command, "--help")
    assert stopped.value.code == 0
    assert_every_flag_is_explained(capsys.readouterr().out)


@pytest.mark.parametrize("arguments", [[], ["evalute"]])
def test_without_a_command_that_there_is_all_are_listed(call, capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        call("jaxgpt", *arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    for command in COMMANDS:
        assert command in error


def test_an_error_is_one_line_and_the_status_1(tmp_path):
    process = start_script("-m", "jaxgpt", "evaluate", "--run-dir", tmp_path)
    out, err = finish(process, code=1)
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(f"error: {tmp_path} is not a run")
