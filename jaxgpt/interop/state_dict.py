"""The GPT's parameters under PyTorch's names and in PyTorch's shapes.

nanoGPT and Hugging Face's GPT-2 use the same names, layer by layer. Matrices differ:
nanoGPT's `nn.Linear` stores [out, in], GPT-2's `Conv1D` [in, out], as our model does.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxgpt.config import GPTConfig, ModelConfig
from jaxgpt.models import parameter_shapes

_MASKS = re.compile(r"\.attn\.(bias|masked_bias)$")  # buffers, not parameters
_WTE, _HEAD = "transformer.wte.weight", "lm_head.weight"  # one tied tensor


def check_gpt(config: ModelConfig, program: str) -> GPTConfig:
    """Returns the config; raises ValueError, naming `program`, if it is not a GPT's."""
    if not isinstance(config, GPTConfig):
        kind = getattr(config, "architecture", "other")
        raise ValueError(f"{program} has no {kind} model, only a gpt")
    return config


def torch_shapes(
    config: GPTConfig, *, out_in: bool = False
) -> dict[str, tuple[int, ...]]:
    """Shapes by PyTorch's name, in the order of its `named_parameters`."""
    C = config.n_embd
    block = {
        "ln_1": (C,),
        "attn.c_attn": (C, 3 * C),
        "attn.c_proj": (C, C),
        "ln_2": (C,),
        "mlp.c_fc": (C, 4 * C),
        "mlp.c_proj": (4 * C, C),
    }
    layers = range(config.n_layer)
    modules = {f"h.{i}.{name}": block[name] for i in layers for name in block}
    shapes: dict[str, tuple[int, ...]] = {
        _WTE: (config.require_vocab_size(), C),
        "transformer.wpe.weight": (config.block_size, C),
    }
    for module, shape in (modules | {"ln_f": (C,)}).items():
        shapes[f"transformer.{module}.weight"] = shape[::-1] if out_in else shape
        if config.bias:
            shapes[f"transformer.{module}.bias"] = shape[-1:]
    return shapes


def to_state_dict(
    params: Any, config: GPTConfig, *, out_in: bool
) -> dict[str, np.ndarray]:
    """Converts a tree like the GPT's parameters (gradients, moments) for PyTorch.

    Args:
      params: the tree, f32.
      out_in: return matrices as [out, in], as nanoGPT stores them.

    Returns arrays by PyTorch's name, without the head, which is the token embedding.
    They are views of the tree's arrays where possible.
    """
    leaves = {path: np.asarray(leaf) for path, leaf in flatten_dict(params).items()}
    tensors = {}
    for name, shape in torch_shapes(config).items():
        path, layer = _path_and_layer(name)
        array = leaves[path][layer].reshape(shape)
        tensors[name] = array.T if out_in and path[-1] == "kernel" else array
    return tensors


def from_state_dict(
    shapes: Mapping[str, Sequence[int]],
    read: Callable[[str], np.ndarray],
    config: GPTConfig,
    *,
    out_in: bool,
) -> Any:
    """The inverse of `to_state_dict`: returns the GPT's parameters, f32.

    Args:
      shapes: shape of each tensor, by PyTorch's name. Prefixes that `torch.compile`
        adds or that Hugging Face omits make no difference.
      read: returns the tensor of a name; one tensor is read at a time.
      out_in: whether matrices are [out, in].

    Raises ValueError that names a tensor that is missing, unexpected, wrongly shaped or
    not finite.
    """
    if config.n_layer > len(shapes):  # else their names alone might exhaust memory
        raise ValueError(
            f"n_layer={config.n_layer}, but there are only {len(shapes)} tensors"
        )
    found = {plain_name(name): name for name in shapes if not _MASKS.search(name)}
    head, expected = found.pop(_HEAD, None), torch_shapes(config, out_in=out_in)
    given = {name: tuple(shapes[original]) for name, original in found.items()}
    for name in expected | given:
        theirs, ours = given.get(name, "none"), expected.get(name, "none")
        if theirs != ours:
            raise ValueError(f"{name}: the file has {theirs}, the model {ours}")
    leaves = {
        path: np.empty(leaf.shape, leaf.dtype)
        for path, leaf in flatten_dict(parameter_shapes(config)).items()
    }
    for name in expected:
        path, layer = _path_and_layer(name)
        array = read(found[name])
        array = array.T if out_in and path[-1] == "kernel" else array
        with np.errstate(over="ignore"):  # a float64 may overflow float32
            leaves[path][layer] = array.reshape(leaves[path][layer].shape)
        if count := np.count_nonzero(~np.isfinite(leaves[path][layer])):
            raise ValueError(
                f"{name} is not finite: NaN, infinite or too large for float32 in "
                f"{count:,} of {array.size:,} elements; give a checkpoint from before "
                "the training diverged, or save the model again"
            )
    table = leaves["wte", "embedding"]
    if head and not np.array_equal(read(head), table):
        raise ValueError(
            f"{head} is not the token embedding; only a GPT whose head shares the "
            "embedding's weights is supported"
        )
    del table  # so that each host array is freed once it is on the device
    return unflatten_dict({path: jnp.asarray(leaves.pop(path)) for path in [*leaves]})


def plain_name(name: str) -> str:
    """The name without torch.compile's prefix, and with the one that the hub omits."""
    name = name.removeprefix("_orig_mod.")
    known = name.startswith(("transformer.", "lm_head."))
    return name if known else f"transformer.{name}"


def split_layer(name: str) -> tuple[list[str], Any]:
    """Splits a module's name into words and the layer, an index into stacked blocks."""
    words = name.split(".")
    return words, int(words.pop(1)) if words[0] == "h" else ...


def _path_and_layer(name: str) -> tuple[tuple[str, ...], Any]:
    """Our path of a PyTorch parameter, and its layer as in `split_layer`.

    In our tree, weights have Flax's names.
    """
    (*modules, kind), layer = split_layer(name.removeprefix("transformer."))
    if kind == "weight":
        kind = {"wte": "embedding", "wpe": "embedding"}.get(modules[-1], "kernel")
        kind = "scale" if modules[-1].startswith("ln_") else kind
    return (*modules, kind), layer
