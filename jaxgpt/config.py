"""Every setting of a run: frozen dataclasses that check themselves.

`Config` is a training run's, with the sections `model`, `data`, `optimizer`, `train`
and `mesh`; `SamplingConfig` is for generation. The comment beside a field is its help
text on the command line.
"""

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import tyro

INT32_LIMIT = 2**31  # sizes and counts are 32-bit integers on the device
_FLOAT32_MAX = 3.4e38


def _check_types(section: Any) -> None:
    """Raises TypeError where a field's value is not of its annotated type."""
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
        return isinstance(value, tuple) and all(isinstance(s, str) for s in value)
    kinds = (int, float) if annotation is float else annotation
    return isinstance(value, kinds) and (annotation is bool) == isinstance(value, bool)


def _check(holds: bool, message: str) -> None:
    """Raises ValueError with `message` unless `holds`."""
    if not holds:
        raise ValueError(message)


def _check_at_least(section: Any, minimum: float, *names: str) -> None:
    """Raises ValueError unless each is in range, or None where that is allowed."""
    for name in names:
        value = getattr(section, name)
        _check(
            value is None or minimum <= value < INT32_LIMIT,
            f"{name}={value} must be at least {minimum}, under {INT32_LIMIT}",
        )


def check_seed(seed: int) -> None:
    """Raises ValueError unless `seed` fits 32 bits."""
    _check(0 <= seed < 2**32, f"seed={seed} must be from 0 to {2**32 - 1}")


@dataclass(frozen=True)
class ModelConfig:
    """What every kind of model has. Names are nanoGPT's."""

    shardable = False  # no setting: whether devices can each hold a part of it

    block_size: int = 64  # tokens the model can look back over
    vocab_size: int | None = None  # tokens it knows; the tokenizer fills it in

    def __post_init__(self) -> None:
        _check_types(self)
        _check_at_least(self, 1, "block_size", "vocab_size")

    def require_vocab_size(self) -> int:
        """vocab_size; raises ValueError where nothing has settled it yet."""
        if self.vocab_size is None:
            raise ValueError("vocab_size is not known; give --model.vocab-size")
        return self.vocab_size

    def check_length(self, length: int) -> None:
        """Raises ValueError if the model can't look at `length` tokens at once."""
        _check(
            length <= self.block_size,
            f"{length} tokens do not fit block_size={self.block_size}; crop them to "
            "the last block_size tokens",
        )


@dataclass(frozen=True)
class BigramConfig(ModelConfig):
    """The lecture's first model, a table of bigrams."""

    architecture: Literal["bigram"] = "bigram"  # the kind of model


@dataclass(frozen=True)
class TransformerConfig(ModelConfig):
    """What every Transformer has."""

    n_layer: int = 4  # Transformer blocks
    n_head: int = 4  # attention heads per block
    n_embd: int = 128  # width of the residual stream
    dropout: float = 0.0  # fraction of activations dropped in training

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least(self, 1, "n_layer", "n_head", "n_embd")
        if self.n_embd % self.n_head:
            few = range(1, min(self.n_embd, 1000) + 1)
            divisors = [str(n) for n in few if self.n_embd % n == 0]
            raise ValueError(
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}; "
                f"n_head could be {', '.join(divisors[:12])}"
            )
        _check(
            0 <= self.dropout < 1, f"dropout={self.dropout} must be at least 0, under 1"
        )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.n_embd // self.n_head


@dataclass(frozen=True)
class LectureConfig(TransformerConfig):
    """A rung of the lecture's ladder above the table of bigrams."""

    # the rung, each with all of the one before
    architecture: Literal["attention", "feed-forward", "residual", "layer-norm"] = (
        "layer-norm"
    )


@dataclass(frozen=True)
class GPTConfig(TransformerConfig):
    """nanoGPT's and GPT-2's model."""

    shardable = True
    architecture: Literal["gpt"] = "gpt"  # the kind of model
    bias: bool = False  # biases in Linear and LayerNorm, as in GPT-2
    gelu: Literal["exact", "tanh"] = "exact"  # nanoGPT's (erf) or GPT-2's approximation
    # of activations; parameters, softmax, logits and loss stay float32
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False  # recompute each block in the backward pass, to save memory
    # on NVIDIA GPUs from Ampere on use cuDNN's attention, for bfloat16 without dropout
    fused_attention: bool = True
    # layers that are compiled one by one, which runs faster; deeper models loop over
    # this many at a time, and with remat over one
    unroll: int = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least(self, 1, "unroll")


# The kinds of models; `architecture` tells them apart.
AnyModelConfig = GPTConfig | LectureConfig | BigramConfig


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from, and how much of it one update sees."""

    corpus: Literal["tinyshakespeare"] = "tinyshakespeare"  # a corpus known by name
    path: tuple[str, ...] = ()  # your own UTF-8 files, or one nanoGPT .bin directory
    # char; bpe, trained on the corpus to --model.vocab-size tokens; gpt2; or a path to
    # a saved one: tokenizer.json, or vocab.json and merges.txt in a directory
    tokenizer: str = "char"
    batch_size: int = 12  # sequences per update, over all devices
    # pieces a batch is cut into, to save memory; -1: none, on a CPU such as stay in its
    # cache
    gradient_accumulation_steps: int = -1
    sha256: str = ""  # of the corpus, filled in by the first run; a resume must match

    @property
    def has_tokens(self) -> bool:
        """Whether the path is one directory, of token files."""
        return len(self.path) == 1 and Path(self.path[0]).is_dir()

    @property
    def microbatch_size(self) -> int:
        """Sequences that run at the same time, over all devices, at most."""
        return self.batch_size // self.microbatches

    @property
    def microbatches(self) -> int:
        """gradient_accumulation_steps, 1 where it is left to the device."""
        return max(1, self.gradient_accumulation_steps)

    def __post_init__(self) -> None:
        _check_types(self)
        _check_at_least(self, 1, "batch_size")
        if self.gradient_accumulation_steps != -1:
            _check_at_least(self, 1, "gradient_accumulation_steps")
        _check(
            self.batch_size % self.microbatches == 0,
            f"batch_size={self.batch_size} is not divisible by "
            f"gradient_accumulation_steps={self.gradient_accumulation_steps}",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its schedule and its clipping."""

    learning_rate: float = 1e-3  # highest, reached after warmup_steps
    min_lr: float = 1e-4  # lowest, reached at max_steps by a cosine
    warmup_steps: int = 100  # updates of linear warmup
    weight_decay: float = 0.1  # of matrices and embeddings only
    beta1: float = 0.9  # decay of AdamW's first moment
    beta2: float = 0.99  # decay of AdamW's second moment
    grad_clip: float = 1.0  # largest global gradient norm; 0 does not clip

    def __post_init__(self) -> None:
        _check_types(self)
        _check_at_least(self, 0, "min_lr", "warmup_steps", "weight_decay", "grad_clip")
        _check(
            0 < self.learning_rate < _FLOAT32_MAX,
            f"learning_rate={self.learning_rate} must be above 0, under {_FLOAT32_MAX}",
        )
        _check(
            self.min_lr <= self.learning_rate,
            f"min_lr={self.min_lr} is above learning_rate={self.learning_rate}; "
            "lower it, or make them equal for a constant learning rate",
        )
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _check(0 <= value < 1, f"{name}={value} must be at least 0, under 1")


@dataclass(frozen=True)
class TrainConfig:
    """How long to train, and how often to look, log and save."""

    max_steps: int = 2000  # updates in all
    eval_interval: int = 250  # updates between evaluations
    eval_iters: int = 20  # batches of each split that an evaluation averages
    log_interval: int = 10  # updates between rows of metrics.jsonl
    checkpoint_interval: int = 250  # updates between checkpoints
    steps_per_call: int = 1  # updates per dispatch; aim at about a second
    # updates to leave out if their loss or gradients are not finite; one more of them
    # stops the run
    max_skipped_steps: int = 0
    profile: int = 0  # dispatches to trace, from the second on, into RUN_DIR/profile
    seed: int = 1337  # of initialisation, batches and dropout
    # run to start from, as --init-from names it; then the folder of its checkpoint
    init_from: tyro.conf.Suppress[str] = ""

    def __post_init__(self) -> None:
        _check_types(self)
        _check_at_least(self, 1, "max_steps", "eval_iters", "steps_per_call")
        _check_at_least(self, 1, "eval_interval", "log_interval", "checkpoint_interval")
        _check_at_least(self, 0, "max_skipped_steps", "profile")
        check_seed(self.seed)


@dataclass(frozen=True)
class MeshConfig:
    """How the devices are arranged."""

    # groups of devices that share each batch; -1: as many as remain and divide it
    data: int = -1
    # devices that share the batch and, in parts, the parameters; -1: as many as divide
    # the batch and n_embd
    fsdp: int = 1
    tensor: int = 1  # devices that share the heads and channels of the same rows

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("data", "fsdp"):
            size = getattr(self, name)
            _check(
                size == -1 or size >= 1,
                f"mesh.{name}={size} must be -1 (the devices that remain) or at least "
                "1",
            )
        _check(self.tensor >= 1, f"mesh.tensor={self.tensor} must be at least 1")


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn from the logits."""

    temperature: float = 0.8  # 0 takes the likeliest, 1 samples the model's own odds
    top_k: int | None = None  # draw from the k likeliest tokens only
    top_p: float | None = None  # draw from the likeliest that together have odds p

    def __post_init__(self) -> None:
        _check_types(self)
        _check(
            0 <= self.temperature < float("inf"),
            f"temperature={self.temperature} must be at least 0 (greedy) and finite",
        )
        _check_at_least(self, 1, "top_k")
        if self.top_p is not None:
            _check(0 < self.top_p <= 1, f"top_p={self.top_p} must be above 0, up to 1")


@dataclass(frozen=True)
class Config:
    """One experiment."""

    model: tyro.conf.AvoidSubcommands[AnyModelConfig] = field(default_factory=GPTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        _check(
            self.data.tokenizer != "bpe" or self.model.vocab_size is not None,
            "tokenizer=bpe is trained to as many tokens as you choose; say how many, "
            "as in --model.vocab-size 1024",
        )
        _check(
            self.model.shardable or self.mesh.fsdp == self.mesh.tensor == 1,
            f"mesh.fsdp={self.mesh.fsdp} and mesh.tensor={self.mesh.tensor} change "
            f"nothing with architecture={self.model.architecture}, whose parameters "
            "every device holds; leave them at 1",
        )

    def to_dict(self) -> dict[str, Any]:
        """Nested dict of plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """The inverse of `to_dict`; fields left out keep their defaults.

        Raises ValueError or TypeError that names the field when one is unknown or holds
        a value it cannot hold.
        """
        kinds: dict[str, Any] = typing.get_type_hints(cls) | {"model": _read_model}
        built: dict[str, Any] = {}
        for name, section in {**values}.items():
            if name not in kinds:
                raise ValueError(f"unknown section {name!r}")
            lists = {n: tuple(v) for n, v in {**section}.items() if isinstance(v, list)}
            built[name] = kinds[name](**section | lists)
        return cls(**built)


def _read_model(**section: Any) -> AnyModelConfig:
    """The model's section, of the kind that its architecture says.

    Once every kind had the GPT's fields, and those that it did not read at their
    defaults, which are left out.
    """
    gpts = vars(GPTConfig())
    for kind in typing.get_args(AnyModelConfig):
        hints = typing.get_type_hints(kind)
        if section.get("architecture", "gpt") in typing.get_args(hints["architecture"]):
            fields = {
                name: value
                for name, value in section.items()
                if name in hints or name not in gpts or value != gpts[name]
            }
            return kind(**fields)
    raise ValueError(f"architecture={section['architecture']!r} is not known")
