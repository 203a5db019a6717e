"""The command line of train.py: a preset, a run directory and overrides.

`parse_flags` is for all command lines.
"""

import dataclasses
import difflib
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from jaxgpt.config import BlockConfig, Config, GRPOConfig, ModelConfig, PPOConfig
from jaxgpt.parallel.defaults import default_preset
from jaxgpt.posttrain.rewards import check_same_tokenizer, find_reward
from jaxgpt.presets import PRESETS
from jaxgpt.run import (
    TOKENIZER,
    check_has_tokenizer,
    find_checkpoint,
    has_run,
    load_config,
    require_task,
    saved_tokenizer,
)
from jaxgpt.terminal import log_line
from jaxgpt.text.tasks import kind_of

_PROG = "train.py [PRESET]"
# Model fields that --init-from takes from the preset, not from the run.
_TRAINING_FIELDS = ("dropout", "compute_dtype", "remat", "unroll")
# Tasks of the run that --init-from names, by the task to train, besides the same one.
_STARTS = {"classification": "masked-tokens", "reward": "next-token"}
_FLAG = re.compile(r"--[a-z][a-z0-9.-]*(?==|\Z)")  # alone, or before its value


@dataclass(frozen=True)
class RunOptions:
    """The run directory, and how the run starts."""

    out_dir: Path | None = None  # run directory; runs/PRESET by default
    resume: tyro.conf.FlagCreatePairsOff[bool] = False  # resume the run in out-dir
    init_from: Path | None = None  # run to start from: its model, weights and tokenizer
    # checkpoint of the --init-from run: best (lowest val loss), latest, or a step
    checkpoint: str = "best"
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False  # replace the run in out-dir
    # address of process 0, if JAX can't find the run's processes by itself
    coordinator_address: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = (
        None
    )
    num_processes: int | None = None  # number of processes
    process_id: int | None = None  # index of this process, from 0
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False  # print the run's cost and exit
    # print the run's cost on TPUs that need not be here, such as v5e:2x4, and exit
    plan: Annotated[str, tyro.conf.arg(metavar="TOPOLOGY")] = ""


@dataclass(frozen=True)
class _Arguments:
    options: Annotated[RunOptions, tyro.conf.arg(name="")]
    config: Annotated[Config, tyro.conf.arg(name="")]


def parse_flags(
    parser: Callable[..., Any], kind: Any, argv: Sequence[str], **options: Any
) -> Any:
    """Calls a parser of tyro's, which mistakes values that begin with a dash for flags.

    If it exits with an error, a line for each such value says how to write it.

    Args:
      parser: `tyro.cli`, or another with the same arguments.
      kind: what to parse, the parser's first argument.
      argv: the command line after the program's name.
      options: further arguments of the parser.
    """
    try:
        return parser(kind, args=argv, **options)
    except SystemExit as stopped:
        for before, value in pairwise(["", *argv]) if stopped.code == 2 else ():
            if _FLAG.match(value) or not re.match(r"-+[^\W\d]|--\Z", value):
                continue
            if _FLAG.fullmatch(before):
                written = f"{before}={shlex.quote(value)}"
                log_line(f"a value that begins with a dash is written {written}")
            elif Path(value).exists():
                log_line(f"a path that begins with a dash is written ./{value}")
        raise


def read_options(argv: list[str]) -> tuple[str, list[str], RunOptions]:
    """Returns the preset ("" if omitted), the flags, and the run options among them.

    Raises ValueError if there is no such preset; prints the help and exits on --help.

    Args:
      argv: the command line after the program's name; the preset, if any, comes first.
    """
    named = bool(argv) and not argv[0].startswith("-")
    preset, flags = (argv[0], argv[1:]) if named else ("", argv)
    if preset and preset not in PRESETS:
        nearest = difflib.get_close_matches(preset, PRESETS, n=1, cutoff=0)[0]
        raise ValueError(
            f"there is no preset {preset!r}; did you mean {nearest}? "
            f"The presets are {', '.join(PRESETS)}"
        )
    if "-h" in flags or "--help" in flags:
        _parse(flags, PRESETS[preset]() if preset else Config())
    # `_parse` reads the other flags.
    options, _ = parse_flags(
        tyro.cli, RunOptions, flags, prog=_PROG, return_unknown_args=True
    )
    return preset, flags, options


def parse_arguments(argv: list[str]) -> tuple[Config, Path, RunOptions]:
    """Parses the command line into a preset's or resumed run's config with overrides.

    Returns the config, the run directory and the options. Raises ValueError or OSError
    if they contradict each other; exits with a message if the parser rejects a flag.
    """
    preset, flags, options = read_options(argv)
    name = preset or default_preset()
    base = PRESETS[name]()
    run_dir = options.out_dir or Path("runs") / name
    init_from = options.init_from or base.train.init_from
    if options.resume and options.overwrite:
        raise ValueError("--resume and --overwrite exclude each other; choose one")
    if options.resume and options.init_from:
        raise ValueError(
            "--resume continues with the run's own parameters, --init-from starts from "
            "another run's; choose one"
        )
    if options.checkpoint != "best" and not init_from:
        raise ValueError(f"--checkpoint {options.checkpoint} needs --init-from RUN_DIR")
    if options.resume and has_run(run_dir):
        return _resumed(run_dir, flags), run_dir, options
    if options.resume and not preset:
        raise FileNotFoundError(
            f"there is no run in {run_dir} to resume; give the --out-dir of one, or a "
            "preset to start a new one"
        )
    if init_from:
        start = _start_from(Path(init_from), options.checkpoint, base)
        config = _parse(flags, start)
        _check_start(start, config, run_dir)
        if config.rewarded:
            config = _with_reward(config, config.rewarded)
    else:
        config = _parse(flags, base)
    if not preset:
        log_line(f"no preset given: {name} is the default on {jax.default_backend()}")
    return config, run_dir, options


def _resumed(run_dir: Path, flags: list[str]) -> Config:
    """Returns the config of a resumed run, with overrides from the flags."""
    saved = load_config(run_dir)
    config = _parse(flags, saved)
    if config.model.vocab_size is None:  # the tokenizer's, as when the run began
        model = dataclasses.replace(config.model, vocab_size=saved.model.vocab_size)
        config = dataclasses.replace(config, model=model)
    _check_same_model(saved, config)
    old, new = saved.rewarded, config.rewarded
    if old and new and new.reward_model != old.reward_model:
        config = _with_reward(config, new)
    for name in ("reward", "reward_model") if old else ():
        before, after = (getattr(each.rewarded, name) for each in (saved, config))
        if after != before:
            raise ValueError(
                f"--{name.replace('_', '-')} {after} contradicts the run, which has "
                f"{before or 'none'}; omit it, or train a new run"
            )
    if (run_dir / TOKENIZER).exists():
        _check_same_tokenizer(saved, config)
    if not saved.data.sha256:
        text = ", ".join(config.data.path) or config.data.corpus
        log_line(f"{run_dir} was imported; training on {text}, set by --data.path")
    return config


def _with_reward(config: Config, section: PPOConfig | GRPOConfig) -> Config:
    """Checks the reward; of the reward model's run, it finds the best checkpoint."""
    if bool(section.reward) == bool(section.reward_model):
        raise ValueError(
            f"{'ppo' if config.ppo else 'grpo'} maximises one reward; give either "
            "--reward NAME or --reward-model RUN_DIR"
        )
    if section.reward:
        find_reward(section.reward)
        return config
    run_dir = Path(section.reward_model)
    folder = find_checkpoint(run_dir, "best")
    model = require_task(load_config(run_dir), "reward")
    if model.block_size < config.model.block_size:
        raise ValueError(
            f"--reward-model {run_dir} reads {model.block_size} tokens, fewer than the "
            f"policy's block_size={config.model.block_size}; give --model.block-size "
            f"{model.block_size}"
        )
    policy_dir = Path(config.train.init_from).parent.parent
    check_same_tokenizer(saved_tokenizer(run_dir), saved_tokenizer(policy_dir))
    section = dataclasses.replace(section, reward_model=str(folder))
    return config.with_rewarded(section)


def _parse(flags: list[str], default: Config) -> Config:
    presets = [
        f"{name}: {(preset.__doc__ or '').splitlines()[0]}"
        for name, preset in PRESETS.items()
    ]
    return parse_flags(
        tyro.cli,
        _Arguments,
        flags,
        default=_Arguments(RunOptions(), default),
        prog=_PROG,
        description="Trains a model. PRESET comes first and is one of\n\n"
        + "\n\n".join(presets),
    ).config


def _start_from(run_dir: Path, checkpoint: str, preset: Config) -> Config:
    """Returns the preset with the model, parameters and tokenizer of a run.

    The fields of training, such as dropout, stay the preset's, and so do those of its
    head, such as pooling.
    """
    saved, folder = load_config(run_dir), find_checkpoint(run_dir, checkpoint)
    model = saved.model
    own = {*_TRAINING_FIELDS, *_head_fields(preset.model)}
    values = vars(model) | {n: v for n, v in vars(preset.model).items() if n in own}
    kind: Any = type(model if preset.model.task == "next-token" else preset.model)
    names = {each.name for each in dataclasses.fields(kind)}
    is_start = model.task in (preset.model.task, _STARTS.get(preset.model.task))
    if not is_start or names - values.keys():
        raise ValueError(
            f"--init-from {run_dir}: architecture={preset.model.architecture} can't "
            f"start from architecture={model.architecture}; give another run or preset"
        )
    log_line(f"starting from {folder}")
    model = kind(**{name: values[name] for name in names})
    data, tokenizer = preset.data, (run_dir / TOKENIZER).resolve()
    if kind_of(preset) in ("preferences", "prompts"):  # they begin as in the run
        data = dataclasses.replace(data, packing=saved.data.packing)
    if tokenizer.exists():
        data = dataclasses.replace(data, tokenizer=str(tokenizer))
    train = dataclasses.replace(preset.train, init_from=str(folder))
    return dataclasses.replace(preset, model=model, data=data, train=train)


def _head_fields(model: ModelConfig) -> set[str]:
    """Names of the fields that only this kind of model has."""
    if model.task == "next-token":
        return set()
    shared = {each.name for each in dataclasses.fields(BlockConfig)}
    return {each.name for each in dataclasses.fields(model)} - shared


def _check_start(start: Config, config: Config, run_dir: Path) -> None:
    if Path(start.train.init_from).is_relative_to(run_dir.resolve()):
        raise ValueError(
            f"{run_dir} is the run to start from; give another --out-dir, so that it "
            "is not changed"
        )
    if config.model.block_size > start.model.block_size:
        raise ValueError(
            f"--model.block-size {config.model.block_size} is more than the "
            f"{start.model.block_size} positions that the run was trained on; lower it"
        )
    others = "block_size", *_TRAINING_FIELDS, *_head_fields(config.model)
    _check_same_model(start, config, skip=others)
    if Path(start.data.tokenizer).is_file() or config.data.tokenizer == "bpe":
        _check_same_tokenizer(start, config)
    else:
        check_has_tokenizer(Path(start.train.init_from).parent.parent, config.data)


def _check_same_tokenizer(saved: Config, config: Config) -> None:
    if config.data.tokenizer != saved.data.tokenizer:
        raise ValueError(
            f"--data.tokenizer {config.data.tokenizer} can't replace the run's own, "
            "which the model was trained with; omit it"
        )


def _check_same_model(saved: Config, config: Config, skip: Sequence[str] = ()) -> None:
    for name, before in dataclasses.asdict(saved.model).items():
        after = getattr(config.model, name)
        if after != before and name not in skip:
            raise ValueError(
                f"--model.{name.replace('_', '-')} {after} contradicts the run, which "
                f"has {before}; omit it, or train a new run"
            )
