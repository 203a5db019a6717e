"""jaxgpt: the GPT of the lecture "Let's build GPT" and of nanoGPT, in JAX and Flax."""

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
from jaxgpt.generation.stream import generate
from jaxgpt.models import GPT, Bigram
from jaxgpt.run import Run, load_run
from jaxgpt.start import quiet_libtpu
from jaxgpt.text.tokenizer import BPETokenizer, CharTokenizer

quiet_libtpu()
