"""Parameters of the encoders and of the encoder-decoder under PyTorch's names.

Three layouts: torch.nn's Transformer, and Hugging Face's ESM and Blenderbot.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

# A layout maps our modules to PyTorch's, where {} is the layer. Queries, keys and
# values are one module, or one each.
Layout = Mapping[str, str | tuple[str, ...]]


def _blocks(ours: str, theirs: str, modules: Layout) -> Layout:
    """The layout of all blocks, from that of the modules in a block."""
    return {
        f"{ours}.{module}": f"{theirs}.{{}}.{names}"
        if isinstance(names, str)
        else tuple(f"{theirs}.{{}}.{name}" for name in names)
        for module, names in modules.items()
    }


_TORCH_ENCODER: Layout = {
    "ln_1": "norm1",
    "attn.c_attn": "self_attn.in_proj",
    "attn.c_proj": "self_attn.out_proj",
    "ln_2": "norm2",
    "mlp.c_fc": "linear1",
    "mlp.c_proj": "linear2",
}
_TORCH_DECODER: Layout = {
    **_TORCH_ENCODER,
    "ln_cross": "norm2",
    "cross_attn.c_attn": "multihead_attn.in_proj",
    "cross_attn.c_proj": "multihead_attn.out_proj",
    "ln_2": "norm3",
}
_BLENDERBOT_ENCODER: Layout = {
    "ln_1": "self_attn_layer_norm",
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": "self_attn.out_proj",
    "ln_2": "final_layer_norm",
    "mlp.c_fc": "fc1",
    "mlp.c_proj": "fc2",
}
_BLENDERBOT_DECODER: Layout = {
    **_BLENDERBOT_ENCODER,
    "ln_cross": "encoder_attn_layer_norm",
    "cross_attn.c_attn": (
        "encoder_attn.q_proj",
        "encoder_attn.k_proj",
        "encoder_attn.v_proj",
    ),
    "cross_attn.c_proj": "encoder_attn.out_proj",
}
_ESM_LAYER: Layout = {
    "ln_1": "attention.LayerNorm",
    "attn.c_attn": (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
    ),
    "attn.c_proj": "attention.output.dense",
    "ln_2": "LayerNorm",
    "mlp.c_fc": "intermediate.dense",
    "mlp.c_proj": "output.dense",
}
TORCH_ENCODER: Layout = {
    "wte": "wte",
    "encoder.wpe": "wpe",
    **_blocks("encoder.h", "transformer.layers", _TORCH_ENCODER),
    "encoder.ln_f": "transformer.norm",
    **{name: name for name in ("dense", "ln_head", "classifier")},  # our own heads
}
TORCH_SEQ2SEQ: Layout = {
    "wte": "wte",
    "wpe": "wpe",
    "encoder.wpe": "source_wpe",
    **_blocks("encoder.h", "transformer.encoder.layers", _TORCH_ENCODER),
    "encoder.ln_f": "transformer.encoder.norm",
    **_blocks("h", "transformer.decoder.layers", _TORCH_DECODER),
    "ln_f": "transformer.decoder.norm",
}
ESM: Layout = {
    "wte": "esm.embeddings.word_embeddings",
    "encoder.wpe": "esm.embeddings.position_embeddings",
    **_blocks("encoder.h", "esm.encoder.layer", _ESM_LAYER),
    "encoder.ln_f": "esm.encoder.emb_layer_norm_after",
    "dense": "lm_head.dense",
    "ln_head": "lm_head.layer_norm",
}
BLENDERBOT: Layout = {
    "wte": "model.shared",
    "wpe": "model.decoder.embed_positions",
    "encoder.wpe": "model.encoder.embed_positions",
    **_blocks("encoder.h", "model.encoder.layers", _BLENDERBOT_ENCODER),
    "encoder.ln_f": "model.encoder.layer_norm",
    **_blocks("h", "model.decoder.layers", _BLENDERBOT_DECODER),
    "ln_f": "model.decoder.layer_norm",
}


def to_tensors(params: Any, layout: Layout) -> dict[str, np.ndarray]:
    """Arrays by PyTorch's name of a tree like the parameters, such as gradients.

    The tied head is left out. Matrices are [out, in], as in `nn.Linear`.
    """
    tensors = {}
    for (*path, kind), leaf in flatten_dict(params).items():
        names = layout[".".join(path)]
        modules = (names,) if isinstance(names, str) else names
        stack = np.asarray(leaf) if "h" in path else np.asarray(leaf)[None]
        for layer, array in enumerate(stack):
            if kind == "kernel":
                inputs = len(array) if path[-1] == "c_attn" else -1
                outputs = -1 if path[-1] == "c_attn" else array.shape[-1]
                array = array.reshape(inputs, outputs).T
            elif kind == "bias":
                array = array.ravel()
            kind_of_theirs = "bias" if kind == "bias" else "weight"
            parts = np.split(array, len(modules))
            for module, part in zip(modules, parts, strict=True):
                name = f"{module.format(layer)}.{kind_of_theirs}"
                tensors[name.replace("in_proj.", "in_proj_")] = part
    return tensors
