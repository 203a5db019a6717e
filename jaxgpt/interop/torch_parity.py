"""Parity with PyTorch: runs the same weights and batches in both, and compares.

The PyTorch model is transformers' GPT-2, trained with torch's AdamW as nanoGPT does.

B batch   T time   V vocab
"""

import copy
import dataclasses
import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from jaxgpt import ops
from jaxgpt.config import (
    Config,
    GPTConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
)
from jaxgpt.files import plain_path
from jaxgpt.generation.decode import generate_tokens
from jaxgpt.interop import huggingface, required, state_dict
from jaxgpt.models import build_model
from jaxgpt.parallel.defaults import platform_of
from jaxgpt.parallel.mesh import single_device_mesh
from jaxgpt.text.batches import get_batch
from jaxgpt.training.objectives import Batch, next_token
from jaxgpt.training.optimizer import make_optimizer
from jaxgpt.training.step import create_state, make_train_step

# Tolerances in float32: of relative norms (activations, gradients, parameters), of the
# largest difference (logits) and in nats (losses). LOGITS and LOSS are multiplied by
# the root mean square of the logits if that is above 1.
NORM = 1e-5
LOGITS = 2e-5
LOSS = 1e-6
STEP_LOSS = 1e-4
FINAL_PARAMETERS = 1e-3
# A gradient's norm counts as at least this fraction of the global gradient norm.
SMALLEST_NORM = 1e-3
# bfloat16 has 8 bits of precision: each layer rounds several times, by up to 2**-9 of a
# number, and independent errors add up as the square root of their count.
BFLOAT16_PER_ROOT_LAYER = 2**-7
_PROMPT_LENGTH = 8
_LAYERS = ("drop", "h", "attn", "mlp", "ln_f")  # modules whose outputs are compared


@dataclass(frozen=True)
class Check:
    """The difference between JAX and PyTorch in one quantity.

    Attributes:
      absolute: largest absolute difference.
      relative: norm of the difference, divided by the norm of PyTorch's value.
      error: the value that is judged: `absolute`, `relative` or a scaled variant.
      tolerance: largest accepted `error`; None if the quantity is not judged.
    """

    section: str
    name: str
    absolute: float
    relative: float
    error: float
    tolerance: float | None

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance, if there is one; NaN is not."""
        return self.tolerance is None or self.error <= self.tolerance


def random_gpt2(config: GPTConfig, seed: int) -> tuple[Any, Any]:
    """Returns random parameters, initialised by transformers' GPT-2, and that model."""
    required("torch").manual_seed(seed)
    reference = _gpt2(config)
    tensors = {name: t.detach().numpy() for name, t in reference.named_parameters()}
    shapes = {name: array.shape for name, array in tensors.items()}
    read = tensors.__getitem__
    return state_dict.from_state_dict(shapes, read, config, out_in=False), reference


def gpt2_of_params(config: GPTConfig, params: Any) -> Any:
    """Returns transformers' GPT-2 with our parameters; missing biases are zero."""
    torch, reference = required("torch"), _gpt2(config)
    tensors = state_dict.to_state_dict(params, config, out_in=False)
    tensors = {name: torch.tensor(array) for name, array in tensors.items()}
    reference.load_state_dict(tensors, strict=False)
    return reference


def gpt2_of_nanogpt(config: GPTConfig, path: Path) -> Any:
    """Returns transformers' GPT-2 with a ckpt.pt's weights, read without our code."""
    torch, reference = required("torch"), _gpt2(config)
    with plain_path(path) as plain:
        tensors = torch.load(plain, map_location="cpu", weights_only=True)["model"]
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # transposed in GPT-2
    tensors = {
        state_dict.plain_name(name): tensor.T if name.endswith(linear) else tensor
        for name, tensor in tensors.items()
    }
    reference.load_state_dict(tensors, strict=False)
    return reference


def gpt2_of_directory(folder: Path) -> Any:
    """Returns the GPT-2 in a Hugging Face directory, as transformers loads it."""
    transformers = required("transformers")
    transformers.utils.logging.disable_progress_bar()
    with plain_path(folder) as plain:
        return transformers.GPT2LMHeadModel.from_pretrained(
            plain, attn_implementation="eager", dtype="float32"
        )


def compare(
    config: GPTConfig,
    params: Any,
    reference: Any,
    *,
    batch_size: int = 4,
    length: int | None = None,
    steps: int = 50,
    new_tokens: int | None = None,
    seed: int = 1337,
) -> Iterator[Check]:
    """Compares a GPT with its PyTorch counterpart, one quantity after the other.

    Args:
      config, params: the GPT, which runs in float32 and without dropout.
      reference: the PyTorch model with the same weights; training changes them.
      batch_size: rows per batch of random tokens.
      length: tokens per row; block_size by default.
      steps: number of AdamW updates; 0 for none.
      new_tokens: greedily decoded tokens; 3 x block_size by default, 0 for none.

    Yields a Check of each activation, the logits (also in bfloat16), the loss, each
    gradient, the greedy text, the loss of each step, and the final parameters. Raises
    ValueError if an argument is out of range.
    """
    T = config.block_size if length is None else length
    if not 1 <= T <= config.block_size:
        raise ValueError(f"length={T} must be from 1 to block_size={config.block_size}")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    count = 3 * config.block_size if new_tokens is None else new_tokens
    config = dataclasses.replace(
        config, dropout=0.0, compute_dtype="float32", remat=False
    )
    reference = reference.float().eval()
    for name, parameter in reference.named_parameters():
        parameter.requires_grad_(config.bias or not name.endswith(".bias"))
    rng = np.random.default_rng(seed)
    text = rng.integers(config.require_vocab_size(), size=16 * (T + 1))
    draw = partial(get_batch, text, seed, batch_size=batch_size, block_size=T)
    batches: list[Batch] = [draw(step) for step in range(max(steps, 1))]
    with jax.default_matmul_precision("highest"):
        norm = yield from _one_pass(config, params, reference, batches[0])
        if count > 0:
            prompt = batches[0][0][0, :_PROMPT_LENGTH].tolist()
            yield _greedy(config, params, reference, prompt, count)
        if steps > 0 and math.isfinite(norm):
            # Chosen so that warmup, decay and clipping all take effect.
            optimizer = OptimizerConfig(warmup_steps=steps // 5, grad_clip=norm / 2)
            yield from _training(config, optimizer, params, reference, batches)


def _gpt2(config: GPTConfig) -> Any:
    """Returns transformers' GPT-2 for this config, with biases of zero."""
    transformers = required("transformers")
    settings = huggingface.gpt2_settings(config, end_of_text=None)
    settings["attn_implementation"] = "eager"
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings))


def _build_model(config: GPTConfig) -> Any:
    """Our model, for JAX's default device."""
    return build_model(config, platform_of(jax.devices()[0]))


def _check(
    section: str,
    name: str,
    ours: Any,
    theirs: Any,
    tolerance: float | None,
    smallest_norm: float | None = None,
) -> Check:
    """Judges the largest difference, or the relative norm if smallest_norm is given."""
    theirs = np.asarray(theirs, np.float64)
    diff = np.asarray(ours, np.float64) - theirs
    largest = float(np.abs(diff).max())
    distance, norm = float(np.linalg.norm(diff)), float(np.linalg.norm(theirs))
    relative = distance / norm if norm else math.inf if distance else 0.0
    error = largest
    if smallest_norm is not None:
        scale = max(norm, smallest_norm)
        error = distance / scale if scale else relative
    return Check(section, name, largest, relative, error, tolerance)


def _one_pass(
    config: GPTConfig, params: Any, reference: Any, batch: Batch
) -> Generator[Check, None, float]:
    """Checks a forward and a backward pass; returns the global gradient norm."""
    inputs_BT, targets_BT = batch
    model = _build_model(config)

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        logits_BTV, variables = model.apply(
            {"params": params},
            inputs_BT,
            capture_intermediates=lambda module, _: module.name in _LAYERS,
            mutable="intermediates",
        )
        losses_BT = ops.cross_entropy(logits_BTV, targets_BT)
        return losses_BT.mean(), (logits_BTV, losses_BT, variables["intermediates"])

    (_, (logits_BTV, losses_BT, captured)), grads = jax.jit(
        jax.value_and_grad(loss_fn, has_aux=True)
    )(params)
    captured = flatten_dict(captured)
    their_losses, their_logits, theirs = _torch_pass(reference, batch)

    for name, activation in theirs.items():
        modules, layer = state_dict.split_layer(name)
        # The output is the first leaf: a block also returns its cache.
        stacked = jax.tree.leaves(captured[*modules, "__call__"])[0]
        yield _check("activations", name, stacked[layer], activation, NORM, 0.0)
    size = max(1.0, float(np.sqrt(np.mean(their_logits**2))))
    yield _check("logits", "float32", logits_BTV, their_logits, LOGITS * size)
    bf16_model = _build_model(dataclasses.replace(config, compute_dtype="bfloat16"))
    bf16_logits_BTV = jax.jit(bf16_model.apply)({"params": params}, inputs_BT)
    tolerance = BFLOAT16_PER_ROOT_LAYER * math.sqrt(config.n_layer)
    yield _check("logits", "bfloat16", bf16_logits_BTV, their_logits, tolerance, 0.0)
    torch = required("torch")
    with torch.no_grad():
        their_bf16_model = copy.deepcopy(reference).to(torch.bfloat16)
        their_bf16_logits = _torch_losses(their_bf16_model, batch)[1].float().numpy()
    name = "bfloat16, PyTorch's own"
    yield _check("logits", name, their_bf16_logits, their_logits, None, 0.0)
    # In float64: a float32 sum of a few hundred losses alone exceeds the tolerance.
    loss, their_loss = (
        np.asarray(losses, np.float64).mean() for losses in (losses_BT, their_losses)
    )
    yield _check("loss", "first batch", loss, their_loss, LOSS * size)
    parameters = reference.named_parameters()
    their_grads = {name: p.grad for name, p in parameters if p.requires_grad}
    norm = math.sqrt(sum(float((grad**2).sum()) for grad in their_grads.values()))
    our_grads = state_dict.to_state_dict(grads, config, out_in=False)
    smallest = SMALLEST_NORM * norm
    yield from _check_each("gradients", our_grads, their_grads, NORM, smallest)
    return norm


def _torch_pass(
    reference: Any, batch: Batch
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Returns PyTorch's losses, logits and activations by module; sets gradients."""
    seen = {}

    def record(name: str, module: Any, inputs: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        seen[name] = output.detach().numpy()

    handles = [
        module.register_forward_hook(partial(record, name))
        for name, module in reference.transformer.named_modules()
        if (last := name.split(".")[-1]) in _LAYERS or last.isdecimal()
    ]
    reference.zero_grad()
    losses, logits_BTV = _torch_losses(reference, batch)
    losses.mean().backward()
    for handle in handles:
        handle.remove()
    return losses.detach().numpy(), logits_BTV.detach().numpy(), seen


def _torch_losses(reference: Any, batch: Batch) -> tuple[Any, Any]:
    """The loss of each token, [B * T], and the logits, [B, T, V]."""
    torch = required("torch")
    inputs_BT, targets_BT = map(torch.tensor, batch)
    logits_BTV = reference(inputs_BT, use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1), targets_BT.flatten().long(), reduction="none"
    )
    return losses, logits_BTV


def _check_each(
    section: str,
    ours: dict[str, np.ndarray],
    theirs: dict[str, Any],
    tolerance: float,
    smallest_norm: float,
) -> Iterator[Check]:
    """Checks every parameter's array, with q, k and v packed together.

    The keys' bias is only reported: softmax is invariant to it, so its gradient is
    rounding noise, which Adam scales up to full steps.
    """
    for name, array in ours.items():
        other = theirs[name].detach().numpy()
        if name.endswith("c_attn.bias"):
            array, other = array.reshape(3, -1), other.reshape(3, -1)
            keys = f"{name}, keys"
            yield _check(section, keys, array[1], other[1], None, smallest_norm)
            array, other = array[[0, 2]], other[[0, 2]]
        yield _check(section, name, array, other, tolerance, smallest_norm)


def _greedy(
    config: GPTConfig, params: Any, reference: Any, prompt: list[int], count: int
) -> Check:
    """Checks that greedy decoding gives the same tokens in both."""
    torch = required("torch")
    greedy = SamplingConfig(temperature=0.0)
    drawn = generate_tokens(_build_model(config), params, [prompt], count, greedy)
    ours = np.concatenate([tokens for tokens, _ in drawn], axis=1)[0]
    tokens, gaps = list(prompt), []
    with torch.no_grad():
        for _ in range(count):
            window = torch.tensor([tokens[-config.block_size :]])
            logits_V = reference(window, use_cache=False).logits[0, -1]
            first, second = logits_V.topk(2).values.tolist()
            gaps.append(first - second)
            tokens.append(int(logits_V.argmax()))
    different = ours != np.array(tokens[len(prompt) :])
    name = f"{count} tokens"
    if different.any():
        at = int(different.argmax())
        name += f", first difference at no. {at + 1}, top-2 logit gap {gaps[at]:.0e}"
    wrong = float(different.sum())
    return Check("greedy text", name, wrong, wrong / count, wrong, 0.0)


def _training(
    config: GPTConfig,
    optimizer: OptimizerConfig,
    params: Any,
    reference: Any,
    batches: list[Batch],
) -> Iterator[Check]:
    """Checks the loss of each AdamW step, and the parameters after the last."""
    inputs_NBT, targets_NBT = map(np.stack, zip(*batches, strict=True))
    train = TrainConfig(max_steps=len(batches))
    full_config = Config(model=config, optimizer=optimizer, train=train)
    model, adamw = _build_model(config), make_optimizer(optimizer, len(batches))
    train_step = make_train_step(next_token(model), adamw, full_config)
    state, metrics = jax.jit(partial(jax.lax.scan, train_step))(
        create_state(model, full_config, single_device_mesh(), params),
        (inputs_NBT, targets_NBT),
    )
    their_losses = _torch_training(reference, optimizer, batches)
    losses = zip(metrics["loss"], their_losses, strict=True)
    for step, (loss, their_loss) in enumerate(losses, start=1):
        yield _check("loss", f"AdamW step {step}", loss, their_loss, STEP_LOSS)
    ours = state_dict.to_state_dict(state.params, config, out_in=False)
    theirs = dict(reference.named_parameters())
    yield from _check_each("final parameters", ours, theirs, FINAL_PARAMETERS, 0.0)


def nanogpt_learning_rate(step: int, config: OptimizerConfig, max_steps: int) -> float:
    """The learning rate of update `step`, from 0. Source: nanoGPT train.py, get_lr."""
    warmup, peak = config.warmup_steps, config.learning_rate
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min((step - warmup) / (max_steps - warmup), 1.0)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + cosine * (peak - config.min_lr)


def _torch_training(
    reference: Any, config: OptimizerConfig, batches: list[Batch]
) -> list[float]:
    """Trains as nanoGPT does; returns the loss per step. Source: nanoGPT train.py."""
    torch = required("torch")
    matrices = [p for p in reference.parameters() if p.dim() >= 2]
    others = [p for p in reference.parameters() if p.dim() < 2]
    adamw = torch.optim.AdamW(
        [{"params": matrices}, {"params": others, "weight_decay": 0.0}],
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
    )
    losses = []
    for step, batch in enumerate(batches):
        for group in adamw.param_groups:
            group["lr"] = nanogpt_learning_rate(step, config, len(batches))
        reference.zero_grad()
        loss = _torch_losses(reference, batch)[0].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), config.grad_clip)
        adamw.step()
        losses.append(float(loss.detach()))
    return losses
