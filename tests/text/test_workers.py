import os
import pickle
from contextlib import closing
from functools import partial
from itertools import count, islice

import pytest

from jaxgpt.text import workers
from jaxgpt.text.workers import ordered_map


def test_results_come_in_order_and_few_tasks_are_ahead():
    made = []
    tasks = (made.append(n) or n for n in count(1))
    with closing(ordered_map(partial(divmod, 10**6), tasks, 2)) as results:
        assert next(results) == (10**6, 0)
        assert len(made) < 10
        assert list(islice(results, 99)) == [divmod(10**6, n) for n in range(2, 101)]
    assert list(ordered_map(abs, [], 2)) == []


def test_workers_import_no_jax_and_end_when_the_results_are_closed():
    module = "__import__('jaxgpt.text.passes') and __import__('sys').modules"
    tasks = [f"{{'jax', 'flax', 'rich', 'pyarrow'}} & ({module}).keys()"]
    with closing(
        ordered_map(eval, [*tasks, "__import__('os').getpid()"], 1)
    ) as results:
        assert next(results) == set()
        process = next(results)
        assert process != os.getpid()
        os.kill(process, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


@pytest.mark.parametrize("sent", ["a task", "half a task"])
def test_a_worker_whose_parent_is_killed_ends_without_a_word(capfd, sent):
    worker = workers._start()
    worker.stdout.close()
    worker.stdin.write(pickle.dumps(abs))
    worker.stdin.write(pickle.dumps(10**99)[: None if sent == "a task" else -9])
    worker.stdin.close()
    worker.wait()
    assert capfd.readouterr().err == ""


def test_what_a_worker_prints_is_no_result(capfd):
    assert list(ordered_map(print, ["loud"], 1)) == [None]
    assert capfd.readouterr() == ("", "loud\n")


def test_an_error_of_a_task_is_raised_here_and_a_dead_worker_is_told():
    with pytest.raises(ZeroDivisionError):
        list(ordered_map(partial(divmod, 1), [1, 0, 1], 1))
    with pytest.raises(ChildProcessError, match="status 3"):
        list(ordered_map(os._exit, [3], 1))
    with pytest.raises(ChildProcessError, match="memory"):
        list(ordered_map(eval, ["__import__('signal').raise_signal(9)"], 1))
