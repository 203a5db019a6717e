import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from conftest import TINY, changed
from matplotlib.figure import Figure
from matplotlib.image import imread

from jaxgpt.commands.attention import attention_maps, draw_maps
from jaxgpt.models import build_model
from jaxgpt.models.lecture import BLOCKS

TOKENS = np.array([3, 1, 4, 1, 5, 9])
UNIFORM = np.tril(np.ones((6, 6))) / np.arange(1, 7)[:, None]


def without_queries(params, architecture, layer, head):
    """The parameters with one head's queries at zero: it then looks at all alike."""
    if architecture == "gpt":
        kernel = params["h"]["attn"]["c_attn"]["kernel"]  # [L, C, 3, H, D]
        kernel = kernel.at[layer, :, 0, head].set(0)
        params["h"]["attn"]["c_attn"]["kernel"] = kernel
        return params
    block = params[f"block_{layer}"]
    block = block.get("sa", block)
    query = block.get("multi_head", block)["heads"]["query"]  # [H, C, D]
    query["kernel"] = query["kernel"].at[head].set(0)
    return params


@pytest.mark.parametrize("architecture", ["gpt", *BLOCKS])
def test_maps_are_in_the_order_of_layers_and_heads(architecture):
    # Without residual connections positions become alike after a few layers.
    n_layer = 2 if architecture in ("attention", "feed-forward") else 11
    shape = {"architecture": architecture, "n_layer": n_layer, "n_head": 4}
    model = build_model(changed(TINY, model=shape).model, "cpu")
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    if architecture == "gpt":  # GPT-2's small initialisation makes all near uniform
        params = jax.tree.map(lambda a: 8 * a if a.ndim > 2 else a, params)
    params = without_queries(params, architecture, n_layer - 1, head=2)
    maps_LHTS = attention_maps(model, params, TOKENS)
    assert maps_LHTS.shape == (n_layer, 4, 6, 6)
    np.testing.assert_allclose(maps_LHTS.sum(axis=-1), 1, atol=1e-5)
    assert not np.triu(maps_LHTS, 1).any()
    uniform = [
        (layer, head)
        for layer, head in np.ndindex(n_layer, 4)
        if np.allclose(maps_LHTS[layer, head], UNIFORM, atol=1e-5)
    ]
    assert uniform == [(n_layer - 1, 2)]


def tokens_of(picture):
    """The text that a picture of attention is of."""
    with PIL.Image.open(picture) as image:
        return image.info["Description"]


def test_a_picture_is_drawn_in_the_run_directory_and_its_path_printed(call, tiny_run):
    flags = ["--run-dir", tiny_run, "--prompt"]
    out, err = call("jaxgpt", "attention", *flags, "to be,\n")
    assert out == f"{tiny_run / 'attention.png'}\n"
    assert err == ""
    assert tokens_of(tiny_run / "attention.png") == "to be,\n"
    out, err = call("jaxgpt", "attention", *flags, "To be, or to be,\n")
    assert err == "the prompt has 17 tokens; the model sees the last 8\n"
    assert tokens_of(tiny_run / "attention.png") == " to be,\n"


def test_weights_are_where_they_belong_in_the_picture(tmp_path):
    weights_LHTS = np.zeros((1, 1, 3, 3))
    weights_LHTS[0, 0, [0, 1, 2], [0, 1, 0]] = 1  # the third looks at the first
    draw_maps(weights_LHTS, ["$", "$", "\n"], tmp_path / "map.png")
    full = np.array([8, 48, 107]) / 255  # the colour of weight 1
    pixels = imread(tmp_path / "map.png")[..., :3]
    pixels = pixels[:, : pixels.shape[1] * 2 // 3]  # without the colour bar
    rows, columns = np.nonzero(np.abs(pixels - full).max(axis=-1) < 0.02)
    edges = np.linspace(rows.min(), rows.max(), 4)
    counts = np.histogram2d(
        rows, columns, bins=[edges, edges - edges[0] + columns.min()]
    )[0]
    np.testing.assert_allclose(
        counts / np.diff(edges)[0] ** 2, weights_LHTS[0, 0], atol=0.1
    )


def test_both_axes_are_labelled_with_the_tokens_in_order(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *_, **__: drawn.append(figure)
    )
    draw_maps(np.ones((2, 2, 4, 4)) / 4, list("T $\n"), tmp_path / "map.png")
    (figure,) = drawn
    labelled = [
        [[text.get_text() for text in axis.get_ticklabels()] for axis in axes]
        for axes in ((axes.xaxis, axes.yaxis) for axes in figure.axes[:4])
    ]
    tokens = ["T", "\N{OPEN BOX}", "$", "\\n"]
    assert labelled == [[[], tokens], [[], []], [tokens, tokens], [tokens, []]]


@pytest.mark.parametrize("flags", [[], ["--out", "maps.png"]])
def test_a_folder_that_is_no_run_is_named_as_such(call, tmp_path, flags):
    arguments = ["--run-dir", tmp_path / "nowhere", "--prompt", "To"]
    with pytest.raises(FileNotFoundError, match="nowhere is not a run"):
        call("jaxgpt", "attention", *arguments, *flags)


def test_attention_in_bfloat16_is_drawn_too(tmp_path):
    model = build_model(changed(TINY, model={"compute_dtype": "bfloat16"}).model, "cpu")
    params = model.init(jax.random.key(0), TOKENS[None])["params"]
    maps_LHTS = attention_maps(model, params, TOKENS)
    assert maps_LHTS.dtype == np.float32
    draw_maps(maps_LHTS, list("To be,"), tmp_path / "maps.png")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "Zounds"], "'Z' at position 0 is not in the vocabulary"),
        (["--prompt", "To", "--checkpoint", "3"], "checkpoint '3' is not one of"),
    ],
)
def test_what_cannot_be_shown_is_an_error(call, tiny_run, flags, message):
    with pytest.raises(ValueError, match=message):
        call("jaxgpt", "attention", "--run-dir", tiny_run, *flags)


def test_a_model_without_attention_is_an_error(bigram):
    with pytest.raises(ValueError, match="a bigram model has no attention to show"):
        attention_maps(*bigram, TOKENS)
