import re
import shutil
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
from conftest import build, random_params, save_params
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.image import imread

from jaxgpt import CharTokenizer, load_run
from jaxgpt.commands import attention as attention_command
from jaxgpt.commands.attention import Maps, attention_maps, draw_maps, token_labels
from jaxgpt.config import Config, MaskedLMConfig, Seq2SeqConfig
from jaxgpt.models import build_model
from jaxgpt.models.lecture import BLOCKS
from jaxgpt.run import save_config
from jaxgpt.text.tokenizer import END_OF_TEXT
from jaxgpt.training.checkpoint import CHECKPOINTS, open_checkpoints

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
    maps_LHTS = attention_maps(model, params, TOKENS)["self"]
    assert maps_LHTS.shape == (n_layer, 4, 6, 6)
    np.testing.assert_allclose(maps_LHTS.sum(axis=-1), 1, atol=1e-5)
    assert not np.triu(maps_LHTS, 1).any()
    uniform_LH = np.isclose(maps_LHTS, UNIFORM, atol=1e-5).all(axis=(2, 3))
    assert np.argwhere(uniform_LH).tolist() == [[n_layer - 1, 2]]


def draw(weights_LHTS, tokens, path):
    """Draws the maps of a GPT."""
    draw_maps([Maps("", weights_LHTS, tokens, tokens, True)], "".join(tokens), path)


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
    assert text_of(path) == "To be, or to be,\n"


def test_weights_are_where_they_belong_in_the_picture(tmp_path):
    weights_LHTS = np.zeros((1, 1, 3, 3))
    weights_LHTS[0, 0, [0, 1, 2], [0, 1, 0]] = 1  # the third looks at the first
    draw(weights_LHTS, ["$", "$", "\n"], tmp_path / "map.png")
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
    draw(np.ones((2, 2, 4, 4)) / 4, list("T $\n"), tmp_path / "map.png")
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
    maps_LHTS, exact_LHTS = (
        attention_maps(model, params, TOKENS)["self"] for model in models
    )
    assert maps_LHTS.dtype == np.float32
    assert not np.array_equal(maps_LHTS, exact_LHTS)
    np.testing.assert_allclose(maps_LHTS, exact_LHTS, atol=0.02)
    draw(maps_LHTS, list("To be,"), tmp_path / "maps.png")
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
    draw(np.ones((1, 1, *shape)), list(labels), tmp_path / "map.png")


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


SHAPE = {"n_layer": 2, "n_head": 4, "n_embd": 16, "block_size": 8, "vocab_size": 11}


@pytest.mark.slow
def test_an_encoder_attends_in_both_directions_and_a_decoder_also_to_the_source():
    encoder = build_model(MaskedLMConfig(**SHAPE), "cpu")
    (kind, maps_LHTS), *_ = attention_maps(
        encoder, random_params(encoder, mean=0, std=0.3), TOKENS
    ).items()
    assert kind == "encoder"
    assert maps_LHTS.min() > 0
    seq2seq = build_model(Seq2SeqConfig(**SHAPE), "cpu")
    params = random_params(seq2seq, mean=0, std=0.3)
    # One head of each kind weights all positions equally.
    for block, layer, head in (
        (params["encoder"]["h"]["attn"], 0, 1),
        (params["h"]["attn"], 1, 2),
        (params["h"]["cross_attn"], 1, 3),
    ):
        block["c_attn"]["kernel"][layer, :, 0, head] = 0  # [L, C, 3, H, D]
    found = attention_maps(seq2seq, params, TOKENS[:4], TOKENS)
    shapes = {"encoder": (6, 6), "self": (4, 4), "cross": (4, 6)}
    assert {name: maps.shape[2:] for name, maps in found.items()} == shapes
    uniform = {"encoder": 1 / 6, "self": UNIFORM[:4, :4], "cross": 1 / 6}
    places = {}
    for name, maps_LHTS in found.items():
        np.testing.assert_allclose(maps_LHTS.sum(axis=-1), 1, atol=1e-5)
        equal_LH = np.isclose(maps_LHTS, uniform[name], atol=1e-5).all(axis=(2, 3))
        places[name] = np.argwhere(equal_LH).tolist()
    assert places == {"encoder": [[0, 1]], "self": [[1, 2]], "cross": [[1, 3]]}


@pytest.fixture
def seq2seq_run(tmp_path):
    """The directory of an untrained encoder-decoder."""
    tokenizer = CharTokenizer.from_text("to be").with_special([END_OF_TEXT])
    fields = SHAPE | {"vocab_size": tokenizer.vocab_size, "n_layer": 1}
    config = Config(model=Seq2SeqConfig(**fields))
    params = random_params(build_model(config.model, "cpu"), mean=0, std=0.3)
    with open_checkpoints(tmp_path / "run" / CHECKPOINTS) as checkpoints:
        save_params(checkpoints, 1, params)
    save_config(tmp_path / "run", config, tokenizer)
    return tmp_path / "run"


@pytest.mark.slow
def test_an_encoder_decoders_maps_have_the_source_and_its_output_on_their_axes(
    call, seq2seq_run, monkeypatch, tmp_path
):
    drawn = []
    monkeypatch.setattr(
        attention_command, "draw_maps", lambda *args: drawn.append(args)
    )
    flags = ["--run-dir", seq2seq_run, "--prompt", "to be"]
    call("jaxgpt", "attention", *flags, "--target", "bet")
    (encoder, decoder, cross), text, path = drawn.pop()
    source = [*"to be", "<end>"]
    assert (encoder.queries, encoder.keys, encoder.causal) == (source, source, False)
    assert decoder.queries == decoder.keys == ["<end>", *"bet"]
    assert decoder.causal
    assert (cross.queries, cross.keys, cross.causal) == (
        [*"bet", "<end>"],
        source,
        False,
    )
    assert (text, path) == ("to be", seq2seq_run / "attention.png")
    call("jaxgpt", "attention", *flags)
    _, decoder, cross = drawn.pop()[0]
    run = load_run(seq2seq_run)
    read, written, source = (
        run.tokenizer.encode_prompt("".join(texts).replace("<end>", END_OF_TEXT))
        for texts in (decoder.queries, cross.queries, cross.keys)
    )
    assert read.tolist() == [run.tokenizer.end_of_text, *written[:-1]]
    inputs = {"source_BS": source[None]}
    logits_BTV = run.model.apply({"params": run.params}, read[None], **inputs)
    assert logits_BTV[0].argmax(axis=-1).tolist() == written.tolist()


def test_a_picture_of_three_kinds_of_maps_is_drawn(tmp_path):
    weights_LHTS, labels = np.ones((1, 2, 3, 4)) / 4, list("abcd")
    maps = [Maps(name, weights_LHTS, labels[:3], labels, False) for name in "xyz"]
    draw_maps(maps, "abcd", tmp_path / "maps.png")
    assert text_of(tmp_path / "maps.png") == "abcd"
