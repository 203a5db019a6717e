import re
import shutil
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
from conftest import build, random_params
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.image import imread

from jaxgpt.commands.attention import attention_maps, draw_maps, token_labels
from jaxgpt.models.lecture import BLOCKS

TOKENS = np.array([3, 1, 4, 1, 5, 9])
UNIFORM = np.tril(np.ones((6, 6))) / np.arange(1, 7)[:, None]


def zero_queries(params, architecture, layer, head):
    """Sets one head's queries to zero, so that it weights all positions equally."""
    if architecture == "gpt":
        params["h"]["attn"]["c_attn"]["kernel"][layer, :, 0, head] = (
            0  # [L, C, 3, H, D]
        )
    else:
        block = params[f"block_{layer}"]
        block = block.get("sa", block)
        heads = block.get("multi_head", block)["heads"]
        heads["query"]["kernel"][head] = 0  # [H, C, D]


@pytest.mark.parametrize(
    ("architecture", "n_layer"),
    [*((name, 2) for name in ("gpt", *BLOCKS)), ("layer-norm", 11)],
)
def test_maps_are_in_the_order_of_layers_and_heads(architecture, n_layer):
    model = build(architecture=architecture, n_layer=n_layer, n_head=4)
    params = random_params(model, mean=0, std=0.3)
    zero_queries(params, architecture, n_layer - 1, head=2)
    maps_LHTS = attention_maps(model, params, TOKENS)
    assert maps_LHTS.shape == (n_layer, 4, 6, 6)
    np.testing.assert_allclose(maps_LHTS.sum(axis=-1), 1, atol=1e-5)
    assert not np.triu(maps_LHTS, 1).any()
    uniform_LH = np.isclose(maps_LHTS, UNIFORM, atol=1e-5).all(axis=(2, 3))
    assert np.argwhere(uniform_LH).tolist() == [[n_layer - 1, 2]]


def text_of(picture):
    """The text that a picture of attention is of."""
    with PIL.Image.open(picture) as image:
        return image.info["Description"]


def test_a_picture_is_drawn_in_the_run_directory_or_where_told(
    call, tiny_run, tmp_path
):
    run_dir = shutil.copytree(tiny_run, tmp_path / "run")
    flags = ["attention", "--run-dir", run_dir, "--prompt"]
    out, err = call("jaxgpt", *flags, "to be,\n")
    assert (out, err) == (f"{run_dir / 'attention.png'}\n", "")
    assert text_of(run_dir / "attention.png") == "to be,\n"
    path = tmp_path / "maps.png"
    out, err = call("jaxgpt", *flags, "To be, or to be,\n", "--out", path)
    assert out == f"{path}\n"
    assert re.findall(r"\d+", err) == ["17", "8"]  # tokens, and those that fit
    assert text_of(path) == " to be,\n"


def test_weights_are_where_they_belong_in_the_picture(tmp_path):
    weights_LHTS = np.zeros((1, 1, 3, 3))
    weights_LHTS[0, 0, [0, 1, 2], [0, 1, 0]] = 1  # the third looks at the first
    draw_maps(weights_LHTS, ["$", "$", "\n"], tmp_path / "map.png")
    full = np.array([8, 48, 107]) / 255  # the colour of weight 1
    pixels = imread(tmp_path / "map.png")[..., :3]
    pixels = pixels[:, : pixels.shape[1] * 2 // 3]  # without the colour bar
    rows, columns = np.nonzero(np.abs(pixels - full).max(axis=-1) < 0.02)
    edges = np.linspace(rows.min(), rows.max(), 4)
    bins = [edges, edges - edges[0] + columns.min()]
    shares = np.histogram2d(rows, columns, bins)[0] / np.diff(edges)[0] ** 2
    np.testing.assert_allclose(shares, weights_LHTS[0, 0], atol=0.1)


def test_both_axes_are_labelled_with_the_tokens_in_order(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *_, **__: drawn.append(figure)
    )
    draw_maps(np.ones((2, 2, 4, 4)) / 4, list("T $\n"), tmp_path / "map.png")
    (figure,) = drawn
    labels = [
        [[text.get_text() for text in axis.get_ticklabels()] for axis in axes]
        for axes in ((axes.xaxis, axes.yaxis) for axes in figure.axes[:4])
    ]
    tokens = ["T", "\N{OPEN BOX}", "$", "\\n"]
    assert labels == [[[], tokens], [[], []], [tokens, tokens], [tokens, []]]


def test_maps_in_bfloat16_are_near_those_in_float32_and_can_be_drawn(tmp_path):
    models = [build(compute_dtype=dtype) for dtype in ("bfloat16", "float32")]
    params = random_params(models[0])
    maps_LHTS, exact_LHTS = (attention_maps(model, params, TOKENS) for model in models)
    assert maps_LHTS.dtype == np.float32
    assert not np.array_equal(maps_LHTS, exact_LHTS)
    np.testing.assert_allclose(maps_LHTS, exact_LHTS, atol=0.02)
    draw_maps(maps_LHTS, list("To be,"), tmp_path / "maps.png")
    assert text_of(tmp_path / "maps.png") == "To be,"


def test_labels_escape_what_no_font_has_and_what_cannot_be_seen(tmp_path):
    labels = {
        "a\N{COMBINING ACUTE ACCENT}": "a\N{COMBINING ACUTE ACCENT}",
        "\N{COMBINING ACUTE ACCENT}a": r"\u0301a",
        "Ромео": "Ромео",
        "\N{HEBREW LETTER ALEF}": "\N{HEBREW LETTER ALEF}",
        "\N{TAGALOG LETTER A}": r"\u1700",  # no font of matplotlib's has it
        "\udce5\udca4": r"\xe5\xa4",  # the first bytes of a character
        "\x1b\0\\": r"\x1b\x00\\",
        "\ue000\u202e\u200b": r"\ue000\u202e\u200b"[:15] + "\N{HORIZONTAL ELLIPSIS}",
    }
    assert token_labels(list(labels))[1] == list(labels.values())
    # No glyph is missing: matplotlib would warn, and warnings are errors.
    shape = len(labels), len(labels)
    draw_maps(np.ones((1, 1, *shape)), list(labels), tmp_path / "map.png")


def test_a_font_that_is_installed_is_used_for_what_the_first_ones_lack(monkeypatch):
    fonts, _ = token_labels(["a"])
    assert fonts == ["DejaVu Sans Mono"]
    have = {"DejaVu Sans Mono": "ab", "DejaVu Sans": "", "CJK": "天", "Other": "天b"}
    entry = {"style": "normal", "weight": 400, "stretch": "normal"}
    entries = [SimpleNamespace(name=name, fname=name, **entry) for name in have]
    entries.append(
        SimpleNamespace(**entry | {"name": "Slanted", "fname": "", "style": "italic"})
    )
    opened = []

    def get_font(path):
        opened.append(path)
        return SimpleNamespace(get_charmap=lambda: dict.fromkeys(map(ord, have[path])))

    monkeypatch.setattr(font_manager.fontManager, "ttflist", entries)
    monkeypatch.setattr(font_manager, "get_font", get_font)
    assert token_labels(["ab", "天"]) == (["DejaVu Sans Mono", "CJK"], ["ab", "天"])
    assert "Other" not in opened
    assert token_labels(["地"]) == (["DejaVu Sans Mono"], [r"\u5730"])
