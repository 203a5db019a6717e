"""The experiment's settings: its sizes, and the command of each training."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from jaxgpt.config import PPOConfig

# What tunes a policy, in the order of the report; beta-0 is PPO without a penalty.
TRAINED = ("ppo-low", "ppo", "dpo", "beta-0")
PRETRAINED = "pre-trained"


@dataclass(frozen=True)
class Arm:
    """A training of `train.py` from the pre-trained policy.

    Attributes:
      flags: preset and flags, without those that name files and runs.
      checkpoint: the one that is judged.
    """

    flags: str
    checkpoint: str = "latest"


@dataclass(frozen=True)
class Settings:
    """All settings. Hyperparameters were chosen by proxy and KL on part A alone."""

    policy: str  # preset and flags of each training
    gold_classifier: str
    gold_lm: str
    reward: str
    arms: dict[str, Arm]
    # how continuations are drawn and end; the penalty is none, since the arms set it
    responses: PPOConfig = field(
        default_factory=lambda: PPOConfig(
            max_new_tokens=32, min_new_tokens=16, end="sentence"
        )
    )
    beginning: int = 8  # tokens
    piece: int = 32  # words of a review that gold's classifier is trained on
    evaluated: int = 1024  # beginnings of part D
    pairs: int = 20_000
    flipped: float = 0.1  # share of the preferences
    best_of: int = 16

    @property
    def best_of_name(self) -> str:
        """Name of the arm best-of-n."""
        return f"best-of-{self.best_of}"

    @property
    def best_of_kl(self) -> float:
        """KL of best-of-n from the policy in nats, an upper bound.

        Source: Beirami et al. 2024, theorem 1; Stiennon et al. 2020, appendix G.3.
        """
        n = self.best_of
        return math.log(n) - (n - 1) / n

    def response_flags(self) -> str:
        """The flags of PPO that say how continuations are drawn and end."""
        r = self.responses
        return (
            f"--ppo.max-new-tokens {r.max_new_tokens} "
            f"--ppo.min-new-tokens {r.min_new_tokens} --ppo.end {r.end} "
            f"--ppo.temperature {r.temperature}"
        )

    def to_dict(self) -> dict[str, Any]:
        """As in settings.json."""
        return dataclasses.asdict(self)


_LM = (
    "reviews-bpe --model.block-size 48 --model.vocab-size 2048 --model.n-embd 128 "
    "--data.batch-size 32 --optimizer.learning-rate 4e-3 --optimizer.min-lr 4e-5 "
)
FULL = Settings(
    policy=_LM + "--train.max-steps 4000",
    gold_classifier="sentiment --model.block-size 64 --model.vocab-size 4096 "
    "--data.batch-size 64 --train.max-steps 1000 --train.eval-interval 250",
    gold_lm=_LM + "--train.max-steps 3000",
    reward="reward",
    arms={
        "ppo-low": Arm("ppo --ppo.kl-target 1.83 --ppo.beta 0.3 --train.max-steps 40"),
        "ppo": Arm("ppo"),
        "dpo": Arm("dpo", checkpoint="best"),
        "beta-0": Arm("ppo --ppo.beta 0 --ppo.kl-target 0 --train.max-steps 40"),
    },
    pairs=40_000,
)

_SMALL = (
    "--model.vocab-size 300 --model.n-layer 1 --model.n-head 2 --model.n-embd 16 "
    "--data.batch-size 8 --train.max-steps 4 --train.eval-interval 2 "
    "--train.checkpoint-interval 2 --train.eval-iters 1 --train.steps-per-call 1"
)
_SHORT = " --data.batch-size 16 --train.max-steps 2 --train.eval-interval 1 "
_SHORT += "--train.checkpoint-interval 1 --train.eval-iters 1"
TINY = Settings(
    policy=f"reviews-bpe --model.block-size 32 {_SMALL}",
    gold_classifier=f"sentiment --model.block-size 64 {_SMALL}",
    gold_lm=f"reviews-bpe --model.block-size 32 {_SMALL}",
    reward="reward" + _SHORT,
    arms={
        name: Arm(f"{'dpo' if name == 'dpo' else 'ppo'}{_SHORT}") for name in TRAINED
    },
    responses=PPOConfig(max_new_tokens=12, min_new_tokens=4, end="sentence"),
    evaluated=16,
    pairs=200,
    best_of=3,
)
SCALES = {"full": FULL, "tiny": TINY}
