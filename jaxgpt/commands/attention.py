"""Attention maps: which positions each head of each layer attends to.

L layers   H heads   T time   S key time
"""

import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from jaxgpt.generation.translation import translate
from jaxgpt.run import (
    ATTENTION,
    Run,
    load_run,
    prompt_tokens,
    require_task,
    text_tokenizer,
)
from jaxgpt.terminal import log_line
from jaxgpt.text.labelled import encode_texts
from jaxgpt.text.pairs import encode_sources
from jaxgpt.text.tokenizer import END_OF_TEXT

_FONTS = ("DejaVu Sans Mono", "DejaVu Sans")  # matplotlib includes both
_LABEL = 16  # characters in a label, at most; an ellipsis ends a longer one


def attention(
    run_dir: Path,
    prompt: str,
    target: str | None = None,
    checkpoint: str = "best",
    out: Path | None = None,
) -> int:
    """Draws the attention maps of every layer and head over a text's tokens.

    An encoder-decoder has three kinds: of the encoder, of the decoder to its own text,
    and of the decoder to the source.

    Args:
        run_dir: run directory written by train.py
        prompt: text to show; a GPT sees its last block_size tokens. The source, for an
            encoder-decoder
        target: text of the decoder; by default what it writes for the source
        checkpoint: best (lowest val loss), latest, or a step
        out: PNG file to write; attention.png in the run directory by default
    """
    run = load_run(run_dir, checkpoint)
    tokenizer, model = text_tokenizer(run), run.model
    pairs = run.config.model.task == "translation"
    if not prompt:
        raise ValueError("--prompt is empty; give the text to show")
    if target is not None and not pairs:
        raise ValueError(
            f"--target {target!r} needs an encoder-decoder, but {run_dir} is a "
            f"{run.config.model.architecture}; leave it out"
        )

    def texts(ids: Any) -> list[str]:
        pieces = [tokenizer.decode_bytes([token]) for token in ids]
        shown = [piece.decode("utf-8", "surrogateescape") for piece in pieces]
        return ["<end>" if text == END_OF_TEXT else text for text in shown]

    if pairs:
        require_task(run.config, "translation").require_source("drawn")
    ids = _prompt_ids(run, prompt)
    if not pairs:
        ((kind, weights_LHTS),) = attention_maps(model, run.params, ids).items()
        drawn = [Maps("", weights_LHTS, texts(ids), texts(ids), kind == "self")]
    else:
        end: Any = tokenizer.end_of_text
        if target is None:
            (target,) = translate(run, [prompt], beams=1)
        block_size = run.config.model.block_size
        output = encode_sources([target], tokenizer, block_size, log_line, "targets")[0]
        inputs = [end, *output[:-1]]
        maps = attention_maps(model, run.params, np.array(inputs), ids)
        source, read = texts(ids), texts(inputs)
        drawn = [
            Maps("encoder", maps["encoder"], source, source, causal=False),
            Maps("decoder", maps["self"], read, read, causal=True),
            Maps("cross-attention", maps["cross"], texts(output), source, causal=False),
        ]
    out = out or run_dir / ATTENTION
    draw_maps(drawn, prompt, out)
    print(out)
    return 0


def _prompt_ids(run: Run, prompt: str) -> np.ndarray:
    """Token ids of the prompt, as the model reads texts; says if they are cut."""
    tokenizer, model = text_tokenizer(run), run.config.model
    window = model.block_size
    match model.task:
        case "classification":
            return encode_texts([prompt], tokenizer, window, log_line)[0]
        case "translation":
            return encode_sources([prompt], tokenizer, window, log_line)[0]
        case "masked-tokens":  # so that a prompt can have mask tokens
            ids = np.array([tokenizer.end_of_text, *tokenizer.encode_prompt(prompt)])
            kept, which = ids[:window], "first"
        case _:
            ids = prompt_tokens(run, prompt)[1]
            kept, which = ids[-window:], "last"
    if len(ids) > window:
        log_line(
            f"the prompt has {len(ids)} tokens; the model sees the {which} {window}"
        )
    return kept


def attention_maps(
    model: nn.Module,
    params: Any,
    tokens_T: np.ndarray,
    source_S: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """The attention weights of every layer and head, f32 [L, H, T, S].

    They are those of the `encoder`, of a decoder to its own text (`self`), and to the
    encoder (`cross`); whichever the model has.

    Args:
      tokens_T: 1 to block_size token ids.
      source_S: of an encoder-decoder's source.

    Raises ValueError if the model has no attention.
    """
    inputs = {"tokens_BT": tokens_T}
    if source_S is not None:
        inputs["source_BS"] = source_S
    rows = {name: jnp.asarray(ids)[None] for name, ids in inputs.items()}
    _, variables = model.apply({"params": params}, **rows, mutable="intermediates")
    if not variables:
        raise ValueError(
            f"a {model.config.architecture} model has no attention to show"
        )
    # In the order of the layers; our blocks are stacked along a leading axis.
    layers: dict[str, list[jax.Array]] = {}
    for path, (maps,) in flatten_dict(variables["intermediates"]).items():
        kind = "encoder" if path[0] == "encoder" else "self"
        kind = "cross" if "cross_attn" in path else kind
        layers.setdefault(kind, []).append(maps.reshape(-1, *maps.shape[-4:]))
    return {
        kind: np.array(jnp.concatenate(each)[:, 0], np.float32)
        for kind, each in layers.items()
    }


@dataclass(frozen=True)
class Maps:
    """The attention maps of every layer and head, to draw.

    Attributes:
      title: above each map.
      weights_LHTS: attention weights; each sums to one over S.
      queries, keys: the text of each of the T and of the S tokens; bytes that are only
        a part of a character are surrogates, as `surrogateescape` decodes them. The
        queries of cross-attention are the tokens written, each one after its position.
      causal: whether no position attends to later ones.
    """

    title: str
    weights_LHTS: np.ndarray
    queries: list[str]
    keys: list[str]
    causal: bool


def draw_maps(drawn: Sequence[Maps], text: str, path: Path) -> None:
    """Draws grids of maps, one below the other, as a PNG.

    A grid has a row per layer and a column per head.

    Args:
      text: description in the file.
    """
    from matplotlib.figure import Figure  # takes half a second, needed only here

    sizes = []  # of each grid, in inches
    for maps in drawn:
        L, H, T, S = maps.weights_LHTS.shape
        side = min(max(1.6, 0.16 * max(T, S)), 6.5, 40 / H)  # of each map
        sizes.append((H * side + 1.2, L * (side + 0.35) + 0.7, side))
    widths, heights, sides = zip(*sizes, strict=True)
    figure = Figure(figsize=(max(widths), sum(heights)), layout="constrained")
    parts = figure.subfigures(len(drawn), 1, height_ratios=heights, squeeze=False)
    for part, maps, side in zip(parts[:, 0], drawn, sides, strict=True):
        _draw_grid(part, maps, side)
    description = {"Description": text.encode("utf-8", "replace").decode()}
    options: dict[str, Any] = {"format": "png", "metadata": description}
    figure.savefig(path, dpi=120, bbox_inches="tight", **options)  # cuts no title off


def _draw_grid(figure: Any, maps: Maps, side: float) -> None:
    """Draws a grid of maps whose longer side is `side` inches."""
    import matplotlib

    L, H, T, S = maps.weights_LHTS.shape
    panels = figure.subplots(L, H, squeeze=False)
    hidden_TS = ~np.tril(np.ones((T, S), bool)) & maps.causal
    colours = matplotlib.colormaps["Blues"].with_extremes(bad="0.93")
    for (layer, head), axes in np.ndenumerate(panels):
        weights_TS = np.ma.array(maps.weights_LHTS[layer, head], mask=hidden_TS)
        image = axes.imshow(weights_TS, cmap=colours, vmin=0, vmax=1)
        title = f"{maps.title}\nlayer {layer + 1}, head {head + 1}"
        axes.set_title(title.strip(), fontsize=8)
        axes.set(xticks=[], yticks=[])
        axes.tick_params(length=0, pad=2)
    width = 72 * side / max(T, S)  # of each position, in points
    points = min(0.75 * width, 8)
    if points >= 4:  # smaller text would be illegible
        for tokens, along_x in ((maps.keys, True), (maps.queries, False)):
            families, labels = token_labels(tokens)
            style: dict[str, Any] = {"family": families, "parse_math": False}
            style["fontsize"] = points
            if along_x:
                longest = 0.6 * points * max(map(len, labels))
                style["rotation"] = "vertical" if longest > width else "horizontal"
            for axes in panels[-1] if along_x else panels[:, 0]:
                set_ticks = axes.set_xticks if along_x else axes.set_yticks
                set_ticks(range(len(labels)), labels, **style)
    for axes in panels[-1]:
        axes.set_xlabel("looks at", fontsize=9)
    for axes in panels[:, 0]:
        axes.set_ylabel("position", fontsize=9)
    figure.colorbar(image, ax=panels, label="weight", aspect=40, pad=0.01)


def token_labels(tokens: list[str]) -> tuple[list[str], list[str]]:
    """Fonts for the texts of tokens, and labels that can be drawn in these fonts.

    Spaces are shown as open boxes. Escape sequences stand for what no installed font
    has, what is invisible, marks without their letter, and parts of a character. Labels
    that would take the room of the maps are cut.
    """
    shown = [token.replace(" ", "\N{OPEN BOX}") for token in tokens]
    printable = {c for c in "".join(shown) if c.isprintable()} - {"\\"}
    families, missing = find_fonts(printable)
    drawn = printable - missing

    def label(token: str) -> str:
        text = ""
        for c in token:
            mark = unicodedata.category(c).startswith("M")
            if c in drawn and (text or not mark):
                text += c
            else:
                text += c.encode("unicode_escape").decode().replace(r"\udc", r"\x")
        return text if len(text) <= _LABEL else text[: _LABEL - 1] + "\u2026"

    return families, list(map(label, shown))


def find_fonts(characters: Iterable[str]) -> tuple[list[str], set[str]]:
    """Names of fonts to draw the characters in, and the characters that no font has.

    Reads no more of the installed fonts than needed, beginning with matplotlib's own.
    """
    from matplotlib.font_manager import fontManager, get_font

    paths = {
        entry.name: entry.fname
        for entry in fontManager.ttflist
        if (entry.style, entry.weight, entry.stretch) == ("normal", 400, "normal")
        # It has a box for every character; matplotlib 3.11.2 writes it with a space.
        and "LastResort" not in entry.name.replace(" ", "")
    }
    families, missing = [_FONTS[0]], set(characters)  # this one for the escapes too
    for family in dict.fromkeys((*_FONTS, *paths)):
        if missing and family in paths:
            with suppress(OSError, RuntimeError):  # a damaged file
                charmap = get_font(paths[family]).get_charmap()
                if found := {c for c in missing if ord(c) in charmap}:
                    families.append(family)
                    missing -= found
    return list(dict.fromkeys(families)), missing
