"""Named configs: `python train.py NAME` trains one, `--plan TOPOLOGY` plans it.

Each gives its hardware, wall time and validation loss in nats per token; the lecture's
losses are means of three seeds (`python -m jaxgpt lecture`). The GPT-2 presets need
--data.path DIR, a folder of tokens that `python -m jaxgpt prepare` or nanoGPT's
data/openwebtext/prepare.py has written.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from jaxgpt.config import (
    BigramConfig,
    ClassifierConfig,
    Config,
    DataConfig,
    DPOConfig,
    GPTConfig,
    GRPOConfig,
    LectureConfig,
    MaskedLMConfig,
    MeshConfig,
    OptimizerConfig,
    PPOConfig,
    RewardConfig,
    Seq2SeqConfig,
    TrainConfig,
)

_small = partial(LectureConfig, block_size=8, n_embd=32)  # the lecture's CPU models
_bfloat16 = partial(GPTConfig, compute_dtype="bfloat16")
_gpt2 = partial(_bfloat16, block_size=1024, vocab_size=50257)
_adamw = partial(OptimizerConfig, beta2=0.95)  # as in GPT-2 and GPT-3


def _train(every: int, **fields: Any) -> TrainConfig:
    """A TrainConfig that evaluates and saves after every `every` updates."""
    return TrainConfig(eval_interval=every, checkpoint_interval=every, **fields)


def smoke() -> Config:
    """A tiny GPT to check that everything works: 10 s on 2 CPU cores, val 2.92."""
    return Config(
        model=GPTConfig(n_layer=2, n_head=4, n_embd=64, block_size=32, dropout=0.1),
        data=DataConfig(batch_size=16),
        optimizer=OptimizerConfig(warmup_steps=10),
        train=_train(
            every=50, max_steps=100, eval_iters=5, log_interval=1, steps_per_call=10
        ),
    )


def _lecture(
    model: LectureConfig | BigramConfig,
    learning_rate: float = 1e-3,
    max_steps: int = 5000,
    batch_size: int = 32,
) -> Config:
    """The lecture's recipe: PyTorch's AdamW defaults, no schedule, no clipping.

    Unlike in the lecture, biases and norms are not decayed; it makes no difference.
    """
    return Config(
        model=model,
        data=DataConfig(batch_size=batch_size),
        optimizer=OptimizerConfig(
            learning_rate=learning_rate,
            min_lr=learning_rate,
            warmup_steps=0,
            weight_decay=0.01,
            beta2=0.999,
            grad_clip=0.0,
        ),
        train=_train(every=500, max_steps=max_steps, eval_iters=200),
    )


def lecture_bigram() -> Config:
    """The lecture's first model, a bigram table: 5 s on 2 CPU cores, val 2.49."""
    model = BigramConfig(block_size=8)
    return _lecture(model, learning_rate=1e-2, max_steps=3000)


def lecture_single_head() -> Config:
    """One head of self-attention: 10 s on 2 CPU cores, val 2.40."""
    return _lecture(_small(architecture="attention", n_head=1, n_layer=1))


def lecture_multi_head() -> Config:
    """Four heads of 8 channels instead of one of 32: 12 s on 2 CPU cores, val 2.28."""
    return _lecture(_small(architecture="attention", n_head=4, n_layer=1))


def lecture_feed_forward() -> Config:
    """A linear layer and a ReLU after the heads: 12 s on 2 CPU cores, val 2.24."""
    return _lecture(_small(architecture="feed-forward", n_head=4, n_layer=1))


def lecture_blocks() -> Config:
    """Three such blocks, no better than one: 18 s on 2 CPU cores, val 2.29."""
    return _lecture(_small(architecture="feed-forward", n_head=4, n_layer=3))


def lecture_residual() -> Config:
    """The blocks as residual branches: 25 s on 2 CPU cores, val 2.09."""
    return _lecture(_small(architecture="residual", n_head=4, n_layer=3))


def lecture_layer_norm() -> Config:
    """LayerNorm before each branch and at the end: 30 s on 2 CPU cores, val 2.07."""
    return _lecture(_small(architecture="layer-norm", n_head=4, n_layer=3))


def lecture_scaled() -> Config:
    """The lecture's 10.8M-parameter model: reportedly 15 min on an A100, val 1.48."""
    model = LectureConfig(
        architecture="layer-norm",
        block_size=256,
        n_layer=6,
        n_head=6,
        n_embd=384,
        dropout=0.2,
    )
    return _lecture(model, learning_rate=3e-4, batch_size=64)


def shakespeare_char_cpu() -> Config:
    """nanoGPT's recipe for a laptop: 45 s on 2 CPU cores, val 1.90."""
    return Config()


def shakespeare_char_fast() -> Config:
    """A better recipe for a laptop: 12 s on 2 CPU cores, val 1.82.

    One layer instead of shakespeare-char-cpu's four, at six times its learning rate.
    """
    return Config(
        model=GPTConfig(n_layer=1),
        optimizer=OptimizerConfig(learning_rate=6e-3, min_lr=1e-5, warmup_steps=50),
        train=_train(every=400, max_steps=1600),
    )


def shakespeare_char() -> Config:
    """nanoGPT's 10.8M-parameter model: reportedly 3 min on an A100, val 1.47."""
    return Config(
        model=_bfloat16(block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2),
        data=DataConfig(batch_size=64),
        train=TrainConfig(max_steps=5000, eval_iters=200),
    )


def reviews_bpe() -> Config:
    """A GPT with its own BPE on movie reviews: 10 min on 2 fast CPU cores, val 4.73.

    That is 1.88 bits per byte. Each review is a document, and attends only to itself.
    """
    return Config(
        model=GPTConfig(block_size=256, vocab_size=4096, n_layer=4, n_embd=192),
        data=DataConfig(
            corpus="reviews", tokenizer="bpe", packing="documents", batch_size=8
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, min_lr=3e-5),
        train=_train(every=600, max_steps=2400),
    )


def chat_sft() -> Config:
    """Supervised fine-tuning on conversations: 6 min on 2 CPU cores, val 4.14.

    Give the language model to start from: --init-from runs/reviews-bpe, for example.
    Only the assistant's text is learned. Without --init-from, a model of the shape of
    reviews-bpe learns from conversations alone, val 4.85.
    """
    return Config(
        model=GPTConfig(block_size=256, vocab_size=4096, n_layer=4, n_embd=192),
        data=DataConfig(
            corpus="chitchat", tokenizer="bpe", packing="conversations", batch_size=8
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, min_lr=3e-5),
        train=_train(every=300, max_steps=1200),
    )


def _tuned(
    learning_rate: float, batch_size: int, warmup_steps: int = 10, **fields: Any
) -> Config:
    """Post-training of a run of the shape of reviews-bpe; a larger one needs less.

    The learning rates are for a million parameters. For GPT-2's 124M, Ziegler et al.
    2019 use 1e-5.
    """
    return Config(
        model=GPTConfig(block_size=256, vocab_size=4096, n_layer=4, n_embd=192),
        data=DataConfig(packing="documents", tokenizer="bpe", batch_size=batch_size),
        optimizer=OptimizerConfig(
            learning_rate, min_lr=0.0, warmup_steps=warmup_steps, weight_decay=0.0
        ),
        **fields,
    )


def reward() -> Config:
    """A reward model from preferences: 2 min on 2 CPU cores for 32,000 pairs.

    Give --init-from, the run of a language model, and --data.path.
    """
    base = _tuned(3e-3, 32, 50, train=_train(every=200, max_steps=1000))
    fields = {n: v for n, v in vars(base.model).items() if n != "architecture"}
    return replace(base, model=RewardConfig(**fields))


def ppo() -> Config:
    """PPO of a language model: 3 min on 2 CPU cores for a million parameters.

    Give --init-from, --data.path, and --reward-model or --reward.
    """
    train = _train(every=20, max_steps=60, eval_iters=1, log_interval=1)
    base = _tuned(2e-4, 256, train=train, ppo=PPOConfig(beta=0.15, kl_target=6.0))
    return replace(base, optimizer=replace(base.optimizer, eps=1e-5))


def dpo() -> Config:
    """DPO of a language model by preferences: 3 min on 2 CPU cores for 19,000 pairs.

    Give --init-from and --data.path.
    """
    return _tuned(3e-4, 64, train=_train(every=100, max_steps=300), dpo=DPOConfig())


def assistant_sft() -> Config:
    """An assistant for tasks with exact answers, by fine-tuning: not measured yet.

    It learns from demonstrations and small talk alone, unless --init-from names a run.
    """
    return Config(
        model=GPTConfig(block_size=128, n_layer=4, n_embd=128),
        data=DataConfig(
            corpus="assistant",
            packing="conversations",
            learn_prompts=True,
            batch_size=8,
        ),
        optimizer=OptimizerConfig(learning_rate=2e-3, min_lr=2e-5),
        train=_train(every=1000, max_steps=16_000),
    )


def assistant_grpo() -> Config:
    """GRPO of that assistant, which checks its answers: not measured yet.

    Give the run to start from: --init-from runs/assistant-sft.
    """
    base = _tuned(
        2e-4,
        512,
        train=_train(every=20, max_steps=40, eval_iters=1, log_interval=1),
        grpo=GRPOConfig(
            reward="tasks", max_new_tokens=52, beta=0.05, epochs=1, minibatches=1
        ),
    )
    return replace(base, data=replace(base.data, corpus="assistant"))


def reviews_mlm() -> Config:
    """Masked language modelling on movie reviews: 5 min on 2 CPU cores, val 6.61.

    A run for `sentiment --init-from` to start from.
    """
    return Config(
        model=MaskedLMConfig(block_size=256, vocab_size=8192, n_layer=1, n_embd=64),
        data=DataConfig(corpus="reviews", tokenizer="bpe", batch_size=32),
        optimizer=OptimizerConfig(learning_rate=5e-3, min_lr=5e-5),
        train=_train(every=500, max_steps=3000),
    )


def sentiment() -> Config:
    """Sentiment of movie reviews by an encoder: 4 min on 2 CPU cores, val 0.45.

    The test split's accuracy is 0.83, and 0.86 for reviews from IMDb.
    """
    return Config(
        model=ClassifierConfig(
            block_size=256, vocab_size=8192, n_layer=1, n_embd=64, dropout=0.3
        ),
        data=DataConfig(corpus="reviews", tokenizer="bpe", batch_size=32),
        optimizer=OptimizerConfig(learning_rate=5e-3, min_lr=5e-5),
        train=_train(every=500, max_steps=2500, eval_iters=100),
    )


def reverse() -> Config:
    """Reverses words with an encoder-decoder: 2 min on 2 CPU cores, val 0.0002.

    All words of the test split come out right.
    """
    return Config(
        model=Seq2SeqConfig(block_size=24, n_layer=2, n_embd=64),
        data=DataConfig(corpus="reverse", batch_size=64),
        optimizer=OptimizerConfig(learning_rate=3e-3, min_lr=3e-5),
        train=_train(every=500, max_steps=2500),
    )


def translate_de() -> Config:
    """Translates English to German: 18 min on 2 CPU cores, val 2.70, test BLEU 15.1.

    An encoder-decoder on short sentences of Tatoeba.
    """
    return Config(
        model=Seq2SeqConfig(
            block_size=48,
            vocab_size=4096,
            n_layer=2,
            n_embd=128,
            dropout=0.1,
            label_smoothing=0.1,
        ),
        data=DataConfig(corpus="tatoeba", tokenizer="bpe", batch_size=64),
        optimizer=OptimizerConfig(learning_rate=3e-3, min_lr=3e-5, warmup_steps=200),
        train=_train(every=1000, max_steps=8000),
    )


def gpt2_124m() -> Config:
    """GPT-2 small on OpenWebText: nanoGPT reports 4 days on 8 A100s, val 2.85.

    One GPU needs --data.gradient-accumulation-steps 40. With 8 devices, a microbatch of
    12 rows of 1,024 tokens per device takes 10.4 of a TPU v5e's 16 GiB (`--plan
    v5e:2x4`); on chips with less, --model.remat takes 4.4 GiB.
    """
    return Config(
        model=_gpt2(n_layer=12, n_head=12, n_embd=768),
        data=DataConfig(
            path=("data/openwebtext",),
            tokenizer="gpt2",
            batch_size=480,
            gradient_accumulation_steps=5,
        ),
        optimizer=_adamw(learning_rate=6e-4, min_lr=6e-5, warmup_steps=2000),
        train=_train(every=1000, max_steps=600_000, eval_iters=200),
    )


def _larger(model: GPTConfig, learning_rate: float) -> Config:
    """A larger GPT-2, sharded over all devices.

    Learning rates are those of GPT-3's models of these sizes. Source: Brown et al. 2020
    (GPT-3), table 2.1.
    """
    base = gpt2_124m()
    return replace(
        base,
        model=replace(model, remat=True),
        data=replace(base.data, batch_size=512, gradient_accumulation_steps=4),
        optimizer=replace(
            base.optimizer, learning_rate=learning_rate, min_lr=learning_rate / 10
        ),
        mesh=MeshConfig(fsdp=-1),
    )


def gpt2_350m() -> Config:
    """GPT-2 medium on OpenWebText: not measured; OpenAI's weights have val 2.84."""
    return _larger(_gpt2(n_layer=24, n_head=16, n_embd=1024), learning_rate=3e-4)


def gpt2_774m() -> Config:
    """GPT-2 large on OpenWebText: not measured; OpenAI's weights have val 2.67."""
    return _larger(_gpt2(n_layer=36, n_head=20, n_embd=1280), learning_rate=2.5e-4)


def gpt2_1_5b() -> Config:
    """GPT-2 XL on OpenWebText: not measured; OpenAI's weights have val 2.54."""
    return _larger(_gpt2(n_layer=48, n_head=25, n_embd=1600), learning_rate=2e-4)


def gpt3_175b() -> Config:
    """GPT-3's shape and recipe, for --plan v5p:8x8x8: at least 19 days on 512 chips.

    Unlike in GPT-3, attention is dense in every layer, and the batch has its full size
    from the first step. Source: Brown et al. 2020 (GPT-3), tables 2.1 and 2.2,
    appendix B.
    """
    return Config(
        model=_gpt2(
            block_size=2048,
            n_layer=96,
            n_head=96,
            n_embd=12288,
            bias=True,
            gelu="tanh",
            remat=True,
        ),
        data=DataConfig(
            path=("data/gpt3",),
            tokenizer="gpt2",
            batch_size=1536,  # 3.1M tokens
            gradient_accumulation_steps=3,
        ),
        optimizer=_adamw(learning_rate=6e-5, min_lr=6e-6, warmup_steps=120),
        train=TrainConfig(
            max_steps=95_000,  # 300B tokens
            eval_interval=1000,
            eval_iters=20,
            checkpoint_interval=500,
        ),
        mesh=MeshConfig(fsdp=-1, tensor=8),
    )


def finetune_shakespeare() -> Config:
    """nanoGPT's fine-tuning of GPT-2: not measured, as it needs GPT-2's weights.

    Starts from runs/gpt2, which `python -m jaxgpt import huggingface gpt2 runs/gpt2`
    creates, or from the run that --init-from names.
    """
    return Config(
        model=_gpt2(n_layer=12, n_head=12, n_embd=768, bias=True, gelu="tanh"),
        data=DataConfig(batch_size=32, gradient_accumulation_steps=32),
        optimizer=_adamw(learning_rate=3e-5, min_lr=3e-5, warmup_steps=0),
        train=_train(
            every=5, max_steps=20, eval_iters=40, log_interval=1, init_from="runs/gpt2"
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
    "reviews-bpe": reviews_bpe,
    "chat-sft": chat_sft,
    "reward": reward,
    "ppo": ppo,
    "dpo": dpo,
    "assistant-sft": assistant_sft,
    "assistant-grpo": assistant_grpo,
    "reviews-mlm": reviews_mlm,
    "sentiment": sentiment,
    "reverse": reverse,
    "translate-de": translate_de,
    "gpt2-124m": gpt2_124m,
    "gpt2-350m": gpt2_350m,
    "gpt2-774m": gpt2_774m,
    "gpt2-1.5b": gpt2_1_5b,
    "gpt3-175b": gpt3_175b,
    "finetune-shakespeare": finetune_shakespeare,
}
