"""The order of imports, read from the code."""

import ast

import pytest
from conftest import ROOT

ROOMS = [
    *("config", "presets", "start", "exits", "files", "text", "ops", "models"),
    *("parallel", "training", "run", "planning", "generation", "interop", "cli"),
    "commands",
]


def name_of(path):
    """A file's module: jaxgpt/ops/gelu.py is jaxgpt.ops.gelu, train.py is train."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


FILES = [*(ROOT / "jaxgpt").rglob("*.py"), ROOT / "train.py", ROOT / "generate.py"]
MODULES = {name_of(path).removesuffix(".__init__"): path for path in FILES}


def imports_of(name, code, modules):
    """The modules that a module's code imports, also within functions."""
    package = name_of(modules[name]).split(".")[:-1]
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            named = [
                inner if inner in modules else source
                for inner in (f"{source}.{alias.name}" for alias in node.names)
            ]
        else:
            continue
        yield from (found for found in named if found in modules)


def rank(module):
    """The number of a module's room; what is in none is on top."""
    room = module.split(".")[1:2]
    return ROOMS.index(room[0]) if room and room[0] in ROOMS else len(ROOMS)


IMPORTS = {
    name: sorted(set(imports_of(name, path.read_text(encoding="utf-8"), MODULES)))
    for name, path in MODULES.items()
}


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import jaxgpt.run", ["jaxgpt.run"]),
        ("from jaxgpt import ops, GPT", ["jaxgpt.ops", "jaxgpt"]),
        ("def f():\n    from jaxgpt.run import Run", ["jaxgpt.run"]),
        ("from . import step\nfrom .step import x", ["jaxgpt.training.step"] * 2),
        ("from ..run import Run", ["jaxgpt.run"]),
    ],
)
def test_every_form_of_import_is_found(code, found):
    assert list(imports_of("jaxgpt.training.monitor", code, MODULES)) == found


def test_every_module_is_in_a_room():
    on_top = {name for name in MODULES if rank(name) == len(ROOMS)}
    assert on_top == {"jaxgpt", "jaxgpt.__main__", "train", "generate"}
    assert {name.split(".")[1] for name in MODULES if rank(name) < len(ROOMS)} == set(
        ROOMS
    )


def test_modules_import_only_from_their_room_and_rooms_before_it():
    offenders = [
        f"{name} imports {found}"
        for name, imports in IMPORTS.items()
        for found in imports
        if rank(found) > rank(name)
    ]
    assert offenders == []


def test_no_modules_import_each_other_in_a_cycle():
    left = {name: set(imports) for name, imports in IMPORTS.items()}
    while free := [name for name, imports in left.items() if not imports & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}  # these, or what they import, go round
