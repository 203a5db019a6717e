"""Rollouts: a policy's responses to prompts, and their log-probabilities.

B batch   P time of prompts   T time of prompt and response   N tokens of responses
C n_embd
"""

import re
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from jaxgpt.config import RewardedConfig, SamplingConfig
from jaxgpt.generation.decode import (
    NO_LATE_ENDS,
    LateEnds,
    decode_step,
    prefill,
    unstack_layers,
)
from jaxgpt.parallel.feeding import shard_batch
from jaxgpt.parallel.mesh import (
    activation_sharding,
    batch_sharding,
    data_parallel_mesh,
    replicated,
    single_device_mesh,
)
from jaxgpt.run import Run
from jaxgpt.text.examples import PromptBatch, Prompts, Sequences, row_keys
from jaxgpt.text.tokenizer import Tokenizer

_SENTENCE_END = re.compile(r"[\s\"'(]*[.!?]+[\s\"')]*")
_ROWS = 512  # most rows of a batch of `in_batches`
_MULTIPLE = 8  # of T, so that it divides over devices


class Program:
    """A jitted function of arrays on a mesh, compiled once for each shape of these.

    Several threads may call it: the others wait for the one that compiles.
    """

    def __init__(
        self,
        function: Any,
        mesh: Mesh,
        out_shardings: Any,
        bound: tuple[Any, ...] = (),
        **options: Any,
    ):
        """Takes the first arguments of all calls, `bound`, and options of `jax.jit`."""
        self._jitted = jax.jit(function, out_shardings=out_shardings, **options)
        self._mesh, self._bound, self._lock = mesh, bound, threading.Lock()
        self._compiled: dict[Any, jax.stages.Compiled] = {}

    def compile(self, *arguments: Any) -> jax.stages.Compiled:
        """The compiled program for the arguments, which are arrays or their shapes."""
        arguments = *self._bound, *arguments
        key = tuple((a.shape, a.dtype) for a in jax.tree.leaves(arguments))
        with self._lock:
            if key not in self._compiled:
                with activation_sharding(self._mesh):
                    self._compiled[key] = self._jitted.lower(*arguments).compile()
            return self._compiled[key]

    def __call__(self, *arguments: Any) -> Any:
        """Runs the program, which it compiles first if it is new."""
        return self.compile(*arguments)(*self._bound, *arguments)


class Rules(NamedTuple):
    """How a response is drawn, and how it ends.

    Attributes:
      max_new_tokens: N.
      end_tokens: a response ends with the first of these.
      late_ends: or of these, if it has enough tokens.
      temperature: logits are divided by it.
    """

    max_new_tokens: int
    end_tokens: tuple[int, ...] = ()
    late_ends: LateEnds = NO_LATE_ENDS
    temperature: float = 1.0


def make_rules(config: RewardedConfig, tokenizer: Tokenizer) -> Rules:
    """The rules of a config.

    Special tokens end a response: the end of text, and the end of a turn. With
    end=sentence so do, from min_new_tokens on, tokens of a full stop, exclamation or
    question mark.
    """
    late_ends = NO_LATE_ENDS
    if config.end == "sentence":
        ids = range(tokenizer.vocab_size)
        found = (i for i in ids if _SENTENCE_END.fullmatch(tokenizer.decode([i])))
        late_ends = LateEnds(tuple(found), config.min_new_tokens)
    ends, temperature = special_ids(tokenizer), config.temperature
    return Rules(config.max_new_tokens, ends, late_ends, temperature)


def special_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids of all special tokens."""
    return tuple(tokenizer.special_id(token) for token in tokenizer.special)


@flax.struct.dataclass
class Rollout:
    """Responses to a batch of prompts.

    Attributes:
      tokens_BT: the prompts, each followed by its response, padded on the right, i32.
      prompts_B: tokens in each prompt, i32.
      counts_B: tokens in each response, with its end, i32.
      ended_B: whether the response has an end.
    """

    tokens_BT: Array
    prompts_B: Array
    counts_B: Array
    ended_B: Array

    def lengths(self) -> Array:
        """Tokens in each row before the padding, i32 [B]."""
        return self.prompts_B + self.counts_B


def rollout(
    model: nn.Module, rules: Rules, params: Any, prompts: PromptBatch
) -> Rollout:
    """Samples a response to each prompt, until all have an end or N tokens.

    A row's response depends only on its prompt, its key and the parameters. A prompt
    and N tokens must fit block_size. To be traced inside `jit`.
    """
    sampling = SamplingConfig(temperature=rules.temperature)
    N, params = rules.max_new_tokens, unstack_layers(params)
    key_B = jax.random.wrap_key_data(prompts.keys_B2)
    state = prefill(
        model, params, prompts.tokens_BP, prompts.lengths_B, key_B, cached=True
    )

    def is_unfinished(carry: Any) -> Array:
        n, state = carry
        return (n < N) & ~state.finished_B.all()

    def step(carry: Any) -> Any:
        n, state = carry
        state, _ = decode_step(
            model, sampling, rules.end_tokens, params, state, rules.late_ends
        )
        return n + 1, state

    _, state = jax.lax.while_loop(is_unfinished, step, (0, state))
    T = -(-(prompts.tokens_BP.shape[1] + N) // _MULTIPLE) * _MULTIPLE
    counts_B = state.length_B - prompts.lengths_B
    return Rollout(
        state.tokens_BT[:, :T], prompts.lengths_B, counts_B, state.finished_B
    )


def make_rollout(model: nn.Module, rules: Rules, mesh: Mesh) -> Program:
    """Makes `respond(params, prompts)`, which samples a response to each prompt."""
    return Program(partial(rollout, model, rules), mesh, batch_sharding(mesh))


def respond(
    run: Run, prompts: Sequence[np.ndarray], rules: Rules, seed: int
) -> Rollout:
    """Samples a response of a run to each prompt, in batches over all local devices.

    Args:
      prompts: token ids of each, at least one; each response depends only on its
        prompt, (seed, its index) and the model.

    Returns arrays on the host. Raises ValueError if a prompt leaves no room in
    block_size for max_new_tokens.
    """
    examples, T = Prompts(Sequences.join(prompts)), run.config.model.block_size
    longest = int(examples.lengths.max())
    if longest + rules.max_new_tokens > T:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens={rules.max_new_tokens} "
            f"exceed block_size={T}; shorten one of them"
        )
    row_B, weights_B = np.arange(len(prompts)), np.ones(len(prompts), np.float32)
    batch = examples.read(row_B, longest, weights_B, row_keys(seed, row_B))
    rolled: Rollout = in_batches(partial(rollout, run.model, rules), run, batch)
    return rolled


def in_batches(function: Callable[[Any, Any], Any], run: Run, rows: Any) -> Any:
    """`function(params, rows)` of all rows of a pytree, on the host.

    It runs on batches over all local devices.
    """
    total = len(jax.tree.leaves(rows)[0])
    size, found = min(_ROWS, total), []
    mesh = data_parallel_mesh(run.config.model, run.params, size, 1)
    mesh = mesh or single_device_mesh()
    program = Program(function, mesh, batch_sharding(mesh))
    params = jax.device_put(run.params, replicated(mesh))
    for start in range(0, total, size):
        row_B = np.minimum(np.arange(start, start + size), total - 1)
        batch = jax.tree.map(lambda a, row_B=row_B: np.asarray(a)[row_B], rows)
        found.append(jax.device_get(program(params, shard_batch(mesh, batch))))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:total], *found)


def log_probs(run: Run, rolled: Rollout, rules: Rules) -> np.ndarray:
    """Log-probabilities of the responses' tokens under a run in nats, f32 [B, N].

    0 after the response.
    """

    def predict(params: Any, rolled: Rollout) -> Array:
        texts = rolled.tokens_BT, rolled.prompts_B, rules.max_new_tokens
        found_BN, *_ = predict_responses(run.model, params, *texts, rules.temperature)
        return found_BN * response_mask(rolled.counts_B, rules.max_new_tokens)

    found_BN: np.ndarray = in_batches(predict, run, rolled)
    return found_BN


def response_mask(counts_B: Array, N: int) -> Array:
    """Which of N tokens are of the response, f32 [B, N]."""
    return (jnp.arange(N) < counts_B[:, None]).astype(jnp.float32)


def predict_responses(
    model: nn.Module,
    params: Any,
    tokens_BT: Array,
    prompts_B: Array,
    N: int,
    temperature: float = 1.0,
) -> tuple[Array, Array, Array]:
    """What the model predicts of N tokens after each prompt, without dropout.

    Returns the tokens' log-probabilities in nats and the entropies of their
    distributions, f32 [B, N] each, of the logits divided by the temperature; and the
    hidden states before them, f32 [B, N, C]. Beyond the row they repeat its last token.
    """
    at_BN = prompts_B[:, None] + jnp.arange(N)
    at_BN = jnp.minimum(at_BN, tokens_BT.shape[1] - 1)
    token_BN = jnp.take_along_axis(tokens_BT, at_BN, axis=1)
    apply = partial(model.apply, {"params": params})
    x_BTC = apply(tokens_BT, method="hidden")
    x_BNC = jnp.take_along_axis(x_BTC, at_BN[..., None] - 1, axis=1)
    logits_BNV = apply(x_BNC, method="logits") / temperature
    log_probs_BNV = jax.nn.log_softmax(logits_BNV)
    entropy_BN = -(jnp.exp(log_probs_BNV) * log_probs_BNV).sum(axis=-1)
    of_token = jnp.take_along_axis(log_probs_BNV, token_BN[..., None], axis=-1)
    return of_token[..., 0], entropy_BN, x_BNC.astype(jnp.float32)
