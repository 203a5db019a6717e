"""Attention maps: which positions each head of each layer attends to.

L layers   H heads   T time   S key time
"""

import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from jaxgpt.run import ATTENTION, load_run, prompt_tokens, text_tokenizer
from jaxgpt.terminal import log_line

_FONTS = ("DejaVu Sans Mono", "DejaVu Sans")  # matplotlib includes both
_LABEL = 16  # characters in a label, at most; an ellipsis ends a longer one


def attention(
    run_dir: Path, prompt: str, checkpoint: str = "best", out: Path | None = None
) -> int:
    """Draws the attention maps of every layer and head over a prompt's tokens.

    Args:
        run_dir: run directory written by train.py
        prompt: text to show; the model sees its last block_size tokens
        checkpoint: best (lowest val loss), latest, or a step
        out: PNG file to write; attention.png in the run directory by default
    """
    run = load_run(run_dir, checkpoint)
    tokenizer = text_tokenizer(run)
    if not prompt:
        raise ValueError("--prompt is empty; give the text to show")
    ids, window = prompt_tokens(run, prompt)[1], run.config.model.block_size
    if len(ids) > window:
        log_line(f"the prompt has {len(ids)} tokens; the model sees the last {window}")
        ids = ids[-window:]
    weights_LHTS = attention_maps(run.model, run.params, ids)
    out = out or run_dir / ATTENTION
    pieces = [tokenizer.decode_bytes([token]) for token in ids]
    draw_maps(weights_LHTS, [p.decode("utf-8", "surrogateescape") for p in pieces], out)
    print(out)
    return 0


def attention_maps(model: nn.Module, params: Any, tokens_T: np.ndarray) -> np.ndarray:
    """The attention weights of every layer and head, f32 [L, H, T, S].

    Takes 1 to block_size token ids. Raises ValueError if the model has no attention.
    """
    _, variables = model.apply(
        {"params": params}, jnp.asarray(tokens_T)[None], mutable="intermediates"
    )
    if not variables:
        raise ValueError(
            f"a {model.config.architecture} model has no attention to show"
        )
    # In the order of the layers; the GPT stacks its layers along a leading axis.
    sown = flatten_dict(variables["intermediates"]).values()
    layers = [maps.reshape(-1, *maps.shape[-4:]) for (maps,) in sown]
    return np.concatenate(layers).astype(np.float32)[:, 0]


def draw_maps(weights_LHTS: np.ndarray, tokens: list[str], path: Path) -> None:
    """Draws a grid of maps as a PNG, with a row per layer and a column per head.

    Args:
      weights_LHTS: attention weights; each sums to one over S.
      tokens: the text of each of the T tokens; bytes that are only a part of a
        character are surrogates, as `surrogateescape` decodes them.
    """
    import matplotlib  # takes half a second, needed only here
    from matplotlib.figure import Figure

    L, H, T, _ = weights_LHTS.shape
    side = min(max(1.6, 0.16 * T), 6.5, 40 / H)  # of each map, in inches
    figure = Figure(figsize=(H * side + 1.2, L * side + 0.8), layout="constrained")
    panels = figure.subplots(L, H, squeeze=False)
    past_TS = np.tril(np.ones((T, T), bool))
    colours = matplotlib.colormaps["Blues"].with_extremes(bad="0.93")
    for (layer, head), axes in np.ndenumerate(panels):
        weights_TS = np.ma.array(weights_LHTS[layer, head], mask=~past_TS)
        image = axes.imshow(weights_TS, cmap=colours, vmin=0, vmax=1)
        axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=8)
        axes.set(xticks=[], yticks=[])
    families, labels = token_labels(tokens)
    width = 72 * side / T  # of each position, in points
    points = min(0.75 * width, 8)
    if points >= 4:  # smaller text would be illegible
        style: dict[str, Any] = {"family": families, "parse_math": False}
        style["fontsize"] = points
        longest = 0.6 * points * max(map(len, labels))
        rotation = "vertical" if longest > width else "horizontal"
        for axes in panels[-1]:
            axes.set_xticks(range(T), labels, rotation=rotation, **style)
        for axes in panels[:, 0]:
            axes.set_yticks(range(T), labels, **style)
        for axes in panels.flat:
            axes.tick_params(length=0, pad=2)
    figure.supxlabel("looks at", fontsize=9)
    figure.supylabel("position", fontsize=9)
    figure.colorbar(image, ax=panels, label="weight", aspect=40, pad=0.01)
    text = "".join(tokens).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    description = {"Description": text}
    figure.savefig(path, dpi=120, format="png", metadata=description)


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
        and "LastResort" not in entry.name  # has a box for every character
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
