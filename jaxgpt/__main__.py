"""Commands besides train.py and generate.py: python -m jaxgpt COMMAND --help."""

import sys
from collections.abc import Callable

import tyro

from jaxgpt import exits, start
from jaxgpt.cli import parse_flags
from jaxgpt.commands.attention import attention
from jaxgpt.commands.cache import cache
from jaxgpt.commands.chat import chat
from jaxgpt.commands.classify import classify
from jaxgpt.commands.compare import compare
from jaxgpt.commands.convert import export, import_
from jaxgpt.commands.evaluate import evaluate
from jaxgpt.commands.lecture import lecture
from jaxgpt.commands.prepare import prepare
from jaxgpt.commands.rlhf_reviews import rlhf_reviews
from jaxgpt.commands.translate import translate

COMMANDS: dict[str, Callable[..., int]] = {
    "evaluate": evaluate,
    "classify": classify,
    "translate": translate,
    "chat": chat,
    "lecture": lecture,
    "rlhf-reviews": rlhf_reviews,
    "attention": attention,
    "import": import_,
    "export": export,
    "compare": compare,
    "prepare": prepare,
    "cache": cache,
}


def main() -> int:
    """Runs the command that the command line names; returns the exit status."""
    start.start()
    return parse_flags(
        tyro.extras.subcommand_cli_from_dict,
        COMMANDS,
        sys.argv[1:],
        prog="python -m jaxgpt",
        description=__doc__,
    )


if __name__ == "__main__":
    with exits.plain_errors():
        status = main()
    sys.exit(status)
