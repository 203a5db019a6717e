"""PyTorch's counterparts of our models, made of transformers' GPT-2 and of torch.nn.

B batch   T time   S source time   K labels, or masked positions   C n_embd   V vocab
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.config import (
    BlockConfig,
    ClassifierConfig,
    GPTConfig,
    MaskedLMConfig,
    ModelConfig,
    Seq2SeqConfig,
)
from jaxgpt.files import plain_path
from jaxgpt.interop import encoder_tensors, huggingface, required, state_dict

# The models that have a counterpart.
Comparable = GPTConfig | ClassifierConfig | MaskedLMConfig | Seq2SeqConfig
# Modules whose outputs are compared, besides the blocks.
_GPT2_LAYERS = ("drop", "attn", "mlp", "ln_f")


@dataclass(frozen=True)
class Reference:
    """A model in PyTorch, with the weights of one of ours.

    Attributes:
      module: the torch.nn.Module.
      logits: calls the module with the arguments of our model, as tensors.
      tensors: converts a tree like our parameters to arrays by PyTorch's name.
      activations: for modules whose outputs can be compared, by name, the path of our
        module and the layer, an index into stacked blocks.
    """

    module: Any
    logits: Callable[..., Any]
    tensors: Callable[[Any], dict[str, np.ndarray]]
    activations: Mapping[str, tuple[list[str], Any]]


def check_comparable(config: ModelConfig) -> Comparable:
    """Returns the config; raises ValueError if its model has no counterpart."""
    if not isinstance(config, Comparable):
        kind = getattr(config, "architecture", "other")
        raise ValueError(
            f"there is no {kind} model in PyTorch to compare with; give a run of "
            "a gpt, classifier, masked-lm or seq2seq"
        )
    return config


def random_gpt2(config: GPTConfig, seed: int) -> tuple[Any, Reference]:
    """Returns random parameters, initialised by transformers' GPT-2, and that model."""
    required("torch").manual_seed(seed)
    module = _gpt2(config)
    tensors = {name: t.detach().numpy() for name, t in module.named_parameters()}
    shapes = {name: array.shape for name, array in tensors.items()}
    read = tensors.__getitem__
    params = state_dict.from_state_dict(shapes, read, config, out_in=False)
    return params, _gpt2_reference(config, module)


def gpt2_of_nanogpt(config: GPTConfig, path: Path) -> Reference:
    """Returns transformers' GPT-2 with a ckpt.pt's weights, read without our code."""
    torch, module = required("torch"), _gpt2(config)
    with plain_path(path) as plain:
        tensors = torch.load(plain, map_location="cpu", weights_only=True)["model"]
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # transposed in GPT-2
    tensors = {
        state_dict.plain_name(name): tensor.T if name.endswith(linear) else tensor
        for name, tensor in tensors.items()
    }
    module.load_state_dict(tensors, strict=False)
    return _gpt2_reference(config, module)


def gpt2_of_directory(config: GPTConfig, folder: Path) -> Reference:
    """Returns the GPT-2 in a Hugging Face directory, as transformers loads it."""
    transformers = required("transformers")
    transformers.utils.logging.disable_progress_bar()
    with plain_path(folder) as plain:
        module = transformers.GPT2LMHeadModel.from_pretrained(
            plain, attn_implementation="eager", dtype="float32"
        )
    return _gpt2_reference(config, module)


def torch_of_params(config: Comparable, params: Any) -> Reference:
    """Returns the model in PyTorch with our parameters.

    It is transformers' GPT-2 for a GPT, with biases of zero if ours has none, and else
    torch.nn.TransformerEncoder or torch.nn.Transformer, with our embeddings and heads.
    """
    torch = required("torch")
    match config:
        case GPTConfig():
            reference = _gpt2_reference(config, _gpt2(config))
        case Seq2SeqConfig():
            reference = _seq2seq(config)
        case _:
            reference = _encoder(config)
    tensors = {
        name: torch.tensor(array) for name, array in reference.tensors(params).items()
    }
    missing, unexpected = reference.module.load_state_dict(tensors, strict=False)
    if unexpected or (missing and not isinstance(config, GPTConfig)):
        raise ValueError(f"parameters do not match: {[*missing, *unexpected]}")
    return reference


def _gpt2(config: GPTConfig) -> Any:
    """Returns transformers' GPT-2 for this config, with biases of zero."""
    transformers = required("transformers")
    settings = huggingface.gpt2_settings(config, end_of_text=None)
    settings["attn_implementation"] = "eager"
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings))


def _gpt2_reference(config: GPTConfig, module: Any) -> Reference:
    def logits(module: Any, tokens_BT: Any) -> Any:
        return module(tokens_BT, use_cache=False).logits

    names = (name for name, _ in module.transformer.named_modules())
    compared = [
        name
        for name in names
        if (last := name.split(".")[-1]) in _GPT2_LAYERS or last.isdecimal()
    ]
    return Reference(
        module,
        logits,
        partial(state_dict.to_state_dict, config=config, out_in=False),
        {f"transformer.{name}": state_dict.split_layer(name) for name in compared},
    )


def _options(config: BlockConfig) -> dict[str, Any]:
    """Options of torch.nn's Transformer, as our blocks are."""
    gelu = required("torch").nn.functional.gelu
    approximate = {"exact": "none", "tanh": "tanh"}[config.gelu]
    return {
        "d_model": config.n_embd,
        "nhead": config.n_head,
        "dim_feedforward": 4 * config.n_embd,
        "dropout": 0.0,
        "activation": partial(gelu, approximate=approximate),
        "batch_first": True,
        "norm_first": True,
        "bias": config.bias,
    }


def _encoder_stack(config: BlockConfig) -> Any:
    nn = required("torch").nn
    layer = nn.TransformerEncoderLayer(**_options(config))
    norm = nn.LayerNorm(config.n_embd, bias=config.bias)
    return nn.TransformerEncoder(
        layer, config.n_layer, norm, enable_nested_tensor=False
    )


def _padding(tokens_BT: Any, lengths_B: Any) -> Any:
    """Which tokens are padding, bool [B, T]."""
    return required("torch").arange(tokens_BT.shape[1]) >= lengths_B[:, None]


def _encoder(config: ClassifierConfig | MaskedLMConfig) -> Reference:
    nn, C, V = required("torch").nn, config.n_embd, config.require_vocab_size()
    modules = {
        "wte": nn.Embedding(V, C),
        "wpe": nn.Embedding(config.block_size, C),
        "transformer": _encoder_stack(config),
    }

    def encode(module: Any, tokens_BT: Any, lengths_B: Any) -> Any:
        x_BTC = module["wte"](tokens_BT) + module["wpe"].weight[: tokens_BT.shape[1]]
        padding_BT = _padding(tokens_BT, lengths_B)
        return module["transformer"](x_BTC, src_key_padding_mask=padding_BT)

    def label_logits(module: Any, tokens_BT: Any, lengths_B: Any) -> Any:
        x_BTC = encode(module, tokens_BT, lengths_B)
        pooled_BC = x_BTC[:, 0]
        if mean_pooling:
            x_BTC = x_BTC.masked_fill(_padding(tokens_BT, lengths_B)[..., None], 0)
            pooled_BC = x_BTC.sum(dim=1) / lengths_B[:, None]
        return module["classifier"](pooled_BC)

    def token_logits(
        module: Any, tokens_BT: Any, lengths_B: Any, positions_BK: Any
    ) -> Any:
        x_BTC = encode(module, tokens_BT, lengths_B)
        x_BKC = x_BTC.take_along_dim(positions_BK[..., None], dim=1)
        h_BKC = _options(config)["activation"](module["dense"](x_BKC))
        return module["ln_head"](h_BKC) @ module["wte"].weight.T

    logits: Callable[..., Any]
    match config:
        case ClassifierConfig():
            mean_pooling, logits = config.pooling == "mean", label_logits
            modules["classifier"] = nn.Linear(C, len(config.labels), bias=config.bias)
        case MaskedLMConfig():
            logits = token_logits
            modules["dense"] = nn.Linear(C, C, bias=config.bias)
            modules["ln_head"] = nn.LayerNorm(C, bias=config.bias)
    stacks = {"transformer.layers": ["encoder", "h"]}
    return _torch_reference(
        config, modules, logits, encoder_tensors.TORCH_ENCODER, stacks
    )


def _seq2seq(config: Seq2SeqConfig) -> Reference:
    config.require_source("compared")
    nn, C = required("torch").nn, config.n_embd
    modules = {
        "wte": nn.Embedding(config.require_vocab_size(), C),
        "wpe": nn.Embedding(config.block_size, C),
        "source_wpe": nn.Embedding(config.block_size, C),
        "transformer": nn.Transformer(
            custom_encoder=_encoder_stack(config),
            num_decoder_layers=config.n_layer,
            **_options(config),
        ),
    }

    def logits(module: Any, tokens_BT: Any, source_BS: Any, lengths_B: Any) -> Any:
        T, S, wte = tokens_BT.shape[1], source_BS.shape[1], module["wte"]
        padding_BS = _padding(source_BS, lengths_B)
        x_BTC = module["transformer"](
            wte(source_BS) + module["source_wpe"].weight[:S],
            wte(tokens_BT) + module["wpe"].weight[:T],
            tgt_mask=required("torch").ones(T, T).triu(1).bool(),
            tgt_is_causal=True,
            src_key_padding_mask=padding_BS,
            memory_key_padding_mask=padding_BS,
        )
        return x_BTC @ wte.weight.T

    stacks = {
        "transformer.encoder.layers": ["encoder", "h"],
        "transformer.decoder.layers": ["h"],
    }
    return _torch_reference(
        config, modules, logits, encoder_tensors.TORCH_SEQ2SEQ, stacks
    )


def _torch_reference(
    config: BlockConfig,
    modules: dict[str, Any],
    logits: Callable[..., Any],
    layout: encoder_tensors.Layout,
    stacks: dict[str, list[str]],
) -> Reference:
    """A Reference of modules by name; `stacks` are our paths of stacked blocks."""
    return Reference(
        required("torch").nn.ModuleDict(modules),
        logits,
        partial(encoder_tensors.to_tensors, layout=layout),
        {
            f"{name}.{layer}": (path, layer)
            for name, path in stacks.items()
            for layer in range(config.n_layer)
        },
    )
