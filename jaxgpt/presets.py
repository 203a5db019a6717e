"""Named experiments. Each says its command, hardware, wall time and expected loss.

Losses are validation losses in nats per token.
"""

from collections.abc import Callable

from jaxgpt.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)


def smoke() -> Config:
    """A tiny GPT that shows everything works: 10 s on 2 CPU cores, val 2.92.

    python train.py smoke
    """
    return Config(
        model=ModelConfig(n_layer=2, n_head=4, n_embd=64, block_size=32, dropout=0.1),
        data=DataConfig(batch_size=16),
        optimizer=OptimizerConfig(warmup_steps=10),
        train=TrainConfig(
            max_steps=100,
            eval_interval=50,
            eval_iters=5,
            log_interval=1,
            checkpoint_interval=50,
            steps_per_call=10,
        ),
    )


def lecture_bigram() -> Config:
    """The lecture's first model, a table of bigrams: 10 s on 2 CPU cores, val 2.49.

    python train.py lecture-bigram
    """
    return Config(
        model=ModelConfig(architecture="bigram", block_size=8),
        data=DataConfig(batch_size=32),
        optimizer=OptimizerConfig(
            learning_rate=1e-2,
            min_lr=1e-2,
            warmup_steps=0,
            weight_decay=0.01,
            beta2=0.999,
            grad_clip=0.0,
        ),
        train=TrainConfig(
            max_steps=3000,
            eval_interval=300,
            eval_iters=200,
            checkpoint_interval=300,
            steps_per_call=100,
        ),
    )


def shakespeare_char_cpu() -> Config:
    """nanoGPT's recipe for a laptop: 75 s on 2 CPU cores, val 1.90.

    python train.py shakespeare-char-cpu
    """
    return Config(train=TrainConfig(steps_per_call=25))


def shakespeare_char() -> Config:
    """nanoGPT's 10.8M parameters: by its account 3 min on an A100, val 1.47.

    python train.py shakespeare-char
    """
    return Config(
        model=ModelConfig(
            n_layer=6,
            n_head=6,
            n_embd=384,
            block_size=256,
            dropout=0.2,
            compute_dtype="bfloat16",
        ),
        data=DataConfig(batch_size=64),
        train=TrainConfig(max_steps=5000, eval_iters=200),
    )


def gpt2_124m() -> Config:
    """GPT-2's smallest, on OpenWebText: by nanoGPT's account 4 days on 8 A100s, 2.85.

    python train.py gpt2-124m --data.path DIR

    DIR holds what nanoGPT's data/openwebtext/prepare.py makes: train.bin, val.bin. One
    GPU of 80 GB needs --data.gradient-accumulation-steps 40.
    """
    return Config(
        model=ModelConfig(
            n_layer=12,
            n_head=12,
            n_embd=768,
            block_size=1024,
            vocab_size=50257,
            compute_dtype="bfloat16",
        ),
        data=DataConfig(
            path=("data/openwebtext",), batch_size=480, gradient_accumulation_steps=5
        ),
        optimizer=OptimizerConfig(
            learning_rate=6e-4, min_lr=6e-5, warmup_steps=2000, beta2=0.95
        ),
        train=TrainConfig(
            max_steps=600_000,
            eval_interval=1000,
            eval_iters=200,
            checkpoint_interval=1000,
        ),
    )


PRESETS: dict[str, Callable[[], Config]] = {
    "smoke": smoke,
    "lecture-bigram": lecture_bigram,
    "shakespeare-char-cpu": shakespeare_char_cpu,
    "shakespeare-char": shakespeare_char,
    "gpt2-124m": gpt2_124m,
}


def default_preset(platform: str) -> str:
    """Name of the Tiny Shakespeare preset for a JAX platform ("cpu", "gpu", "tpu")."""
    return "shakespeare-char-cpu" if platform == "cpu" else "shakespeare-char"
