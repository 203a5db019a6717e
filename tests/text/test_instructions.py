"""Tasks with exact answers: that each is understood, and what counts as right."""

import pytest

from jaxgpt.text import instructions
from jaxgpt.text.instructions import FAMILIES, LONGEST, is_right, make_task, solve

TASKS = [make_task(5, n, held_out) for held_out in (False, True) for n in range(2400)]


def test_each_instruction_is_of_one_family_and_its_demonstration_is_right():
    for task in TASKS:
        families = [
            family
            for family, pattern in instructions._KNOWN
            if pattern.fullmatch(task.instruction)
        ]
        assert families == [task.family], task
        assert is_right(task.instruction, task.demonstration), task
        assert len(task.demonstration) < LONGEST, task


@pytest.mark.parametrize(
    ("instruction", "family", "answer"),
    [
        ("What is 95 + 7?", "sum", "102"),
        ("how much is 999 plus 999", "sum", "1998"),
        ("Take 9 from 100.", "difference", "91"),
        ("What is left if you take 12 away from 12?", "difference", "0"),
        ("Spell planet backwards.", "reverse", "tenalp"),
        ("Sort 10 9 33 9.", "sort", "9 9 10 33"),
        ("How many times does e occur in letter?", "count", "2"),
        ("Count the letter z in apple", "count", "0"),
        ("Put one small house in upper case.", "capitals", "ONE SMALL HOUSE"),
        ("Say yes three times.", "repeat", "yes yes yes"),
        ("What is the last word of: we like tea", "end", "tea"),
        ("The first word of we like tea?", "end", "we"),
        ("Which is smaller, 100 or 99?", "compare", "99"),
        ("Is 100 or 99 larger?", "compare", "100"),
        ("What day is three days before Monday?", "day", "Friday"),
        ("which day is five days after saturday", "day", "Thursday"),
        ("Anna has a red key in Rome. What colour is it?", "reading", "red"),
        ("the pink pen in Oslo is for Leo. Who is that?", "reading", "Leo"),
        ("from Cairo Kate sent a blue hat. where is it", "reading", "Cairo"),
        ("Book a flight to Lima.", "refusal", "Sorry, I can't do that."),
    ],
)
def test_an_instruction_has_the_answer(instruction, family, answer):
    assert solve(instruction) == (family, answer)
    assert is_right(instruction, answer)


@pytest.mark.parametrize(
    ("instruction", "right", "wrong"),
    [
        (
            "What is 95 + 7?",
            ["102", "5+7=12, 9+0+1=10. Answer: 102", "Answer: 92. Answer: 102."],
            [
                "",
                "101",
                "1022",
                "102 101",
                "Answer: 102, or 101",
                "Answer: 102 Answer:",
            ],
        ),
        ("Make a cat upper-case.", ["A CAT"], ["a cat", "A Cat", "ACAT"]),
        ("What is two days after Monday?", ["wednesday"], ["Wed", "Tuesday"]),
        ("Buy me a hat.", ["Sorry, I can't do that."], ["Sorry", "I can do that."]),
    ],
)
def test_only_the_answer_alone_or_after_its_working_is_right(instruction, right, wrong):
    instruction = instruction.replace("What is two", "What day is two")
    for response in right:
        assert is_right(instruction, response), response
    for response in wrong:
        assert not is_right(instruction, response), response


def test_the_working_leads_to_the_answer():
    assert FAMILIES["sum"].solve("95", "7").working == "5+7=12, 9+0+1=10"
    borrows = FAMILIES["difference"].solve("102", "7").working
    assert borrows == "2-7=5-10, 0-0-1=9-10, 1-0-1=0"
    assert FAMILIES["count"].solve("seven", "e").working == "s0 e1 v1 e2 n2"
    assert FAMILIES["day"].solve("two", "before", "Monday").working == "1 Sun 2 Sat"


def test_an_unknown_instruction_has_no_answer():
    assert solve("Who are you?") is None
    assert solve("What day is zero days after Monday?") is None
    with pytest.raises(ValueError, match="no family of tasks has the instruction 'Who"):
        is_right("Who are you?", "A model.")


def test_tasks_are_a_function_of_seed_and_index_with_the_families_in_turn():
    assert TASKS[:2400] == [make_task(5, n) for n in range(2400)]
    assert TASKS[7] != make_task(6, 7)
    turns = instructions._TURNS
    assert set(turns) == set(FAMILIES)
    assert [task.family for task in TASKS[: 2 * len(turns)]] == turns * 2


def test_a_share_of_the_demonstrations_works_out_the_answer():
    for family in FAMILIES:
        worked = ["Answer:" in t.demonstration for t in TASKS if t.family == family]
        expected = instructions._WORKED.get(family, 0)
        assert sum(worked) / len(worked) == pytest.approx(expected, abs=0.1), family


def test_held_out_phrasings_are_of_no_training_example():
    for n, task in enumerate(TASKS):
        *known, first, second = FAMILIES[task.family].phrasings
        for phrasings, expected in ((known, n < 2400), ((first, second), n >= 2400)):
            patterns = map(instructions._pattern, phrasings)
            found = any(p.fullmatch(task.instruction) for p in patterns)
            assert found == expected, task


def test_arguments_are_in_one_split_in_any_order_and_phrasing():
    splits = {}
    for task in TASKS:
        name, pattern = next(
            (family, pattern)
            for family, pattern in instructions._KNOWN
            if pattern.fullmatch(task.instruction)
        )
        arguments = pattern.fullmatch(task.instruction).groupdict()
        arguments.pop("size", None)
        key = name, *sorted(" ".join(arguments.values()).split())
        assert splits.setdefault(key, task.split) == task.split
    shares = [sum(task.split == n for task in TASKS) / len(TASKS) for n in range(3)]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.03)
