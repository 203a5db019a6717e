"""Named experiments. Each says its command, hardware, wall time and expected loss.

Losses are validation losses in nats per token, the lecture's rungs' the means of three
seeds (`python -m jaxgpt lecture`).
"""

import dataclasses
from collections.abc import Callable

from jaxgpt.config import (
    BigramConfig,
    Config,
    DataConfig,
    GPTConfig,
    LectureConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)


def smoke() -> Config:
    """A tiny GPT that shows everything works: 10 s on 2 CPU cores, val 2.92.

    python train.py smoke
    """
    return Config(
        model=GPTConfig(n_layer=2, n_head=4, n_embd=64, block_size=32, dropout=0.1),
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


def _lecture(
    model: LectureConfig | BigramConfig, learning_rate: float, max_steps: int
) -> Config:
    """The lecture's recipe: torch's AdamW as it comes, no schedule, no clipping.

    But biases and norms are not decayed, here as elsewhere; it makes no difference.
    """
    return Config(
        model=model,
        data=DataConfig(batch_size=32),
        optimizer=OptimizerConfig(
            learning_rate=learning_rate,
            min_lr=learning_rate,
            warmup_steps=0,
            weight_decay=0.01,
            beta2=0.999,
            grad_clip=0.0,
        ),
        train=TrainConfig(
            max_steps=max_steps,
            eval_interval=500,
            eval_iters=200,
            checkpoint_interval=500,
            steps_per_call=100,
        ),
    )


def _lecture_small(architecture: str, n_head: int, n_layer: int) -> Config:
    """A rung between the table of bigrams and the scaled model."""
    model = LectureConfig(
        architecture=architecture,  # type: ignore[arg-type] # LectureConfig checks it
        block_size=8,
        n_layer=n_layer,
        n_head=n_head,
        n_embd=32,
    )
    return _lecture(model, learning_rate=1e-3, max_steps=5000)


def lecture_bigram() -> Config:
    """The lecture's first model, a table of bigrams: 5 s on 2 CPU cores, val 2.49.

    python train.py lecture-bigram
    """
    model = BigramConfig(block_size=8)
    return _lecture(model, learning_rate=1e-2, max_steps=3000)


def lecture_single_head() -> Config:
    """One head of self-attention: 10 s on 2 CPU cores, val 2.40.

    python train.py lecture-single-head
    """
    return _lecture_small("attention", n_head=1, n_layer=1)


def lecture_multi_head() -> Config:
    """Four heads of 8 channels instead of one of 32: 12 s on 2 CPU cores, val 2.28.

    python train.py lecture-multi-head
    """
    return _lecture_small("attention", n_head=4, n_layer=1)


def lecture_feed_forward() -> Config:
    """A linear layer and a ReLU after the heads: 12 s on 2 CPU cores, val 2.24.

    python train.py lecture-feed-forward
    """
    return _lecture_small("feed-forward", n_head=4, n_layer=1)


def lecture_blocks() -> Config:
    """Three such blocks, and no better for it: 18 s on 2 CPU cores, val 2.29.

    python train.py lecture-blocks
    """
    return _lecture_small("feed-forward", n_head=4, n_layer=3)


def lecture_residual() -> Config:
    """The blocks as residual branches: 25 s on 2 CPU cores, val 2.09.

    python train.py lecture-residual
    """
    return _lecture_small("residual", n_head=4, n_layer=3)


def lecture_layer_norm() -> Config:
    """LayerNorm before each branch and at the end: 30 s on 2 CPU cores, val 2.07.

    python train.py lecture-layer-norm
    """
    return _lecture_small("layer-norm", n_head=4, n_layer=3)


def lecture_scaled() -> Config:
    """The lecture's 10.8M parameters: by its account 15 min on an A100, val 1.48.

    python train.py lecture-scaled
    """
    model = LectureConfig(
        architecture="layer-norm",
        block_size=256,
        n_layer=6,
        n_head=6,
        n_embd=384,
        dropout=0.2,
    )
    config = _lecture(model, learning_rate=3e-4, max_steps=5000)
    return dataclasses.replace(
        config,
        data=DataConfig(batch_size=64),
        train=dataclasses.replace(config.train, steps_per_call=1),
    )


def shakespeare_char_cpu() -> Config:
    """nanoGPT's recipe for a laptop: 45 s on 2 CPU cores, val 1.90.

    python train.py shakespeare-char-cpu
    """
    return Config(train=TrainConfig(steps_per_call=25))


def shakespeare_char_fast() -> Config:
    """A better recipe for a laptop: 12 s on 2 CPU cores, val 1.82.

    python train.py shakespeare-char-fast

    One layer of shakespeare-char-cpu's four, and six times its learning rate.
    """
    return Config(
        model=GPTConfig(n_layer=1),
        optimizer=OptimizerConfig(learning_rate=6e-3, min_lr=1e-5, warmup_steps=50),
        train=TrainConfig(
            max_steps=1600,
            eval_interval=400,
            checkpoint_interval=400,
            steps_per_call=50,
        ),
    )


def shakespeare_char() -> Config:
    """nanoGPT's 10.8M parameters: by its account 3 min on an A100, val 1.47.

    python train.py shakespeare-char
    """
    return Config(
        model=GPTConfig(
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
    GPU needs --data.gradient-accumulation-steps 40. The 12 rows of 1,024 tokens that
    each of 8 devices then has at a time take 10.4 GiB of a TPU v5e's 16 (`--plan
    v5e:2x4`); chips of less memory need --model.remat, which takes 4.4 GiB.
    """
    return Config(
        model=GPTConfig(
            n_layer=12,
            n_head=12,
            n_embd=768,
            block_size=1024,
            vocab_size=50257,
            compute_dtype="bfloat16",
        ),
        data=DataConfig(
            path=("data/openwebtext",),
            tokenizer="gpt2",
            batch_size=480,
            gradient_accumulation_steps=5,
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


def _gpt2(n_layer: int, n_head: int, n_embd: int, learning_rate: float) -> Config:
    """A larger GPT-2, spread over all chips there are.

    Learning rates are those of GPT-3's models of these sizes. Source: Brown et al. 2020
    (GPT-3), table 2.1.
    """
    config = gpt2_124m()
    model = dataclasses.replace(
        config.model, n_layer=n_layer, n_head=n_head, n_embd=n_embd, remat=True
    )
    return dataclasses.replace(
        config,
        model=model,
        data=dataclasses.replace(
            config.data, batch_size=512, gradient_accumulation_steps=4
        ),
        optimizer=dataclasses.replace(
            config.optimizer, learning_rate=learning_rate, min_lr=learning_rate / 10
        ),
        mesh=MeshConfig(fsdp=-1),
    )


def gpt2_350m() -> Config:
    """GPT-2 medium on OpenWebText, where OpenAI's weights have 2.84; not measured.

    python train.py gpt2-350m --data.path DIR
    """
    return _gpt2(n_layer=24, n_head=16, n_embd=1024, learning_rate=3e-4)


def gpt2_774m() -> Config:
    """GPT-2 large on OpenWebText, where OpenAI's weights have 2.67; not measured.

    python train.py gpt2-774m --data.path DIR
    """
    return _gpt2(n_layer=36, n_head=20, n_embd=1280, learning_rate=2.5e-4)


def gpt2_1_5b() -> Config:
    """GPT-2 XL on OpenWebText, where OpenAI's weights have 2.54; not measured.

    python train.py gpt2-1.5b --data.path DIR
    """
    return _gpt2(n_layer=48, n_head=25, n_embd=1600, learning_rate=2e-4)


def gpt3_175b() -> Config:
    """GPT-3's shape and recipe, for --plan: a month on thousands of chips.

    python train.py gpt3-175b --plan v5p:8x8x8

    But every layer's attention is dense, and the batch has its full size from the first
    step. Source: Brown et al. 2020 (GPT-3), tables 2.1 and 2.2, appendix B.
    """
    return Config(
        model=GPTConfig(
            n_layer=96,
            n_head=96,
            n_embd=12288,
            block_size=2048,
            vocab_size=50257,
            bias=True,
            gelu="tanh",
            compute_dtype="bfloat16",
            remat=True,
        ),
        data=DataConfig(
            path=("data/gpt3",),
            tokenizer="gpt2",
            batch_size=1536,  # 3.1M tokens
            gradient_accumulation_steps=3,
        ),
        optimizer=OptimizerConfig(
            learning_rate=6e-5, min_lr=6e-6, warmup_steps=120, beta2=0.95
        ),
        train=TrainConfig(
            max_steps=95_000,  # 300B tokens
            eval_interval=1000,
            eval_iters=20,
            checkpoint_interval=500,
        ),
        mesh=MeshConfig(fsdp=-1, tensor=8),
    )


def finetune_shakespeare() -> Config:
    """nanoGPT's fine-tuning of GPT-2; not measured, for want of GPT-2's weights.

    python train.py finetune-shakespeare

    It starts from runs/gpt2, which `python -m jaxgpt import huggingface gpt2 runs/gpt2`
    makes, or from another run that --init-from names.
    """
    return Config(
        model=dataclasses.replace(gpt2_124m().model, bias=True, gelu="tanh"),
        data=DataConfig(batch_size=32, gradient_accumulation_steps=32),
        optimizer=OptimizerConfig(
            learning_rate=3e-5, min_lr=3e-5, warmup_steps=0, beta2=0.95
        ),
        train=TrainConfig(
            init_from="runs/gpt2",
            max_steps=20,
            eval_interval=5,
            eval_iters=40,
            log_interval=1,
            checkpoint_interval=5,
        ),
    )


PRESETS: dict[str, Callable[[], Config]] = {
    "smoke": smoke,
    "lecture-bigram": lecture_bigram,
    "lecture-single-head": lecture_single_head,
    "lecture-multi-head": lecture_multi_head,
    "lecture-feed-forward": lecture_feed_forward,
    "lecture-blocks": lecture_blocks,
    "lecture-residual": lecture_residual,
    "lecture-layer-norm": lecture_layer_norm,
    "lecture-scaled": lecture_scaled,
    "shakespeare-char-cpu": shakespeare_char_cpu,
    "shakespeare-char-fast": shakespeare_char_fast,
    "shakespeare-char": shakespeare_char,
    "gpt2-124m": gpt2_124m,
    "gpt2-350m": gpt2_350m,
    "gpt2-774m": gpt2_774m,
    "gpt2-1.5b": gpt2_1_5b,
    "gpt3-175b": gpt3_175b,
    "finetune-shakespeare": finetune_shakespeare,
}
