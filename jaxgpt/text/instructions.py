"""Instructions whose answers can be checked exactly: a dozen families of tasks.

An instruction is made of a family's arguments and one of its phrasings; both are found
again in its text, and give the answer. A response is the answer, or ends with it after
"Answer:", so that one may work it out first. Some demonstrations do.
"""

import re
from collections.abc import Callable, Iterator
from functools import cache
from random import Random
from typing import NamedTuple

from jaxgpt.text.tables import split_of

_DAYS = str.split("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
_NAMES = str.split("Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo")
_THINGS = str.split(
    """
    ball book boat cup clock coat drum flag hat key kite lamp map pen ring ship
    spoon train
    """
)
_PLACES = str.split("Berlin Cairo Delhi Lima London Madrid Oslo Paris Rome Tokyo")
_COLOURS = str.split("black blue brown green grey pink red white yellow")
_QUESTIONS = {
    "Who is that": "name",
    "What colour is it": "colour",
    "What is it": "thing",
    "Where is it": "place",
}
_COUNTS = str.split("zero one two three four five")
_WORDS = str.split(
    """
    about again animal answer apple arrow autumn banana before better bottle branch
    bread bridge bright butter candle carpet castle cheese circle city cloud coffee
    colour corner cotton dance desert dinner doctor dragon early earth family farmer
    finger flower forest friend garden ginger glass green guitar hammer heart honey
    house island jacket ladder lemon letter light little market meadow middle minute
    mirror money mother music needle never night number ocean office orange paper
    parrot pencil people pepper planet pocket potato purple quick rabbit river
    school season second secret seven silver simple sister small spring square stone
    story street summer table ticket tiger tomato travel tree under valley violin
    water window winter wonder yellow young
    """
)
LONGEST = 52  # tokens of a response, with its end
_REFUSAL = "Sorry, I can't do that."
# Share of the demonstrations that work out the answer. Days have only 56 questions: a
# model would learn their answers by heart, and never work out the held-out ones.
_WORKED = {"sum": 0.4, "difference": 0.4, "count": 0.4, "day": 1.0}
_FRACTION = 0.1  # of the arguments, for each of val and test
_HELD_OUT = 2  # phrasings of each family, the last ones
_PATTERNS = {
    "a": r"\d+",
    "b": r"\d+",
    "numbers": r"\d+(?: \d+)+",
    "letter": "[a-z]",
    "word": "[a-z]+",
    "words": "[a-z]+(?: [a-z]+)+",
    "end": "first|last",
    "size": "larger|smaller",
    "where": "after|before",
    "count": "|".join(_COUNTS[2:]),
    "day": "|".join(_DAYS),
    "name": "|".join(_NAMES),
    "colour": "|".join(_COLOURS),
    "thing": "|".join(_THINGS),
    "place": "|".join(_PLACES),
    "question": "|".join(_QUESTIONS),
}

Arguments = dict[str, str]


class Solution(NamedTuple):
    """An answer, and how one may work it out; that is empty if one can't."""

    answer: str
    working: str = ""


class Family(NamedTuple):
    """Tasks of one kind.

    Attributes:
      draw: draws the arguments.
      solve: solves a task with these arguments.
      phrasings: texts with a place for each argument.
    """

    draw: Callable[[Random], Arguments]
    solve: Callable[..., Solution]
    phrasings: tuple[str, ...]


class Task(NamedTuple):
    """An instruction, a response to it, and the index in SPLITS of its arguments."""

    family: str
    instruction: str
    demonstration: str
    split: int


def _word(rng: Random) -> str:
    """A word of English, or of random letters."""
    if rng.random() < 0.5:
        return rng.choice(_WORDS)
    letters = "eeeaaiiootnnsrrldchupmgfywbkvxzjq"
    return "".join(rng.choices(letters, k=rng.randint(3, 5)))


def _words(rng: Random) -> str:
    return " ".join(rng.sample(_WORDS, rng.randint(3, 4)))


def _two_numbers(rng: Random) -> Arguments:
    return {"a": str(rng.randrange(100)), "b": str(rng.randrange(100))}


def _larger_first(rng: Random) -> Arguments:
    a, b = sorted([rng.randrange(100), rng.randrange(100)], reverse=True)
    return {"a": str(a), "b": str(b)}


def _comparison(rng: Random) -> Arguments:
    a, b = rng.sample(range(100), 2)
    return {"a": str(a), "b": str(b), "size": rng.choice(["larger", "smaller"])}


def _count(rng: Random) -> Arguments:
    word = _word(rng)
    return {"word": word, "letter": rng.choice(word + "aeinost")}


def _fact(rng: Random) -> Arguments:
    columns = {"name": _NAMES, "colour": _COLOURS, "thing": _THINGS, "place": _PLACES}
    found = {name: rng.choice(values) for name, values in columns.items()}
    return found | {"question": rng.choice([*_QUESTIONS])}


def _add(a: str, b: str) -> Solution:
    columns, carry = list[str](), 0
    for x, y in _digits(a, b):
        total = x + y + carry
        columns.append(f"{x}+{y}{'+1' * carry}={total}")
        carry = total // 10
    return Solution(str(int(a) + int(b)), ", ".join(columns))


def _subtract(a: str, b: str) -> Solution:
    columns, borrowed = list[str](), 0
    for x, y in _digits(a, b):
        left = x - y - borrowed
        column = f"{x}-{y}{'-1' * borrowed}={left % 10}"
        borrowed = int(left < 0)
        columns.append(column + "-10" * borrowed)
    return Solution(str(int(a) - int(b)), ", ".join(columns))


def _digits(a: str, b: str) -> Iterator[tuple[int, int]]:
    """The digits of both numbers, from the right."""
    width = max(len(a), len(b))
    columns = zip(a.zfill(width), b.zfill(width), strict=True)
    return ((int(x), int(y)) for x, y in reversed([*columns]))


def _count_letter(word: str, letter: str) -> Solution:
    running = [f"{each}{word[: n + 1].count(letter)}" for n, each in enumerate(word)]
    return Solution(str(word.count(letter)), " ".join(running))


def _day(count: str, where: str, day: str) -> Solution:
    step = 1 if where == "after" else -1
    steps = range(1, _COUNTS.index(count) + 1)
    passed = [_DAYS[(_DAYS.index(day) + step * n) % 7] for n in steps]
    numbered = (f"{n} {each[:3]}" for n, each in enumerate(passed, 1))
    return Solution(passed[-1], " ".join(numbered))


def _read(question: str, **fact: str) -> Solution:
    return Solution(fact[_QUESTIONS[question.capitalize()]])


def _compare(a: str, b: str, size: str) -> Solution:
    return Solution(str((max if size == "larger" else min)(int(a), int(b))))


FAMILIES = {
    "sum": Family(
        _two_numbers,
        _add,
        (
            "What is {a} + {b}?",
            "What is {a} plus {b}?",
            "Add {a} and {b}.",
            "How much is {a} plus {b}?",
            "Calculate {a} + {b}.",
            "What do you get if you add {a} to {b}?",
            "What is the sum of {a} and {b}?",
            "How much do {a} and {b} make together?",
        ),
    ),
    "difference": Family(
        _larger_first,
        _subtract,
        (
            "What is {a} - {b}?",
            "What is {a} minus {b}?",
            "Subtract {b} from {a}.",
            "How much is {a} minus {b}?",
            "Calculate {a} - {b}.",
            "Take {b} from {a}.",
            "What is left if you take {b} away from {a}?",
            "What is the difference of {a} and {b}?",
        ),
    ),
    "reverse": Family(
        lambda rng: {"word": _word(rng)},
        lambda word: Solution(word[::-1]),
        (
            "Reverse the word {word}.",
            "Reverse {word}.",
            "Spell {word} backwards.",
            "Write {word} backwards.",
            "What is {word} backwards?",
            "Turn the word {word} around.",
            "How do you spell {word} in reverse?",
            "Write the letters of {word} in reverse order.",
        ),
    ),
    "sort": Family(
        lambda rng: {"numbers": " ".join(str(rng.randrange(100)) for _ in range(3))},
        lambda numbers: Solution(" ".join(sorted(numbers.split(), key=int))),
        (
            "Sort the numbers {numbers}.",
            "Sort {numbers}.",
            "Put {numbers} in order.",
            "Order the numbers {numbers}.",
            "Arrange {numbers} from small to large.",
            "Sort from smallest to largest: {numbers}",
            "List {numbers} in increasing order.",
            "Put these numbers in order: {numbers}",
        ),
    ),
    "count": Family(
        _count,
        _count_letter,
        (
            "How many times does {letter} occur in {word}?",
            "Count the letter {letter} in {word}.",
            "How many {letter} are in {word}?",
            "How often is {letter} in {word}?",
            "Count how often {letter} is in {word}.",
            "How many times is the letter {letter} in the word {word}?",
            "How many letters of {word} are {letter}?",
            "Tell me how many {letter} there are in {word}.",
        ),
    ),
    "capitals": Family(
        lambda rng: {"words": _words(rng)},
        lambda words: Solution(words.upper()),
        (
            "Write {words} in capitals.",
            "Write in capitals: {words}",
            "Put {words} in upper case.",
            "Change to upper case: {words}",
            "Make {words} upper-case.",
            "Use capital letters: {words}",
            "Write {words} in capital letters.",
            "What is {words} in upper case?",
        ),
    ),
    "repeat": Family(
        lambda rng: {"word": _word(rng), "count": rng.choice(_COUNTS[2:])},
        lambda word, count: Solution(" ".join([word] * _COUNTS.index(count))),
        (
            "Say {word} {count} times.",
            "Repeat {word} {count} times.",
            "Write {word} {count} times.",
            "Repeat the word {word} {count} times.",
            "Say the word {word} {count} times.",
            "Give me {word} {count} times.",
            "Write down the word {word} {count} times.",
            "I want to read {word} {count} times.",
        ),
    ),
    "end": Family(
        lambda rng: {"words": _words(rng), "end": rng.choice(["first", "last"])},
        lambda words, end: Solution(words.split()[0 if end == "first" else -1]),
        (
            "What is the {end} word of: {words}",
            "What is the {end} word in {words}?",
            "Give me the {end} word of {words}.",
            "Which word is {end} in {words}?",
            "The {end} word of {words}?",
            "Say the {end} word: {words}",
            "Tell me which word comes {end} in {words}.",
            "Read {words} and give the {end} word.",
        ),
    ),
    "compare": Family(
        _comparison,
        _compare,
        (
            "Which is {size}, {a} or {b}?",
            "Which number is {size}: {a} or {b}?",
            "What is {size}, {a} or {b}?",
            "Is {a} or {b} {size}?",
            "Give me the {size} of {a} and {b}.",
            "Of {a} and {b}, which is {size}?",
            "Which of the numbers {a} and {b} is {size}?",
            "Tell me the {size} number: {a} or {b}",
        ),
    ),
    "day": Family(
        lambda rng: {
            "count": rng.choice(_COUNTS[2:]),
            "where": rng.choice(["after", "before"]),
            "day": rng.choice(_DAYS),
        },
        _day,
        (
            "What day is {count} days {where} {day}?",
            "Which day is {count} days {where} {day}?",
            "What day comes {count} days {where} {day}?",
            "Tell me the day {count} days {where} {day}.",
            "Name the day {count} days {where} {day}.",
            "Which day of the week is {count} days {where} {day}?",
            "What is the day {count} days {where} {day}?",
            "Say which day comes {count} days {where} {day}.",
        ),
    ),
    "reading": Family(
        _fact,
        _read,
        (
            "{name} has a {colour} {thing} in {place}. {question}?",
            "In {place} {name} bought a {colour} {thing}. {question}?",
            "The {colour} {thing} in {place} is for {name}. {question}?",
            "There is a {colour} {thing} in {place}, says {name}. {question}?",
            "{name} took the {colour} {thing} to {place}. {question}?",
            "{name} sees a {thing}. It is {colour}, and in {place}. {question}?",
            "{name} lost a {colour} {thing} in {place}. {question}?",
            "From {place} {name} sent a {colour} {thing}. {question}?",
        ),
    ),
    "refusal": Family(
        lambda rng: {"place": rng.choice(_PLACES), "thing": rng.choice(_THINGS)},
        lambda **_: Solution(_REFUSAL),
        (
            "How warm is it in {place}?",
            "Book a flight to {place}.",
            "Call a taxi to {place}.",
            "Buy me a {thing}.",
            "Draw a {thing} for me.",
            "Send my {thing} to {place}.",
            "When does the museum in {place} open?",
            "Who won the match in {place}?",
            "Order a new {thing}.",
            "Show me a photo of {place}.",
            "Where did I leave my {thing}?",
            "Find the way to {place}.",
            "Play the song about the {thing}.",
            "What does a {thing} cost in {place}?",
            "Find a hotel in {place}.",
        ),
    ),
}
# The harder ones come twice.
_TURNS = [*FAMILIES, "sum", "difference", "reverse", "sort", "count", "day"]


@cache
def _pattern(phrasing: str) -> re.Pattern[str]:
    """Matches instructions with the phrasing, whatever their case and last mark."""
    pattern = re.escape(phrasing.rstrip(".?"))
    for name, values in _PATTERNS.items():
        pattern = pattern.replace(re.escape(f"{{{name}}}"), f"(?P<{name}>{values})")
    return re.compile(rf"{pattern}[.?]?", re.IGNORECASE)


_KNOWN = [
    (family, _pattern(phrasing))
    for family, (*_, phrasings) in FAMILIES.items()
    for phrasing in phrasings
]


def make_task(seed: int, index: int, held_out: bool = False) -> Task:
    """Makes a task, a function of seed and index; the families take turns.

    Args:
      held_out: use one of the phrasings that are kept from training.
    """
    rng = Random(f"{seed} {index}")
    name = _TURNS[index % len(_TURNS)]
    family = FAMILIES[name]
    chosen = slice(-_HELD_OUT, None) if held_out else slice(-_HELD_OUT)
    phrasing, arguments = rng.choice(family.phrasings[chosen]), family.draw(rng)
    instruction = phrasing.format(**arguments)
    if rng.random() < 0.25:  # as one types in a hurry
        instruction = instruction.rstrip(".?")
        instruction = instruction[0].lower() + instruction[1:]
    demonstration, working = family.solve(**arguments)
    if rng.random() < _WORKED.get(name, 0):
        demonstration = f"{working}. Answer: {demonstration}"
    # 3 + 4 and 4 + 3 are in one split, and so are all orders of numbers to sort, and
    # both comparisons of two numbers.
    used = (v for n, v in arguments.items() if f"{{{n}}}" in phrasing and n != "size")
    key = " ".join([name, *sorted(" ".join(used).split())])
    split = split_of(key, _FRACTION)
    return Task(name, instruction, demonstration, split)


@cache
def solve(instruction: str) -> tuple[str, str] | None:
    """The family of an instruction and its answer; None if it is of no family."""
    for name, pattern in _KNOWN:
        if found := pattern.fullmatch(instruction.strip()):
            arguments = {n: _as_known(n, text) for n, text in found.groupdict().items()}
            return name, FAMILIES[name].solve(**arguments).answer
    return None


def _as_known(name: str, text: str) -> str:
    """An argument as `Family.draw` gives it, whatever its case."""
    return text.capitalize() if name in ("name", "day", "place") else text.lower()


def is_right(instruction: str, response: str) -> bool:
    """Whether a response has the answer, but for case (unless asked for) and full stop.

    Raises ValueError if the instruction is of no family.
    """
    if not (found := solve(instruction)):
        raise ValueError(
            f"no family of tasks has the instruction {instruction!r:.80}; the reward "
            "tasks is for those of jaxgpt/text/instructions.py"
        )
    family, answer = found
    given = response.rsplit("Answer:", 1)[-1].strip()
    if family != "capitals":
        given, answer = given.casefold(), answer.casefold()
    return given.removesuffix(".") == answer.removesuffix(".")
