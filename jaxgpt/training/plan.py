"""What a training step costs, before it runs: parameters, FLOPs, memory."""

import dataclasses

import jax

from jaxgpt.config import Config
from jaxgpt.models import build_model, parameter_shapes
from jaxgpt.runtime import log_line
from jaxgpt.text.corpus import load_corpus, named_vocab_size
from jaxgpt.training.sharding import make_mesh
from jaxgpt.training.step import TrainState, abstract_state, compile_train_steps


def step_flops(config: Config) -> int:
    """Floating-point operations of one update, forward and backward.

    Per token: 6 for each parameter that multiplies, and 12 n_layer n_embd block_size
    for attention's scores and averages, masked ones too. An embedding is looked up; but
    the GPT's head multiplies with the tokens'. Recomputation (remat) is not counted.

    Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    if config.model.architecture == "bigram":  # a look-up multiplies nothing
        return 0
    model = config.model
    params = parameter_shapes(model)
    multiplying = sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if path[-1].key != "embedding" or path[0].key == "wte"
    )
    attention = 12 * model.n_layer * model.n_embd * model.block_size
    return config.data.batch_size * model.block_size * (6 * multiplying + attention)


def describe(config: Config) -> list[str]:
    """Lines that say what the run will cost; compiles the step, runs nothing.

    Needs no corpus where `model.vocab_size` is given or the corpus is known by name.
    """
    if config.model.vocab_size is None:
        if (vocab_size := named_vocab_size(config.data)) is None:
            _, config = load_corpus(config, log_line)
        else:
            model_config = dataclasses.replace(config.model, vocab_size=vocab_size)
            config = dataclasses.replace(config, model=model_config)
    mesh = make_mesh(config, log_line)
    model = build_model(config.model)
    state = abstract_state(model, config, mesh)
    params = _size(state.params)
    tokens = config.data.batch_size * config.model.block_size
    all_tokens = tokens * config.train.max_steps
    lines = [
        f"parameters         {params:,}",
        f"tokens per step    {tokens:,}",
        f"FLOPs per step     {step_flops(config):.3g}",
        f"tokens in all      {all_tokens:,} ({all_tokens / params:.1f} per parameter)",
        f"devices            {mesh.size} x {mesh.devices.flat[0].device_kind}",
        f"state per device   {_readable(_bytes(state))}",
    ]
    memory = compile_train_steps(model, config, mesh, 1).memory_analysis()
    if memory is not None:  # not every backend tells
        temporary = _readable(memory.temp_size_in_bytes)
        lines.append(f"temporary memory   {temporary} per device")
    return lines


def _size(tree: object) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _bytes(state: TrainState) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _readable(count: int) -> str:
    """Bytes in MiB or GiB."""
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:,.1f} GiB"
