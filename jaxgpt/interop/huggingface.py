"""Hugging Face's GPT-2: a directory with config.json, safetensors and a tokenizer.

Source: transformers, models/gpt2 (configuration_gpt2.py, modeling_gpt2.py).
"""

import dataclasses
import json
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import numpy as np
import tokenizers
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers, processors

from jaxgpt.config import GPTConfig, ModelConfig
from jaxgpt.files import replace_file
from jaxgpt.interop import state_dict
from jaxgpt.text.conversations import CHAT_TEMPLATE, END_OF_TURN, is_chat_tokenizer
from jaxgpt.text.fetch import download
from jaxgpt.text.pretrained import tokenizer_in
from jaxgpt.text.tokenizer import END_OF_TEXT, BPETokenizer, CharTokenizer, Tokenizer

GELUS = {"tanh": "gelu_new", "exact": "gelu"}  # transformers' names
ACTIVATIONS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"}
# Options of GPT-2's config for which our model supports only these values.
_FIXED = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
_FLOATS = ("F64", "F32", "F16", "BF16")
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_GENERATION = "generation_config.json"
# Maps each tensor to its file, if the weights are split over several files.
_INDEX = f"{_WEIGHTS}.index.json"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
# Files of a previous model that an exported model must not be mixed with.
_OF_ANOTHER_MODEL = (
    *(_INDEX, "model-*-of-*.safetensors", _GENERATION, *_TOKENIZER_FILES),
    *("tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja"),
)


def find_model(source: str) -> Path:
    """The directory of a local model, or of a model on the hub, downloaded once.

    Raises OSError if there is neither, within seconds if the hub can't be reached.
    """
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists():
        raise NotADirectoryError(f"{source} is a file; give the directory of a model")
    import huggingface_hub  # slow to import, needed only here

    reason: Exception | None = None
    try:
        download(huggingface_hub.hf_hub_url(source, _CONFIG))
    except HTTPError:
        pass  # the hub is reachable; its own client reports the error better
    except (OSError, ValueError, HTTPException) as error:
        reason = error
    try:
        folder = huggingface_hub.snapshot_download(
            source,
            allow_patterns=[_CONFIG, "*.safetensors", _INDEX, *_TOKENIZER_FILES],
            local_files_only=reason is not None,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise FileNotFoundError(
            f"{source} is not a local directory and can't be downloaded from the hub: "
            + str(reason or error).partition("\n")[0]
        ) from error
    return Path(folder)


def read_huggingface(folder: Path) -> tuple[GPTConfig, Any]:
    """Reads the model in a directory.

    Returns the config, whose dropout is GPT-2's `resid_pdrop`, and the parameters, f32.
    Raises OSError or ValueError that names what is missing or does not match.
    """
    config, paths = _read_config(folder / _CONFIG), _weight_files(folder)
    try:
        files = (safe_open(path, framework="numpy") for path in paths)
        tensors = {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118

        def read(name: str) -> np.ndarray:
            tensor = tensors.pop(name)  # dropping the last one closes the files
            if (dtype := tensor.get_dtype()) not in _FLOATS:
                raise ValueError(f"{name} has type {dtype}, not {' or '.join(_FLOATS)}")
            return tensor[:]

        shapes = {name: tensor.get_shape() for name, tensor in tensors.items()}
        return config, state_dict.from_state_dict(shapes, read, config, out_in=False)
    except SafetensorError as error:
        raise ValueError(
            f"{folder} has damaged weights; download or export them again: {error}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """Reads the tokenizer in a model's directory; None if there is none.

    Raises ValueError if it is neither GPT-2's byte-level BPE nor a character tokenizer.
    """
    path = folder / "tokenizer.json"
    if path.is_file() and (tokenizer := _exported_characters(path)):
        return tokenizer
    return tokenizer_in(folder)


def write_huggingface(
    folder: Path, config: ModelConfig, params: Any, tokenizer: Tokenizer | None
) -> None:
    """Writes a directory for transformers' AutoModelForCausalLM and AutoTokenizer.

    A GPT without biases gets biases of zero, since GPT-2 always has biases. With the
    special tokens of conversations, there is a chat template, and `generate` stops
    where a turn ends. The folder is created if needed. Raises ValueError if the model
    is not a GPT.
    """
    config = state_dict.check_gpt(config, "GPT-2")
    tensors = state_dict.to_state_dict(params, config, out_in=False)
    with_biases = dataclasses.replace(config, bias=True)
    for name, shape in state_dict.torch_shapes(with_biases).items():
        tensors.setdefault(name, np.zeros(shape, np.float32))
    end = tokenizer.end_of_text if tokenizer else None
    settings, chat, generation = gpt2_settings(config, end), dict[str, str](), None
    if tokenizer and is_chat_tokenizer(tokenizer):
        chat = {"chat_template": CHAT_TEMPLATE}
        ends = [end, tokenizer.special_id(END_OF_TURN)]
        generation = {"bos_token_id": end, "pad_token_id": end, "eos_token_id": ends}
    write_model(
        *(folder, tensors, settings, tokenizer, config.block_size),
        tokenizer_settings=chat,
        generation=generation,
    )


def write_model(
    folder: Path,
    tensors: dict[str, np.ndarray],
    settings: dict[str, Any],
    tokenizer: Tokenizer | None,
    block_size: int,
    tokenizer_settings: dict[str, str] | None = None,
    template: str = "",
    generation: dict[str, Any] | None = None,
) -> None:
    """Writes a model's directory, and removes the files of another model in it.

    Args:
      folder: created if needed.
      tensors: by transformers' name, f32.
      settings: the content of config.json.
      tokenizer: None writes none.
      block_size: the most tokens of a text.
      tokenizer_settings: more of tokenizer_config.json, such as special tokens.
      template: special tokens to add to each text, which is `$A`.
      generation: the content of generation_config.json, if any.
    """
    # save_file would write the memory of a transposed array in its own order.
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    replace_file(
        folder / _WEIGHTS,
        lambda tmp_path: save_file(tensors, tmp_path, metadata={"format": "pt"}),
    )
    for path in (path for name in _OF_ANOTHER_MODEL for path in folder.glob(name)):
        path.unlink()
    if tokenizer:
        more = tokenizer_settings or {}
        _write_tokenizer(folder, tokenizer, block_size, more, template)
    if generation:
        _write_text(folder / _GENERATION, json.dumps(generation, indent=2) + "\n")
    _write_text(folder / _CONFIG, json.dumps(settings, indent=2) + "\n")


def gpt2_settings(config: GPTConfig, end_of_text: int | None) -> dict[str, Any]:
    """Returns the settings of transformers' GPT2Config that match our config."""
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": GELUS[config.gelu],
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout),
        **_FIXED,
        "initializer_range": 0.02,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": "float32",
    }


def _write_text(path: Path, text: str) -> None:
    replace_file(path, lambda tmp_path: tmp_path.write_text(text, encoding="utf-8"))


def _read_config(path: Path) -> GPTConfig:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is not a model: it has no {path.name}")
    try:
        found = json.loads(path.read_bytes())
        for name, ours in {"model_type": "gpt2", **_FIXED}.items():
            if (theirs := found.get(name, ours)) != ours:
                raise ValueError(f"{name}={theirs} is not supported; {ours} is")
        activation = found.get("activation_function", "gelu_new")
        if activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"activation_function={activation} is not one of {known}")
        return GPTConfig(
            block_size=found["n_positions"],
            vocab_size=found["vocab_size"],
            n_layer=found["n_layer"],
            n_head=found["n_head"],
            n_embd=found["n_embd"],
            dropout=found.get("resid_pdrop", 0.1),
            bias=True,
            gelu=ACTIVATIONS[activation],  # type: ignore[arg-type] # it is one of two
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (KeyError, AttributeError, TypeError, RecursionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is not a GPT-2 config: {reason}") from error


def _weight_files(folder: Path) -> list[Path]:
    names, index = [_WEIGHTS], folder / _INDEX
    if not (folder / _WEIGHTS).is_file() and index.is_file():
        try:
            files = json.loads(index.read_bytes())["weight_map"]
            # The name alone, so that an index leads to no other folder.
            names = sorted({Path(name).name for name in files.values()})
        except Exception as error:  # malformed JSON raises many kinds of errors
            raise ValueError(f"{index} is damaged: {error}") from error
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}; convert weights in another format to "
                "safetensors with transformers' save_pretrained"
            )
    return [folder / name for name in names]


def _write_tokenizer(
    folder: Path,
    tokenizer: Tokenizer,
    block_size: int,
    more: dict[str, str],
    template: str,
) -> None:
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.end_of_text is not None:
        names = ("bos_token", "eos_token", "unk_token")
        settings |= dict.fromkeys(names, END_OF_TEXT)
    if isinstance(tokenizer, BPETokenizer):
        content = tokenizer.to_json()
    else:
        content = _characters_as_words(tokenizer).to_str()
    if template:
        with_template = tokenizers.Tokenizer.from_str(content)
        with_template.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(END_OF_TEXT, tokenizer.end_of_text)]
        )
        content = with_template.to_str()
    settings |= more
    _write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2))
    _write_text(folder / "tokenizer.json", content)


def _characters_as_words(tokenizer: CharTokenizer) -> tokenizers.Tokenizer:
    """The character tokenizer as a word-level one, in which a character is a word.

    Characters that it does not have are left out.
    """
    ids = {character: i for i, character in enumerate(tokenizer.characters)}
    words = tokenizers.Tokenizer(models.WordLevel(ids))
    known = "".join(rf"\x{{{ord(character):x}}}" for character in ids)
    pattern = tokenizers.Regex(f"[{known}]")
    words.pre_tokenizer = pre_tokenizers.Split(pattern, "removed", invert=True)
    words.decoder = decoders.Fuse()
    words.add_special_tokens(list(tokenizer.special))  # with the next ids
    return words


def _exported_characters(path: Path) -> CharTokenizer | None:
    """Reads an exported CharTokenizer; None for any other file."""
    try:
        content = json.loads(path.read_bytes())
        model, split = content["model"], content["pre_tokenizer"]["type"] == "Split"
        if model["type"] != "WordLevel" or not split or content["normalizer"]:
            return None
        characters = "".join(sorted(model["vocab"], key=model["vocab"].get))
        special = {token["content"]: token["id"] for token in content["added_tokens"]}
        ids = {token: i for i, token in enumerate([*characters, *special])}
        if model["vocab"] | special != ids:
            return None
        return CharTokenizer(characters, list(special))
    except Exception:
        return None  # load_tokenizer reports what is wrong with it
