"""Every setting of a run, as frozen dataclasses that validate themselves.

`Config` describes a training run in the sections `model`, `data`, `optimizer`, `train`
and `mesh`; `SamplingConfig` is for generation. The comment beside a field is its help
text on the command line.
"""

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tyro

POST_TRAINING = "ppo", "grpo", "dpo"  # sections of `Config`, of which it has one
INT32_LIMIT = 2**31  # sizes and counts are 32-bit integers on the device
_FLOAT32_MAX = 3.4e38


def _check_types(section: Any) -> None:
    """Raises TypeError if a field's value is not of its annotated type."""
    for name, annotation in typing.get_type_hints(type(section)).items():
        value = getattr(section, name)
        if not _is_instance(value, annotation):
            expected = getattr(annotation, "__name__", str(annotation))
            if typing.get_origin(annotation) is Literal:
                expected = "one of " + ", ".join(typing.get_args(annotation))
            raise TypeError(f"{name}={value!r} must be {expected}")


def _is_instance(value: Any, annotation: Any) -> bool:
    origin, choices = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return value in choices
    if origin is types.UnionType:
        return any(_is_instance(value, choice) for choice in choices)
    if origin is tuple:
        return isinstance(value, tuple) and all(
            _is_instance(element, choices[0]) for element in value
        )
    kinds = (int, float) if annotation is float else annotation
    return isinstance(value, kinds) and (annotation is bool) == isinstance(value, bool)


def _check(condition: bool, message: str) -> None:
    """Raises ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def _check_at_least(section: Any, minimum: float, *names: str) -> None:
    """Raises ValueError unless each named field is None or in range."""
    for name in names:
        value = getattr(section, name)
        _check(
            value is None or minimum <= value < INT32_LIMIT,
            f"{name}={value} must be at least {minimum} and below {INT32_LIMIT}",
        )


def check_seed(seed: int) -> None:
    """Raises ValueError unless `seed` fits 32 bits."""
    _check(0 <= seed < 2**32, f"seed={seed} must be from 0 to {2**32 - 1}")


@dataclass(frozen=True)
class ModelConfig:
    """Fields of every model, named as in nanoGPT."""

    # Not fields:
    shardable = False  # whether parameters can be sharded
    packable = False  # whether a row can hold several documents
    # what is predicted, which determines the corpus, the batches and the objective
    task = "next-token"

    block_size: int = 64  # context length in tokens
    vocab_size: int | None = None  # vocabulary size; by default the tokenizer's

    def __post_init__(self) -> None:
        _check_types(self)
        _check_at_least(self, 1, "block_size", "vocab_size")

    def require_vocab_size(self) -> int:
        """Returns vocab_size; raises ValueError if it is None."""
        if self.vocab_size is None:
            raise ValueError("vocab_size is not known; give --model.vocab-size")
        return self.vocab_size

    def check_length(self, length: int) -> None:
        """Raises ValueError if `length` tokens exceed block_size."""
        _check(
            length <= self.block_size,
            f"{length} tokens do not fit block_size={self.block_size}; crop them to "
            "the last block_size tokens",
        )


@dataclass(frozen=True)
class BigramConfig(ModelConfig):
    """The lecture's first model, a bigram table."""

    architecture: Literal["bigram"] = "bigram"  # kind of model


@dataclass(frozen=True)
class TransformerConfig(ModelConfig):
    """Fields of every Transformer."""

    n_layer: int = 4  # Transformer blocks
    n_head: int = 4  # attention heads per block
    n_embd: int = 128  # width of the residual stream
    dropout: float = 0.0  # fraction of activations dropped during training

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least(self, 1, "n_layer", "n_head", "n_embd")
        if self.n_embd % self.n_head:
            candidates = range(1, min(self.n_embd, 1000) + 1)
            divisors = [str(n) for n in candidates if self.n_embd % n == 0]
            raise ValueError(
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}; "
                f"n_head could be {', '.join(divisors[:12])}"
            )
        _check(
            0 <= self.dropout < 1,
            f"dropout={self.dropout} must be at least 0 and below 1",
        )

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.n_embd // self.n_head


@dataclass(frozen=True)
class LectureConfig(TransformerConfig):
    """One of the lecture's Transformers."""

    # stage of the lecture; each adds to the one before
    architecture: Literal["attention", "feed-forward", "residual", "layer-norm"] = (
        "layer-norm"
    )


@dataclass(frozen=True)
class BlockConfig(TransformerConfig):
    """Fields of every Transformer that is made of `models.layers.Block`."""

    shardable = True
    bias: bool = False  # biases in Linear and LayerNorm, as in GPT-2
    gelu: Literal["exact", "tanh"] = "exact"  # with erf (nanoGPT) or tanh (GPT-2)
    # dtype of activations; parameters, softmax, logits and loss stay float32
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False  # recompute each block in the backward pass, to save memory
    # use cuDNN attention on NVIDIA GPUs from Ampere on, for bfloat16 without dropout
    fused_attention: bool = True
    # layers to unroll in each iteration of the loop over layers, as unrolled layers run
    # faster; always 1 with remat
    unroll: int = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least(self, 1, "unroll")


@dataclass(frozen=True)
class GPTConfig(BlockConfig):
    """The model of nanoGPT and GPT-2."""

    packable = True
    architecture: Literal["gpt"] = "gpt"  # kind of model


@dataclass(frozen=True)
class RewardConfig(BlockConfig):
    """A GPT with a head that gives a text one number, the reward."""

    packable = True
    task = "reward"
    architecture: Literal["reward"] = "reward"  # kind of model


@dataclass(frozen=True)
class ClassifierConfig(BlockConfig):
    """An encoder with a classification head."""

    task = "classification"
    architecture: Literal["classifier"] = "classifier"  # kind of model
    # what the head reads: the mean over all tokens, or the first token
    pooling: Literal["mean", "first"] = "mean"
    # names of the labels, in the order of their ids; by default those of the corpus
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        distinct = {label.strip() for label in self.labels} - {""}
        _check(
            len(distinct) == len(self.labels) != 1,
            f"labels={self.labels!r} must be two or more that differ and are not empty",
        )


@dataclass(frozen=True)
class MaskedLMConfig(BlockConfig):
    """An encoder with a head that predicts masked tokens, as in BERT."""

    task = "masked-tokens"
    architecture: Literal["masked-lm"] = "masked-lm"  # kind of model
    mask_prob: float = 0.15  # fraction of the tokens that are predicted

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(0 < self.mask_prob <= 1, f"mask_prob={self.mask_prob} must be in (0, 1]")


@dataclass(frozen=True)
class Seq2SeqConfig(BlockConfig):
    """An encoder-decoder of n_layer blocks each; block_size is for both sides."""

    task = "translation"
    architecture: Literal["seq2seq"] = "seq2seq"  # kind of model
    # probability that the loss spreads evenly over the vocabulary, in training
    label_smoothing: float = 0.0
    # give the encoder an empty source, to measure what the sources bring
    hide_source: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(
            0 <= self.label_smoothing < 1,
            f"label_smoothing={self.label_smoothing} must be at least 0 and below 1",
        )

    def require_source(self, done: str) -> None:
        """Raises ValueError if the model does not read the source."""
        _check(
            not self.hide_source,
            f"hide_source=True: a model that reads no source can't be {done}; use a "
            "run that was trained without --model.hide-source",
        )


# The configs of all models; `architecture` tells them apart.
AnyModelConfig = (
    GPTConfig
    | RewardConfig
    | ClassifierConfig
    | MaskedLMConfig
    | Seq2SeqConfig
    | LectureConfig
    | BigramConfig
)


def is_token_folder(path: str) -> bool:
    """Whether `prepare` or nanoGPT wrote the folder at `path`."""
    names = ("manifest.json", "train.bin", "val.bin")
    return any(Path(path, name).exists() for name in names)


@dataclass(frozen=True)
class DataConfig:
    """The text, its tokenizer and the batch size."""

    # built-in corpus: Tiny Shakespeare; movie reviews, with a sentiment each; words to
    # reverse; sentence pairs of Tatoeba; conversations; or an assistant's: instructions
    # with exact answers, and small talk
    corpus: Literal[
        "tinyshakespeare", "reviews", "reverse", "tatoeba", "chitchat", "assistant"
    ] = "tinyshakespeare"
    # your own UTF-8 text, JSONL or parquet files, folders of them, or folders of token
    # files (written by `python -m jaxgpt prepare` or by nanoGPT); to classify, CSV or
    # JSONL of text and label; to translate, TSV or JSONL of source and target; with
    # packing conversations, JSONL of messages
    path: tuple[str, ...] = ()
    # source and target language of the corpus tatoeba
    languages: Literal["en-de", "en-es", "en-fr", "de-en", "es-en", "fr-en"] = "en-de"
    # share of the training rows drawn from each folder of tokens, or each file of
    # conversations, in path; by default each one's share of the tokens
    weights: tuple[float, ...] = ()
    # what a row holds: block_size tokens from anywhere; whole documents, each of which
    # attends only to itself; or whole conversations, of which only answers are learned
    packing: Literal["windows", "documents", "conversations"] = "windows"
    # of conversations, learn also what the user and the system say, as a model that has
    # not been pre-trained should; the validation loss is then of these turns too
    learn_prompts: bool = False
    # char; gpt2; bpe, trained on the corpus with --model.vocab-size tokens; or the path
    # of a tokenizer.json, or of a directory with one or with vocab.json and merges.txt
    tokenizer: str = "char"
    batch_size: int = 12  # sequences per update, over all devices
    # microbatches per update, to save memory; -1: one, or on a CPU as many as let each
    # fit the cache
    gradient_accumulation_steps: int = -1
    sha256: str = ""  # of the corpus; set by the first run, checked on resume

    @property
    def has_tokens(self) -> bool:
        """Whether every path is a folder of token files."""
        return self.path != () and all(map(is_token_folder, self.path))

    @property
    def microbatch_size(self) -> int:
        """Sequences in a microbatch, over all devices."""
        return self.batch_size // self.microbatches

    @property
    def microbatches(self) -> int:
        """gradient_accumulation_steps; 1 while it is -1 (see `with_microbatches`)."""
        return max(1, self.gradient_accumulation_steps)

    def __post_init__(self) -> None:
        _check_types(self)
        _check_at_least(self, 1, "batch_size")
        if self.gradient_accumulation_steps != -1:
            _check_at_least(self, 1, "gradient_accumulation_steps")
        _check(
            self.batch_size % self.microbatches == 0,
            f"batch_size={self.batch_size} is not divisible by "
            f"gradient_accumulation_steps={self.gradient_accumulation_steps}; use a "
            "divisor of batch_size",
        )
        _check(
            not self.learn_prompts or self.packing == "conversations",
            f"learn_prompts=True is for conversations, not for packing={self.packing}; "
            "omit it, or give --data.packing conversations",
        )
        _check(
            len(self.weights) in (0, len(self.path)),
            f"weights={self.weights} are not as many as the {len(self.path)} paths; "
            "give each of --data.path a weight",
        )
        _check(
            all(0 < weight < _FLOAT32_MAX for weight in self.weights),
            f"weights={self.weights} must be above 0 and finite",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its learning rate schedule and gradient clipping."""

    learning_rate: float = 1e-3  # peak learning rate, reached after warmup_steps
    min_lr: float = 1e-4  # final learning rate, reached at max_steps by cosine decay
    warmup_steps: int = 100  # updates of linear warmup
    weight_decay: float = 0.1  # applied to matrices and embeddings only
    beta1: float = 0.9  # decay rate of AdamW's first moment
    beta2: float = 0.99  # decay rate of AdamW's second moment
    eps: float = 1e-8  # added to the root of AdamW's second moment
    grad_clip: float = 1.0  # maximum global gradient norm; 0 disables clipping

    def __post_init__(self) -> None:
        _check_types(self)
        _check_at_least(self, 0, "min_lr", "warmup_steps", "weight_decay", "grad_clip")
        _check(
            0 < self.learning_rate < _FLOAT32_MAX,
            f"learning_rate={self.learning_rate} must be above 0 and below "
            f"{_FLOAT32_MAX}",
        )
        _check(
            self.min_lr <= self.learning_rate,
            f"min_lr={self.min_lr} is above learning_rate={self.learning_rate}; "
            "lower it, or make them equal for a constant learning rate",
        )
        _check(
            0 < self.eps < _FLOAT32_MAX, f"eps={self.eps} must be above 0 and finite"
        )
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _check(0 <= value < 1, f"{name}={value} must be at least 0 and below 1")


@dataclass(frozen=True)
class TrainConfig:
    """How long to train, and how often to evaluate, log and save."""

    max_steps: int = 2000  # total number of updates
    eval_interval: int = 250  # updates between evaluations
    eval_iters: int = 20  # batches of each split per evaluation
    log_interval: int = 10  # updates between rows of metrics.jsonl
    checkpoint_interval: int = 250  # updates between checkpoints
    # updates per dispatch; -1: as many as take about a second on the device
    steps_per_call: int = -1
    # number of updates that may be skipped because their loss or gradients are not
    # finite; one more stops the run
    max_skipped_steps: int = 0
    # where to log besides metrics.jsonl; tensorboard needs the package tensorboardX,
    # wandb the package wandb
    log_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    profile: int = 0  # dispatches to trace into RUN_DIR/profile, from the second on
    seed: int = 1337  # seed of initialisation, batches and dropout
    # run to start from; cli.py turns it into the folder of that run's checkpoint
    init_from: tyro.conf.Suppress[str] = ""

    def __post_init__(self) -> None:
        _check_types(self)
        _check_at_least(self, 1, "max_steps", "eval_iters")
        _check_at_least(self, 1, "eval_interval", "log_interval", "checkpoint_interval")
        _check_at_least(self, 0, "max_skipped_steps", "profile")
        _check(
            self.steps_per_call == -1 or self.steps_per_call >= 1,
            f"steps_per_call={self.steps_per_call} must be -1 (chosen for the device) "
            "or at least 1",
        )
        check_seed(self.seed)


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh's axes."""

    # devices to shard the batch over; -1: as many of the remaining ones as divide it
    data: int = -1
    # devices to shard both the batch and the parameters over; -1: the largest number
    # that divides the batch and n_embd
    fsdp: int = 1
    tensor: int = 1  # devices to shard heads and channels over (tensor parallelism)

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("data", "fsdp"):
            size = getattr(self, name)
            _check(
                size == -1 or size >= 1,
                f"mesh.{name}={size} must be -1 (as many as possible) or at least 1",
            )
        _check(self.tensor >= 1, f"mesh.tensor={self.tensor} must be at least 1")


@dataclass(frozen=True)
class DPOConfig:
    """Direct preference optimization; the reference is the run of --init-from."""

    beta: float = 0.1  # how much the policy is kept near the reference
    reference_sha256: str = ""  # set by the first run, checked on resume

    def __post_init__(self) -> None:
        _check_types(self)
        _check(
            0 < self.beta < _FLOAT32_MAX, f"beta={self.beta} must be above 0 and finite"
        )


@dataclass(frozen=True)
class RewardedConfig:
    """Fields of PPO and GRPO; the reference is the run of --init-from.

    An update of train.max_steps is an iteration: data.batch_size responses, and then
    epochs over them in minibatches. Warmup counts iterations too.
    """

    # what is maximised: a function of jaxgpt/posttrain/rewards.py, or MODULE:FUNCTION;
    # a run resumes exactly only if the function is the same
    reward: Annotated[str, tyro.conf.arg(prefix_name=False, metavar="NAME")] = ""
    # or a reward model's run; cli.py turns it into the folder of its best checkpoint
    reward_model: Annotated[
        str, tyro.conf.arg(prefix_name=False, metavar="RUN_DIR")
    ] = ""
    reward_sha256: str = ""  # of the reward model; set by the first run
    # of rewards of the reference's responses, which are scaled to mean 0 and standard
    # deviation 1; set by the first run
    reward_mean: float = 0.0
    reward_std: float = 1.0
    reference_sha256: str = ""  # of the reference; set by the first run
    max_new_tokens: int = 32  # longest response
    # the end of a sentence before this many tokens does not end the response
    min_new_tokens: int = 0
    # what ends a response: a special token (the end of text or of a turn), or also the
    # end of a sentence
    end: Literal["special", "sentence"] = "special"
    no_end_penalty: float = 1.0  # taken from the reward of a response without an end
    temperature: float = 1.0  # logits are divided by it, in rollouts and updates
    beta: float = 0.05  # reward lost for each nat of divergence from the reference
    epochs: int = 4  # passes over the responses of an iteration
    minibatches: int = 4  # updates in each epoch
    clip: float = 0.2  # the ratio to the old policy counts within 1 -+ clip

    def __post_init__(self) -> None:
        _check_types(self)
        _check_at_least(self, 1, "max_new_tokens", "epochs", "minibatches")
        _check_at_least(self, 0, "min_new_tokens", "no_end_penalty", "beta")
        _check(
            not self.min_new_tokens or self.end == "sentence",
            f"min_new_tokens={self.min_new_tokens} has no effect with end={self.end}; "
            "use end=sentence",
        )
        _check(
            self.min_new_tokens <= self.max_new_tokens,
            f"min_new_tokens={self.min_new_tokens} is above max_new_tokens="
            f"{self.max_new_tokens}; lower it",
        )
        _check(
            0 < self.temperature < _FLOAT32_MAX,
            f"temperature={self.temperature} must be above 0 and finite",
        )
        _check(
            0 < self.reward_std < _FLOAT32_MAX,
            f"reward_std={self.reward_std} must be above 0 and finite",
        )
        _check(0 < self.clip < 1, f"clip={self.clip} must be above 0 and below 1")


@dataclass(frozen=True)
class PPOConfig(RewardedConfig):
    """Proximal policy optimization."""

    # adapt beta so that the divergence stays at this many nats per response; 0: fixed
    kl_target: float = 0.0
    kl_horizon: int = 10_000  # responses over which beta adapts
    value_clip: float = 0.2  # the value counts within so much of the old one
    value_coefficient: float = 0.1  # weight of the value's loss
    gae_lambda: float = 0.95  # decay of later rewards in the advantage

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least(self, 1, "kl_horizon")
        _check_at_least(self, 0, "kl_target", "value_clip", "value_coefficient")
        _check(
            0 <= self.gae_lambda <= 1,
            f"gae_lambda={self.gae_lambda} must be from 0 to 1",
        )
        _check(
            not self.kl_target or self.beta > 0,
            "beta=0 can't adapt to kl_target; raise --ppo.beta",
        )


@dataclass(frozen=True)
class GRPOConfig(RewardedConfig):
    """Group relative policy optimization."""

    group_size: int = 8  # responses to each prompt, which are compared

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least(self, 1, "group_size")


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn from the logits."""

    temperature: float = 0.8  # 0 is greedy, 1 keeps the model's probabilities
    top_k: int | None = None  # draw from the k likeliest tokens
    top_p: float | None = None  # draw from the likeliest tokens of total probability p

    def __post_init__(self) -> None:
        _check_types(self)
        _check(
            0 <= self.temperature < float("inf"),
            f"temperature={self.temperature} must be at least 0 (greedy) and finite",
        )
        _check_at_least(self, 1, "top_k")
        if self.top_p is not None:
            _check(0 < self.top_p <= 1, f"top_p={self.top_p} must be in (0, 1]")


@dataclass(frozen=True)
class Config:
    """All settings of a training run."""

    model: tyro.conf.AvoidSubcommands[AnyModelConfig] = field(default_factory=GPTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    # post-training by one of these, if any
    ppo: tyro.conf.AvoidSubcommands[PPOConfig | None] = None
    grpo: tyro.conf.AvoidSubcommands[GRPOConfig | None] = None
    dpo: tyro.conf.AvoidSubcommands[DPOConfig | None] = None

    def __post_init__(self) -> None:
        kinds = [name for name in POST_TRAINING if getattr(self, name)]
        _check(
            not kinds or self.model.architecture == "gpt",
            f"architecture={self.model.architecture} can't be trained by "
            f"{' or '.join(POST_TRAINING)}",
        )
        _check(len(kinds) < 2, f"a run is trained by {' or by '.join(kinds)}; omit one")
        if self.rewarded:
            self._check_rewarded(self.rewarded)
        _check(
            self.data.tokenizer != "bpe" or self.model.vocab_size is not None,
            "tokenizer=bpe needs a vocabulary size to train to; give one, as in "
            "--model.vocab-size 1024",
        )
        _check(
            self.model.shardable or self.mesh.fsdp == self.mesh.tensor == 1,
            f"mesh.fsdp={self.mesh.fsdp} and mesh.tensor={self.mesh.tensor} have no "
            f"effect with architecture={self.model.architecture}, whose parameters "
            "every device holds in full; leave them at 1",
        )
        _check(
            self.model.packable or self.data.packing == "windows",
            f"packing={self.data.packing} needs a model that keeps them apart, "
            f"but architecture={self.model.architecture} does not; use "
            "packing=windows",
        )

    @property
    def rewarded(self) -> PPOConfig | GRPOConfig | None:
        """The section of PPO or GRPO, which maximise a reward."""
        return self.ppo or self.grpo

    def with_rewarded(self, section: PPOConfig | GRPOConfig) -> Self:
        """Returns a config with another section of PPO or GRPO in place of its own."""
        if isinstance(section, PPOConfig):
            return dataclasses.replace(self, ppo=section)
        return dataclasses.replace(self, grpo=section)

    def _check_rewarded(self, section: PPOConfig | GRPOConfig) -> None:
        """Raises ValueError if PPO or GRPO can't run with the other sections."""
        batch_size = self.data.batch_size
        if self.grpo:
            _check(
                batch_size % self.grpo.group_size == 0,
                f"batch_size={batch_size} responses do not divide into groups of grpo."
                f"group_size={self.grpo.group_size}; use a multiple of it",
            )
        _check(
            self.data.microbatch_size % section.minibatches == 0,
            f"batch_size={batch_size} does not divide into minibatches="
            f"{section.minibatches} of gradient_accumulation_steps="
            f"{self.data.microbatches} parts; use a multiple of their product",
        )
        if self.ppo and self.ppo.kl_target:
            # An iteration lowers beta by a fifth of batch_size / kl_horizon.
            _check(
                batch_size < 5 * self.ppo.kl_horizon,
                f"kl_horizon={self.ppo.kl_horizon} lets beta fall below 0 with "
                f"batch_size={batch_size}; raise it above a fifth of batch_size",
            )
        _check(
            getattr(self.model, "compute_dtype", "") != "bfloat16",
            "compute_dtype=bfloat16 is too coarse for PPO and GRPO, which compare "
            "small changes of probabilities; give --model.compute-dtype float32",
        )

    @property
    def rows_at_once(self) -> int:
        """Sequences of which an update computes gradients at once, over all devices."""
        return self.data.microbatch_size // (
            self.rewarded.minibatches if self.rewarded else 1
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns a nested dict of plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """The inverse of `to_dict`; missing fields keep their defaults.

        Raises ValueError or TypeError that names an unknown or invalid field.
        """
        kinds: dict[str, Any] = typing.get_type_hints(cls) | {"model": _read_model}
        kinds |= {"ppo": PPOConfig, "grpo": GRPOConfig, "dpo": DPOConfig}
        built: dict[str, Any] = {}
        for name, section in {**values}.items():
            if name not in kinds:
                raise ValueError(f"unknown section {name!r}")
            if section is None:
                continue
            lists = {n: tuple(v) for n, v in {**section}.items() if isinstance(v, list)}
            built[name] = kinds[name](**section | lists)
        return cls(**built)


def _read_model(**section: Any) -> AnyModelConfig:
    """Builds the model config that `architecture` names.

    Older versions saved all of GPTConfig's fields for every architecture. Those that an
    architecture does not have are ignored if they are at GPTConfig's defaults.
    """
    defaults = vars(GPTConfig())
    for kind in typing.get_args(AnyModelConfig):
        hints = typing.get_type_hints(kind)
        if section.get("architecture", "gpt") in typing.get_args(hints["architecture"]):
            fields = {
                name: value
                for name, value in section.items()
                if name in hints or name not in defaults or value != defaults[name]
            }
            return kind(**fields)
    raise ValueError(f"architecture={section['architecture']!r} is not known")


def training_contradictions(config: Config) -> list[str]:
    """Returns a line for each setting that others keep from taking effect.

    All are valid, but not what a user expects.
    """
    optimizer, train = config.optimizer, config.train
    lines = []
    if optimizer.warmup_steps >= train.max_steps:
        lines.append(
            f"warmup_steps={optimizer.warmup_steps} does not end before max_steps="
            f"{train.max_steps}: the learning rate never reaches "
            f"{optimizer.learning_rate:g}; lower --optimizer.warmup-steps"
        )
    if train.log_interval > train.max_steps:
        lines.append(
            f"log_interval={train.log_interval} is more than max_steps="
            f"{train.max_steps}: no training loss is logged; lower --train.log-interval"
        )
    if config.rewarded:
        ppo = config.ppo or PPOConfig()
        unused = {
            "dropout": getattr(config.model, "dropout", 0.0) > 0,
            "steps_per_call": train.steps_per_call > 1,
            "kl_horizon without kl_target": (
                not ppo.kl_target and ppo.kl_horizon != PPOConfig.kl_horizon
            ),
        }
        if config.grpo and config.grpo.group_size == 1:
            lines.append(
                "group_size=1 compares each response with nothing, so nothing is "
                "learned; raise --grpo.group-size"
            )
        lines += [
            f"{name} has no effect in PPO and GRPO; omit it"
            for name, given in unused.items()
            if given
        ]
        return lines
    intervals = ("eval_interval", "checkpoint_interval")
    interval, name = min((getattr(train, name), name) for name in intervals)
    if interval < min(train.steps_per_call, train.max_steps):
        lines.append(
            f"steps_per_call={train.steps_per_call} never fits into {name}={interval}: "
            "updates are dispatched singly, which is slow; lower "
            f"--train.steps-per-call to {interval}, or set it to -1"
        )
    return lines


def sampling_contradictions(sampling: SamplingConfig, num_samples: int) -> list[str]:
    """Returns a line for each setting of generation that has no effect."""
    lines = []
    if sampling.temperature == 0:
        lines += [
            f"{name}={value} has no effect with temperature=0, which is greedy"
            for name, value in (("top_k", sampling.top_k), ("top_p", sampling.top_p))
            if value is not None
        ]
    if num_samples > 1 and (sampling.temperature == 0 or sampling.top_k == 1):
        cause = "temperature=0" if sampling.temperature == 0 else "top_k=1"
        lines.append(f"all {num_samples} samples are the same with {cause}; raise it")
    return lines
