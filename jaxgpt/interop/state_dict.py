"""The GPT's parameters under the names and in the shapes that PyTorch has for them.

nanoGPT and Hugging Face's GPT-2 name them alike, layer by layer. Their matrices differ:
nanoGPT's `nn.Linear` keeps [out, in], GPT-2's `Conv1D` [in, out], which is ours.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxgpt.config import GPTConfig
from jaxgpt.models import parameter_shapes

_BLOCK = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
MASKS = re.compile(r"\.attn\.(bias|masked_bias)$")  # buffers, no parameters
_WTE, _HEAD = "transformer.wte.weight", "lm_head.weight"  # one and the same tensor


def check_gpt(config: GPTConfig, program: str) -> None:
    """Raises ValueError if the model is none that `program` has."""
    if config.architecture != "gpt":
        raise ValueError(f"{program} has no {config.architecture} model, only a gpt")


def parameter_names(config: GPTConfig) -> list[str]:
    """Names of the parameters, in the order of PyTorch's `named_parameters`."""
    kinds = ("weight", "bias") if config.bias else ("weight",)
    blocks = [f"h.{i}.{module}" for i in range(config.n_layer) for module in _BLOCK]
    names = [f"{module}.{kind}" for module in (*blocks, "ln_f") for kind in kinds]
    return [f"transformer.{name}" for name in ("wte.weight", "wpe.weight", *names)]


def to_state_dict(
    params: Any, config: GPTConfig, *, out_in: bool
) -> dict[str, np.ndarray]:
    """A tree like the GPT's parameters (gradients, moments) as PyTorch's tensors.

    Args:
      params: the tree, f32.
      out_in: keep matrices as [out, in], as nanoGPT does.

    Returns arrays by name, without the head, which is the token embedding. They are
    views of the tree's where they can be.
    """
    leaves = {path: np.asarray(leaf) for path, leaf in flatten_dict(params).items()}
    return {
        name: _torch_shaped(*_leaf(leaves, name), config, out_in)
        for name in parameter_names(config)
    }


def from_state_dict(
    shapes: Mapping[str, Sequence[int]],
    read: Callable[[str], np.ndarray],
    config: GPTConfig,
    *,
    out_in: bool,
) -> Any:
    """The inverse: the GPT's parameters, f32 NumPy arrays.

    Args:
      shapes: of the tensors that there are, by PyTorch's name. Prefixes that
        `torch.compile` adds, or that Hugging Face leaves out, make no difference.
      read: reads the tensor of one of these names; one is read at a time.
      out_in: matrices are [out, in].

    Raises ValueError that names what is missing, too much, or of another shape.
    """
    found: dict[str, str] = {}
    for name in shapes:
        if not MASKS.search(name) and (plain := plain_name(name)) in found:
            raise ValueError(f"{found[plain]} and {name} are two tensors for {plain}")
        if not MASKS.search(name):
            found[plain] = name
    _check_sizes({name: shapes[found[name]] for name in found}, config)
    expected = flatten_dict(parameter_shapes(config))

    def views(leaves: dict[tuple[str, ...], np.ndarray]) -> dict[str, np.ndarray]:
        return {
            name: _torch_shaped(*_leaf(leaves, name), config, out_in)
            for name in parameter_names(config)
        }

    # Stand-ins without memory, which a wrong config could ask for too much of.
    blank = np.zeros((), np.bool_)
    wanted = views({p: np.broadcast_to(blank, s.shape) for p, s in expected.items()})
    head = found.pop(_HEAD, None)
    wrong = [f"{name} is missing" for name in wanted if name not in found]
    wrong += [f"{found[name]} has no place" for name in found if name not in wanted]
    wrong += [
        f"{name} is {list(shapes[found[name]])}, not {list(view.shape)}"
        for name, view in wanted.items()
        if name in found and tuple(shapes[found[name]]) != view.shape
    ]
    if wrong:
        more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError("; ".join(wrong[:5]) + more)
    leaves = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in expected.items()}
    with np.errstate(all="ignore"):  # a float64 may be infinite as float32
        for name, view in views(leaves).items():
            view[...] = read(found[name])
    embedding = views(leaves)[_WTE]
    if head and not np.array_equal(read(head), embedding, equal_nan=True):
        raise ValueError(
            f"{head} is not the token embedding: a GPT with a head of its own is not "
            "supported, only one that shares the embedding's weights"
        )
    return unflatten_dict(leaves)


def _check_sizes(shapes: Mapping[str, Sequence[int]], config: GPTConfig) -> None:
    """Raises ValueError where the model is larger than the tensors could make it."""
    if _WTE not in shapes:
        raise ValueError(f"{_WTE} is missing")
    if list(shapes[_WTE]) != [config.vocab_size, config.n_embd]:
        raise ValueError(
            f"{_WTE} is {list(shapes[_WTE])}, not {[config.vocab_size, config.n_embd]}"
        )
    if config.n_layer > len(shapes):
        raise ValueError(
            f"n_layer={config.n_layer}, but there are only {len(shapes)} tensors"
        )


def plain_name(name: str) -> str:
    """The name without what torch.compile adds, and with what the hub leaves out."""
    name = name.removeprefix("_orig_mod.")
    return (
        name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
    )


def _leaf(
    leaves: dict[tuple[str, ...], np.ndarray], name: str
) -> tuple[str, np.ndarray]:
    """Our name and the array of one of PyTorch's parameters; of a layer, a view."""
    _, *words, kind = name.split(".")
    layer = int(words.pop(1)) if words[0] == "h" else None
    if kind == "weight":
        kind = {"wte": "embedding", "wpe": "embedding"}.get(words[-1], "kernel")
        kind = "scale" if words[-1].startswith("ln_") else kind
    stack = leaves[(*words, kind)]
    return kind, stack if layer is None else stack[layer]


def _torch_shaped(
    kind: str, array: np.ndarray, config: GPTConfig, out_in: bool
) -> np.ndarray:
    """A view of the array without the axes of heads, and of q, k and v."""
    if kind != "kernel":
        return array if kind == "embedding" else array.reshape(-1)
    matrix = array if array.ndim == 2 else array.reshape(config.n_embd, -1)
    return matrix.T if out_in else matrix
