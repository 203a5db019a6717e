"""Parity with PyTorch: runs the same weights and batches in both, and compares.

The PyTorch model is one of `torch_models`, trained with torch's AdamW as nanoGPT does.

B batch   T time   K labels, or masked positions   V vocab   N updates, or examples
"""

import copy
import dataclasses
import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from jaxgpt import ops
from jaxgpt.config import (
    ClassifierConfig,
    Config,
    DataConfig,
    MaskedLMConfig,
    OptimizerConfig,
    SamplingConfig,
    Seq2SeqConfig,
    TrainConfig,
)
from jaxgpt.generation.decode import generate_tokens
from jaxgpt.interop import required
from jaxgpt.interop.torch_models import Comparable, Reference
from jaxgpt.models import build_model
from jaxgpt.parallel.defaults import platform_of
from jaxgpt.parallel.feeding import stack_batches
from jaxgpt.parallel.mesh import single_device_mesh
from jaxgpt.text.batches import Split, training_source
from jaxgpt.text.examples import (
    LabelledBatch,
    LabelledTexts,
    MaskedBatch,
    MaskedTexts,
    PairBatch,
    Sequences,
    TextPairs,
)
from jaxgpt.training.objectives import Batch, Context, make_objective
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
_EXAMPLES = 64  # random examples of unequal lengths, for models that are not GPTs


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


def compare(
    config: Comparable,
    params: Any,
    reference: Reference,
    *,
    batch_size: int = 4,
    length: int | None = None,
    steps: int = 50,
    new_tokens: int | None = None,
    seed: int = 1337,
) -> Iterator[Check]:
    """Compares a model with its PyTorch counterpart, one quantity after the other.

    Args:
      config, params: the model, which runs in float32 and without dropout.
      reference: the PyTorch model with the same weights; training changes them.
      batch_size: rows per batch of random tokens.
      length: tokens per row, or at most so many if not a GPT; block_size by default.
      steps: number of AdamW updates; 0 for none.
      new_tokens: tokens that a GPT decodes greedily; 3 x block_size by default, 0 for
        none.

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
    module = reference.module.float().eval()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(config.bias or not name.endswith(".bias"))
    split = _random_split(config, T, np.random.default_rng(seed))
    source = training_source(
        split,
        Config(
            model=dataclasses.replace(config, block_size=T),
            data=DataConfig(batch_size=batch_size),
            train=TrainConfig(seed=seed),
        ),
    )
    batches = stack_batches(source, range(max(steps, 1)))
    first = jax.tree.map(lambda a: a[0], batches)
    with jax.default_matmul_precision("highest"):
        norm = yield from _one_pass(config, params, reference, first)
        if count > 0 and config.task == "next-token":
            prompt = first[0][0, :_PROMPT_LENGTH].tolist()
            yield _greedy(config, params, reference, prompt, count)
        if steps > 0 and math.isfinite(norm):
            # Chosen so that warmup, decay and clipping all take effect.
            optimizer = OptimizerConfig(warmup_steps=steps // 5, grad_clip=norm / 2)
            yield from _training(config, optimizer, params, reference, batches)


def _random_split(config: Comparable, T: int, rng: np.random.Generator) -> Split:
    """Random tokens, or examples of 1 to T of them, for the model's task."""
    V, N = config.require_vocab_size(), _EXAMPLES

    def texts() -> Sequences:
        offsets = np.concatenate([[0], rng.integers(1, T + 1, size=N).cumsum()])
        return Sequences(rng.integers(V, size=offsets[-1]), offsets)

    match config:
        case ClassifierConfig(labels=labels):
            labels_N = rng.integers(len(labels), size=N).astype(np.int32)
            return LabelledTexts(texts(), labels_N, np.full(N, ""))
        case MaskedLMConfig(mask_prob=mask_prob):
            return MaskedTexts(texts(), V - 1, V, mask_prob)
        case Seq2SeqConfig():
            return TextPairs(texts(), texts(), end_of_text=0)
        case _:
            return rng.integers(V, size=16 * (T + 1))


def _arguments(batch: Batch) -> tuple[dict[str, Any], Any, Any]:
    """The arguments of the model for a batch, the targets, and their weights."""
    match batch:
        case LabelledBatch(tokens_BT, lengths_B, labels_B, weights_B):
            return {"tokens_BT": tokens_BT, "lengths_B": lengths_B}, labels_B, weights_B
        case MaskedBatch(tokens_BT, lengths_B, positions_BK, targets_BK, weights_BK):
            inputs = {"tokens_BT": tokens_BT, "lengths_B": lengths_B}
            return inputs | {"positions_BK": positions_BK}, targets_BK, weights_BK
        case PairBatch(source_BS, lengths_B, inputs_BT, targets_BT, weights_BT):
            inputs = {"tokens_BT": inputs_BT, "source_BS": source_BS}
            return inputs | {"lengths_B": lengths_B}, targets_BT, weights_BT
    inputs_BT, targets_BT = batch
    return {"tokens_BT": inputs_BT}, targets_BT, np.ones(targets_BT.shape, np.float32)


def _build_model(config: Comparable) -> Any:
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
    config: Comparable, params: Any, reference: Reference, batch: Batch
) -> Generator[Check, None, float]:
    """Checks a forward and a backward pass; returns the global gradient norm."""
    model = _build_model(config)
    inputs, targets, weights = _arguments(batch)
    compared = {path[-1] for path, _ in reference.activations.values()}
    logits, variables = jax.jit(
        partial(
            model.apply,
            capture_intermediates=lambda module, _: module.name in compared,
            mutable="intermediates",
        )
    )({"params": params}, **inputs)
    losses = ops.cross_entropy(logits, targets)
    captured = flatten_dict(variables["intermediates"])
    smoothing = _label_smoothing(config)
    their_losses, their_logits, theirs = _torch_pass(reference, batch, smoothing)

    for name, activation in theirs.items():
        path, layer = reference.activations[name]
        # The output is the first leaf: a block also returns its cache.
        stacked = jax.tree.leaves(captured[*path, "__call__"])[0]
        name = name.removeprefix("transformer.")
        yield _check("activations", name, stacked[layer], activation, NORM, 0.0)
    size = max(1.0, float(np.sqrt(np.mean(their_logits**2))))
    yield _check("logits", "float32", logits, their_logits, LOGITS * size)
    bf16_model = _build_model(dataclasses.replace(config, compute_dtype="bfloat16"))
    bf16_logits = jax.jit(bf16_model.apply)({"params": params}, **inputs)
    stacks = 2 if config.task == "translation" else 1
    layers = stacks * config.n_layer + (config.task == "masked-tokens")  # in its head
    tolerance = BFLOAT16_PER_ROOT_LAYER * math.sqrt(layers)
    yield _check("logits", "bfloat16", bf16_logits, their_logits, tolerance, 0.0)
    torch = required("torch")
    with torch.no_grad():
        their_bf16_module = copy.deepcopy(reference.module).to(torch.bfloat16)
        their_bf16 = dataclasses.replace(reference, module=their_bf16_module)
        their_bf16_logits = _torch_logits(their_bf16, batch).float().numpy()
    name = "bfloat16, PyTorch's own"
    yield _check("logits", name, their_bf16_logits, their_logits, None, 0.0)
    # In float64: a float32 sum of a few hundred losses alone exceeds the tolerance.
    loss, their_loss = (
        np.average(np.asarray(a, np.float64), weights=weights)
        for a in (losses, their_losses)
    )
    yield _check("loss", "first batch", loss, their_loss, LOSS * size)
    parameters = reference.module.named_parameters()
    their_grads = {name: p.grad for name, p in parameters if p.requires_grad}
    norm = math.sqrt(sum(float((grad**2).sum()) for grad in their_grads.values()))
    context = Context(jax.random.key(0), jnp.arange(len(weights)))
    objective = make_objective(model)

    def loss_fn(params: Any) -> jax.Array:
        return objective(params, batch, context)[0].mean()

    our_grads = reference.tensors(jax.jit(jax.grad(loss_fn))(params))
    smallest = SMALLEST_NORM * norm
    yield from _check_each("gradients", our_grads, their_grads, NORM, smallest)
    return norm


def _torch_pass(
    reference: Reference, batch: Batch, smoothing: float
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Returns PyTorch's losses, logits and activations by module; sets gradients.

    The gradients are with label smoothing, the losses without.
    """
    seen = {}

    def record(name: str, module: Any, inputs: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        seen[name] = output.detach().numpy()

    modules = dict(reference.module.named_modules())
    handles = [
        modules[name].register_forward_hook(partial(record, name))
        for name in reference.activations
    ]
    reference.module.zero_grad()
    logits = _torch_logits(reference, batch)
    for handle in handles:
        handle.remove()
    _torch_loss(logits, batch, smoothing)[1].backward()
    losses, _ = _torch_loss(logits, batch, 0.0)
    return losses.detach().numpy(), logits.detach().numpy(), seen


def _torch_logits(reference: Reference, batch: Batch) -> Any:
    arrays = {k: np.asarray(a, np.int64) for k, a in _arguments(batch)[0].items()}
    tensors = {name: required("torch").tensor(a) for name, a in arrays.items()}
    return reference.logits(reference.module, **tensors)


def _torch_loss(logits: Any, batch: Batch, smoothing: float) -> tuple[Any, Any]:
    """The loss of each target, and their weighted mean, by PyTorch."""
    torch = required("torch")
    targets, weights = map(torch.tensor, _arguments(batch)[1:])
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, -2),
        targets.flatten().long(),
        reduction="none",
        label_smoothing=smoothing,
    ).reshape(targets.shape)
    return losses, (losses * weights).sum() / weights.sum()


def _label_smoothing(config: Comparable) -> float:
    return config.label_smoothing if isinstance(config, Seq2SeqConfig) else 0.0


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
        if name.endswith(("c_attn.bias", "in_proj_bias")):
            array, other = array.reshape(3, -1), other.reshape(3, -1)
            keys = f"{name}, keys"
            yield _check(section, keys, array[1], other[1], None, smallest_norm)
            array, other = array[[0, 2]], other[[0, 2]]
        yield _check(section, name, array, other, tolerance, smallest_norm)


def _greedy(
    config: Comparable,
    params: Any,
    reference: Reference,
    prompt: list[int],
    count: int,
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
            logits_V = reference.logits(reference.module, window)[0, -1]
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
    config: Comparable,
    optimizer: OptimizerConfig,
    params: Any,
    reference: Reference,
    batches: Batch,
) -> Iterator[Check]:
    """Checks the loss of each AdamW step, and the parameters after the last."""
    steps = len(jax.tree.leaves(batches)[0])
    full_config = Config(
        model=config, optimizer=optimizer, train=TrainConfig(max_steps=steps)
    )
    model, adamw = _build_model(config), make_optimizer(optimizer, steps)
    train_step = make_train_step(make_objective(model), adamw, full_config)
    state, metrics = jax.jit(partial(jax.lax.scan, train_step))(
        create_state(model, full_config, single_device_mesh(), params), batches
    )
    smoothing = _label_smoothing(config)
    their_losses = _torch_training(reference, optimizer, batches, smoothing)
    losses = zip(metrics["loss"], their_losses, strict=True)
    for step, (loss, their_loss) in enumerate(losses, start=1):
        yield _check("loss", f"AdamW step {step}", loss, their_loss, STEP_LOSS)
    ours, theirs = reference.tensors(state.params), reference.module.named_parameters()
    yield from _check_each(
        "final parameters", ours, dict(theirs), FINAL_PARAMETERS, 0.0
    )


def nanogpt_learning_rate(step: int, config: OptimizerConfig, max_steps: int) -> float:
    """The learning rate of update `step`, from 0. Source: nanoGPT train.py, get_lr."""
    warmup, peak = config.warmup_steps, config.learning_rate
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min((step - warmup) / (max_steps - warmup), 1.0)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + cosine * (peak - config.min_lr)


def _torch_training(
    reference: Reference, config: OptimizerConfig, batches: Batch, smoothing: float
) -> list[float]:
    """Trains as nanoGPT does; returns the loss per step. Source: nanoGPT train.py."""
    torch, module = required("torch"), reference.module
    matrices = [p for p in module.parameters() if p.dim() >= 2]
    others = [p for p in module.parameters() if p.dim() < 2]
    adamw = torch.optim.AdamW(
        [{"params": matrices}, {"params": others, "weight_decay": 0.0}],
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
    )
    losses, steps = [], len(jax.tree.leaves(batches)[0])
    for step in range(steps):
        batch = jax.tree.map(lambda a, step=step: a[step], batches)
        for group in adamw.param_groups:
            group["lr"] = nanogpt_learning_rate(step, config, steps)
        module.zero_grad()
        _, loss = _torch_loss(_torch_logits(reference, batch), batch, smoothing)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), config.grad_clip)
        adamw.step()
        losses.append(float(loss.detach()))
    return losses
