"""The loss on a text: a quick estimate during training, and the exact value.

N batches in one dispatch   B batch   T time
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxgpt import ops
from jaxgpt.config import Config
from jaxgpt.parallel.defaults import evaluations_per_call
from jaxgpt.parallel.feeding import read_batches
from jaxgpt.parallel.mesh import activation_sharding, batch_sharding, replicated
from jaxgpt.terminal import progress
from jaxgpt.text.batches import EVAL_SEED, Source, Split, predictions
from jaxgpt.text.examples import (
    Examples,
    LabelledBatch,
    LabelledTexts,
    PreferenceBatch,
    Preferences,
    row_keys,
)
from jaxgpt.text.packing import PackedDocuments, TokenRows, read_rows
from jaxgpt.training.objectives import (
    Batch,
    Context,
    LossSum,
    Objective,
    pair_log_probs,
    pair_rewards,
)

# Maps parameters and N batches, both sharded, to results on every process.
EvalStep = Callable[[Any, Batch], Any]
HELD_BYTES = 256 << 20  # of evaluation batches on each device; more are read every time


def make_eval_step(objective: Objective, mesh: Mesh) -> EvalStep:
    """Makes the `EvalStep` of an objective's loss and metrics, without dropout.

    It returns their sums over the N batches.
    """

    def evaluate_batches(params: Any, batches: Batch) -> dict[str, LossSum]:
        def sums(batch: Batch) -> dict[str, LossSum]:
            rows_B = jnp.arange(len(jax.tree.leaves(batch)[0]))
            loss, metrics = objective(params, batch, Context(None, rows_B))
            return {"loss": loss, **metrics}

        return jax.tree.map(partial(jnp.sum, axis=0), jax.lax.map(sums, batches))

    return _compile(evaluate_batches, mesh)


def make_losses_step(model: nn.Module, mesh: Mesh, summed: bool = True) -> EvalStep:
    """Makes the `EvalStep` of next-token losses in nats, without dropout.

    A batch is inputs and targets, i32 [N, B, T], of packed rows also segments, i32, and
    at last parts, i8. The result is f32 [N, B, 2]: the sums over the positions of each
    row where parts is 1, and where it is 2.

    Args:
      summed: if False, the result is each loss, f32 [N, B, T], or 0 where parts is 0.
    """

    def losses_of(params: Any, batch: Batch) -> jax.Array:
        inputs_BT, targets_BT, *segments, parts_BT = batch
        apply = partial(model.apply, {"params": params})
        if segments:
            apply = partial(apply, segments_BT=segments[0])
        if hasattr(model, "hidden"):
            x_BTC, head_VC = apply(inputs_BT, method="hidden"), model.head(params)
            loss_BT = ops.head_losses(x_BTC, head_VC, targets_BT, model.platform)
        else:
            loss_BT = ops.cross_entropy(apply(inputs_BT), targets_BT)
        if not summed:
            return jnp.where(parts_BT > 0, loss_BT, 0)
        in_part_B2T = parts_BT[:, None] == jnp.array([1, 2])[:, None]
        return jnp.where(in_part_B2T, loss_BT[:, None], 0).sum(axis=2)

    def losses(params: Any, batches: Batch) -> jax.Array:
        return jax.lax.map(partial(losses_of, params), batches)

    return _compile(losses, mesh)


def _compile(function: EvalStep, mesh: Mesh) -> EvalStep:
    jitted = jax.jit(function, out_shardings=replicated(mesh))

    def eval_step(params: Any, batches: Batch) -> Any:
        with activation_sharding(mesh):
            return jitted(params, batches)

    return eval_step


@dataclass(frozen=True)
class _ReadAnew:
    """Batches of dispatches that are read from the source whenever they are needed."""

    read: Callable[[range], Batch]
    calls: list[range]

    def __iter__(self) -> Iterator[Batch]:
        return map(self.read, self.calls)


def read_evaluation(
    sources: Mapping[str, Source], config: Config, mesh: Mesh
) -> dict[str, Iterable[Batch]]:
    """The batches of an evaluation of `train.eval_iters` batches of each source.

    They are the same in every evaluation, so they are read only once and stay on the
    devices, if they take less than HELD_BYTES there.

    Returns, by the source's name, the batches of each dispatch, with leaves [N, B, ...]
    that are sharded over the mesh. At most two sizes N occur.
    """
    total, B = config.train.eval_iters, config.data.microbatch_size
    count = evaluations_per_call(config, mesh, total)
    calls = [range(i, min(i + count, total)) for i in range(0, total, count)]
    own_rows = slice(*batch_sharding(mesh).shard_shape((B,)))  # as many as a device has
    first = [source(0, own_rows) for source in sources.values()]
    is_held = total * sum(a.nbytes for a in jax.tree.leaves(first)) <= HELD_BYTES
    batches: dict[str, Iterable[Batch]] = {}
    for name, source in sources.items():
        read = partial(read_batches, source, batch_size=B, mesh=mesh)
        batches[name] = [*map(read, calls)] if is_held else _ReadAnew(read, calls)
    return batches


def estimate(
    eval_step: EvalStep,
    params: Any,
    batches: Mapping[str, Iterable[Batch]],
    advance: Callable[[int], object] = lambda count: None,
) -> dict[str, float]:
    """Means of an objective's loss and metrics over the batches of each source.

    Args:
      eval_step: the result of `make_eval_step`.
      params: the model's parameters.
      batches: the result of `read_evaluation`. The names prefix the metrics: "val"
        gives `val_loss` and so on. Raises ValueError if a metric's total weight is 0.
      advance: called with the number of batches in each dispatch, to show progress.
    """
    names: list[str] = []

    def dispatches() -> Iterator[tuple[int, Batch]]:
        for name, of_source in batches.items():
            for each in of_source:
                names.append(name)
                yield len(jax.tree.leaves(each)[0]), each

    results, means = _results(eval_step, params, dispatches(), advance), {}
    for name in batches:
        of_source = [sums for i, sums in enumerate(results) if names[i] == name]
        totals = jax.tree.map(lambda *a: np.sum(a, dtype=np.float64), *of_source)
        for metric, loss in totals.items():
            if not loss.weight:
                raise ValueError(
                    f"{name}_{metric} has weight 0 in every batch; increase "
                    "--train.eval-iters"
                )
            means[f"{name}_{metric}"] = float(loss.mean())
    return means


@dataclass(frozen=True)
class Evaluation:
    """The exact loss on a text.

    Attributes:
      tokens: number of predictions.
      nats_per_token: their mean loss.
      standard_error: of that mean, in nats, from the variance between segments of
        block_size predictions, packed rows or whatever else was summed, since losses
        within one correlate; None if there is only one. A lower bound, because losses
        correlate a little between segments too.
    """

    tokens: int
    nats_per_token: float
    standard_error: float | None


def evaluate_exactly(
    eval_step: EvalStep,
    params: Any,
    split: TokenRows,
    config: Config,
    mesh: Mesh,
    stride: int | None = None,
    advance: Callable[[int], object] = lambda predictions: None,
) -> Evaluation:
    """The loss on a split, with each of its `predictions` made exactly once.

    Of packed documents, every token is predicted, in the rows of an epoch, and of
    conversations those of answers. Of tokens, windows of block_size predictions start
    every `stride` tokens. Only the last `stride` predictions of a window count, and all
    of the first window, so that each has more than block_size - stride tokens of
    context, except at the start of the text. The batch size does not change the result,
    except for rounding.

    Args:
      eval_step: the result of `make_losses_step`.
      params: the model's parameters.
      split: token ids [tokens], at least two, or packed documents or conversations.
      config: gives block_size and the number of rows per batch.
      mesh: the mesh of `eval_step`.
      stride: block_size by default, so that windows do not overlap.
      advance: called with the number of predictions in each dispatch, to show
        progress.

    Raises ValueError if `stride` is not from 1 to block_size, or given for packed rows,
    and FloatingPointError if the loss is not finite.
    """
    T, count = config.model.block_size, predictions(split)
    if stride is not None and not 1 <= stride <= T:
        raise ValueError(f"stride={stride} must be from 1 to block_size={T}")
    if isinstance(split, PackedDocuments):
        if stride is not None:
            raise ValueError(
                f"stride={stride} slides windows, but packing={config.data.packing} "
                "predicts each document or conversation on its own; omit it"
            )
        sums_R2 = packed_losses(eval_step, params, split, config, mesh, advance)
        return summarize(sums_R2[:, 0], split.counts)
    stride = stride or T
    windows = 1 + -(-max(count - T, 0) // stride)

    def first_counted(window: np.ndarray) -> np.ndarray:
        return np.where(window > 0, window * stride + T - stride, 0)

    def read_windows(window_B: np.ndarray) -> Batch:
        """Reads windows; what counts is cut into parts where a segment of T begins."""
        first_B1 = first_counted(window_B)[:, None]
        position_BT = (window_B * stride)[:, None] + np.arange(T + 1)
        parts_BT = np.where(position_BT < (first_B1 // T + 1) * T, 1, 2)
        parts_BT *= (first_B1 <= position_BT) & (position_BT < count)
        text = split[np.minimum(position_BT, count)].astype(np.int32)
        return text[:, :-1], text[:, 1:], parts_BT[:, :-1].astype(np.int8)

    def predicted(rows: int) -> int:
        return min(T + (rows - 1) * stride, count)

    sums_W2 = _evaluate_rows(
        eval_step, params, config, mesh, advance, read_windows, windows, predicted
    )
    segment_W = first_counted(np.arange(windows)) // T
    sums = np.zeros(-(-count // T) + 1)  # of each segment, and after the last
    np.add.at(sums, segment_W, sums_W2[:, 0])
    np.add.at(sums, segment_W + 1, sums_W2[:, 1])
    return summarize(sums[:-1], np.minimum(T, count - T * np.arange(len(sums) - 1)))


def packed_losses(
    eval_step: EvalStep,
    params: Any,
    packed: PackedDocuments,
    config: Config,
    mesh: Mesh,
    advance: Callable[[int], object] = lambda predictions: None,
) -> np.ndarray:
    """The losses of packed rows in nats: what `make_losses_step` returns, f32 [R, ...].

    What counts is part 1. Takes the arguments of `evaluate_exactly`.
    """
    stops_R = np.cumsum(packed.counts)

    def read(row_B: np.ndarray) -> Batch:
        """Reads rows; of documents, all but the padding counts."""
        inputs_BT, targets_BT, segments_BT, *parts = read_rows(packed, row_B)
        counted_BT = (parts or [segments_BT])[0] > 0
        return inputs_BT, targets_BT, segments_BT, counted_BT.astype(np.int8)

    return _evaluate_rows(
        *(eval_step, params, config, mesh, advance),
        *(read, len(packed), lambda rows: stops_R[rows - 1]),
    )


def read_examples(
    examples: Examples, config: Config, mesh: Mesh
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yields every example once, in dispatches of batches of a microbatch's rows.

    Each dispatch has examples of one bucket; all of a bucket have the same shape.

    Yields indices of the examples [rows], and batches with leaves [N, B, ...], sharded
    over the mesh. Rows beyond these examples repeat one of them, with weight 0.
    """
    B, block_size = config.data.microbatch_size, config.model.block_size
    bucket_N = examples.buckets(block_size)
    for T in np.unique(bucket_N).tolist():
        ids = np.flatnonzero(bucket_N == T)
        count = evaluations_per_call(config, mesh, -(-len(ids) // B))

        def source(step: int, rows: Any, ids: Any = ids, T: int = T) -> Batch:
            number_B = np.arange(step * B, (step + 1) * B)[rows]
            row_B = ids[np.minimum(number_B, len(ids) - 1)]
            weights_B = (number_B < len(ids)).astype(np.float32)
            return examples.read(row_B, T, weights_B, row_keys(EVAL_SEED, row_B))

        for start in range(0, len(ids), B * count):
            steps = range(start // B, start // B + count)
            yield ids[start : start + B * count], read_batches(source, steps, B, mesh)


def evaluate_examples(
    eval_step: EvalStep,
    params: Any,
    examples: Examples,
    config: Config,
    mesh: Mesh,
    advance: Callable[[int], object] = lambda examples: None,
) -> dict[str, float]:
    """Means of an objective's loss and metrics over all examples, each read once.

    Also returns the loss's `weight`: how many tokens or examples it is the mean of.

    Args:
      eval_step: the result of `make_eval_step`.
      params: the model's parameters.
      config: gives block_size and the number of rows per batch.
      advance: called with the number of examples in each dispatch, to show progress.

    Raises ValueError if there is nothing to predict, FloatingPointError if the loss is
    not finite.
    """
    dispatches = ((len(ids), b) for ids, b in read_examples(examples, config, mesh))
    results = _results(eval_step, params, dispatches, advance)
    weight = sum(float(each["loss"].weight) for each in results)
    if not weight:
        raise ValueError("no text has a token to predict; give other texts")
    means = _means(results)
    _check_finite(means["loss"])
    return means | {"weight": weight}


def _label_log_probs(model: nn.Module, params: Any, batch: LabelledBatch) -> jax.Array:
    """Log-probabilities of the labels, f32 [B, labels]."""
    inputs = batch.tokens_BT, batch.lengths_B
    return jax.nn.log_softmax(model.apply({"params": params}, *inputs))


def _pair_values(model: nn.Module, params: Any, batch: PreferenceBatch) -> jax.Array:
    """A reward model's rewards, or a GPT's log-probabilities of responses, [B, 2]."""
    function = pair_rewards if model.config.task == "reward" else pair_log_probs
    return function(model, params, batch, Context(None, jnp.arange(len(batch[0]))))


@cache  # so that later calls have compiled programs
def _make_rows_step(function: Any, model: nn.Module, mesh: Mesh) -> EvalStep:
    """Makes the `EvalStep` of a function of the model, params and batch: [N, B, K]."""

    def rows(params: Any, batches: Batch) -> jax.Array:
        return jax.lax.map(partial(function, model, params), batches)

    return _compile(rows, mesh)


def label_log_probs(
    model: nn.Module,
    params: Any,
    examples: LabelledTexts,
    config: Config,
    mesh: Mesh,
    advance: Callable[[int], object] = lambda examples: None,
) -> np.ndarray:
    """Log-probabilities of the labels in nats, f32 [examples, labels].

    Takes the arguments of `evaluate_examples`, and a classifier. Raises
    FloatingPointError if the result is not finite.
    """
    step = _make_rows_step(_label_log_probs, model, mesh)
    return _of_each_example(step, params, examples, config, mesh, advance)


def pair_values(
    model: nn.Module,
    params: Any,
    pairs: Preferences,
    config: Config,
    mesh: Mesh,
    advance: Callable[[int], object] = lambda pairs: None,
) -> np.ndarray:
    """Values of the chosen and the rejected text of each pair, f32 [pairs, 2].

    They are the rewards of a reward model, and of a GPT the log-probabilities of the
    responses in nats. Takes the arguments of `evaluate_examples`. Raises
    FloatingPointError if the result is not finite.
    """
    step = _make_rows_step(_pair_values, model, mesh)
    return _of_each_example(step, params, pairs, config, mesh, advance)


def with_log_probs(
    model: nn.Module, reference: Any, config: Config, mesh: Mesh, pairs: Preferences
) -> Preferences:
    """The pairs with the log-probabilities of the responses under a reference.

    Args:
      reference: its parameters.
    """
    with progress("reading the pairs with the reference", len(pairs)) as advance:
        every = model, reference, pairs, config, mesh, advance
        return replace(pairs, reference_N2=pair_values(*every))


def _of_each_example(
    eval_step: EvalStep,
    params: Any,
    examples: Examples,
    config: Config,
    mesh: Mesh,
    advance: Callable[[int], object],
) -> np.ndarray:
    """What an `EvalStep` returns of each example, f32 [examples, K]."""
    ids: list[np.ndarray] = []

    def dispatches() -> Iterator[tuple[int, Batch]]:
        for row_N, batches in read_examples(examples, config, mesh):
            ids.append(row_N)
            yield len(row_N), batches

    found = _results(eval_step, params, dispatches(), advance)
    values = np.zeros((len(examples), found[0].shape[-1]), np.float32)
    for row_N, of_batches in zip(ids, found, strict=True):
        values[row_N] = np.concatenate(of_batches)[: len(row_N)]
    _check_finite(values.sum())
    return values


def exact_loss(
    model: nn.Module,
    eval_step: EvalStep,
    split: Split,
    config: Config,
    mesh: Mesh,
) -> Callable[[Any, Callable[[int], object]], float]:
    """Makes a function of parameters and `advance`: the exact loss on a whole split.

    That is `evaluate_examples` for examples, `evaluate_exactly` for tokens. The
    evaluation step is that of examples.
    """
    if isinstance(split, Examples):

        def of_examples(params: Any, advance: Callable[[int], object]) -> float:
            every = eval_step, params, split, config, mesh, advance
            return evaluate_examples(*every)["loss"]

        return of_examples
    losses_step = make_losses_step(model, mesh)

    def of_tokens(params: Any, advance: Callable[[int], object]) -> float:
        every = losses_step, params, split, config, mesh
        return evaluate_exactly(*every, advance=advance).nats_per_token

    return of_tokens


def _means(results: list[Any]) -> dict[str, float]:
    """The means of sums over several dispatches, each a dict of `LossSum`."""
    totals = jax.tree.map(lambda *a: np.sum(a, dtype=np.float64), *results)
    return {name: float(loss.mean()) for name, loss in totals.items()}


def _check_finite(loss: float) -> None:
    if not np.isfinite(loss):
        raise FloatingPointError(
            f"the loss is {loss}: the parameters are invalid; use an earlier checkpoint"
        )


def _evaluate_rows(
    eval_step: EvalStep,
    params: Any,
    config: Config,
    mesh: Mesh,
    advance: Callable[[int], object],
    read: Callable[[np.ndarray], Batch],
    rows: int,
    predicted: Callable[[int], int],
) -> np.ndarray:
    """What `make_losses_step` returns of each row, f32 [rows, ...].

    `read` maps indices of rows to its batches.
    `predicted` is the number of predictions in the first so many rows.
    """
    B = config.data.microbatch_size
    size = B * evaluations_per_call(config, mesh, -(-rows // B))

    def source(step: int, part: slice | np.ndarray) -> Batch:
        """Rows after the last repeat it, but nothing in them counts."""
        row_B = np.arange(step * B, (step + 1) * B)[part]
        *batch, parts_BT = read(np.minimum(row_B, rows - 1))
        return *batch, parts_BT * (row_B < rows)[:, None]

    def dispatches() -> Iterator[tuple[int, Batch]]:
        done = 0
        for start in range(0, rows, size):
            before, done = done, int(predicted(min(start + size, rows)))
            steps = range(start // B, (start + size) // B)
            yield done - before, read_batches(source, steps, B, mesh)

    found = np.concatenate(_results(eval_step, params, dispatches(), advance))
    return found.reshape(-1, found.shape[-1])[:rows]


def summarize(sums: np.ndarray, sizes: np.ndarray) -> Evaluation:
    """Mean and standard error of losses, given sums of them and how many are in each.

    The sizes differ, so the variance is that of a ratio estimator.
    Source: Cochran, "Sampling Techniques" (1977), chapter 6.
    """
    count, n = int(sizes.sum()), len(sums)
    mean, error = sums.sum(dtype=np.float64) / count, None
    _check_finite(mean)
    if n > 1:
        variance = np.sum((sums - mean * sizes) ** 2) * n / (n - 1)
        error = float(np.sqrt(variance) / count)
    return Evaluation(count, float(mean), error)


def _results(
    eval_step: EvalStep,
    params: Any,
    dispatches: Iterable[tuple[int, Batch]],
    advance: Callable[[int], object],
) -> list[Any]:
    """The results of all dispatches, on the host; `advance` gets each one's number.

    Two dispatches are in flight, so that the device never waits; no more, because XLA's
    CPU client can deadlock with more than 32 programs in flight on many devices.
    """
    running: list[tuple[int, Any]] = []
    for number, batches in dispatches:
        running.append((number, eval_step(params, batches)))
        if len(running) > 1:
            number, results = running[-2]
            jax.block_until_ready(results)
            advance(number)
    fetched = jax.device_get([results for _, results in running])
    advance(running[-1][0])
    return fetched
