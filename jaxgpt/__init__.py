"""jaxgpt: the GPT of the lecture "Let's build GPT" and of nanoGPT, in JAX and Flax.

The names below are imported on first use: the processes that tokenize need no JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxgpt.classification import classify
    from jaxgpt.config import (
        BigramConfig,
        Config,
        DataConfig,
        GPTConfig,
        LectureConfig,
        MeshConfig,
        OptimizerConfig,
        SamplingConfig,
        TrainConfig,
    )
    from jaxgpt.generation.chat import chat
    from jaxgpt.generation.stream import generate
    from jaxgpt.generation.translation import translate
    from jaxgpt.models import GPT, Bigram
    from jaxgpt.run import Run, load_run
    from jaxgpt.text.tokenizer import BPETokenizer, CharTokenizer

_CONFIGS = "Bigram Data GPT Lecture Mesh Optimizer Sampling Train"
_MODULES = {
    **dict.fromkeys(["Config", *(f"{c}Config" for c in _CONFIGS.split())], "config"),
    "classify": "classification",
    "chat": "generation.chat",
    "generate": "generation.stream",
    "translate": "generation.translation",
    **dict.fromkeys(["GPT", "Bigram"], "models"),
    **dict.fromkeys(["Run", "load_run"], "run"),
    **dict.fromkeys(["BPETokenizer", "CharTokenizer"], "text.tokenizer"),
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module("jaxgpt.start").quiet_libtpu()
    globals()[name] = getattr(import_module(f"jaxgpt.{_MODULES[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
