"""PPO's rollouts compared with `generate_tokens`: tokens/s of as many rows.

python -m benchmarks.rollout [--rows N] [--rounds N] [--device gpu]

Both sample all tokens of the same prompts with the same random weights, at temperature
1, and no row ends early. The model is a policy for film reviews (1.1M parameters). Each
runs in its own process (benchmarks/rounds.py), in turn, after it has compiled.

B batch   T time (of the prompt)
"""

import sys
from dataclasses import dataclass

import numpy as np
import tyro

from benchmarks.rounds import Device, Facts, Run, calls_in, compete, rates, settle

CONTENDERS = ("rollout", "generate_tokens")
PROMPT, NEW = 9, 32  # tokens


@dataclass(frozen=True)
class Arguments:
    """Compares PPO's rollouts with generation, measured in turn."""

    rows: int = 256
    rounds: int = 5  # rounds per contender, in turn
    seconds: float = 3.0  # approximate length of a round, at least one generation
    device: Device = "cpu"


def main() -> int:
    """Measures both, prints; returns 1 if rollouts reach less than 0.8."""
    arguments = tyro.cli(Arguments, prog="python -m benchmarks.rollout")
    settle(arguments.device)
    common = {"rows": arguments.rows, "seconds": arguments.seconds}
    tasks = {name: {"contender": name, **common} for name in CONTENDERS}
    results = compete("benchmarks.rollout", tasks, arguments.rounds)
    speeds = {name: rates(facts, "tokens") for name, facts in results.items()}
    for name, speed in speeds.items():
        spread = f"{speed['lowest']:,.0f} - {speed['highest']:,.0f}"
        print(f"{name:16}{speed['median']:10,.0f} tokens/s  ({spread})")
    rollout, generation = (speeds[name]["median"] for name in CONTENDERS)
    print(f"ratio {rollout / generation:.2f}")
    return int(rollout < 0.8 * generation)


def build(contender: str, rows: int, seconds: float) -> tuple[Facts, Run]:
    """Returns the facts and the round of a contender, for `compete`."""
    from jaxgpt import start

    start.start()
    import jax

    from jaxgpt.config import Config, DataConfig, GPTConfig, SamplingConfig
    from jaxgpt.generation.decode import generate_tokens
    from jaxgpt.models import build_model
    from jaxgpt.parallel.defaults import platform_of
    from jaxgpt.parallel.feeding import shard_batch
    from jaxgpt.parallel.mesh import make_mesh, replicated
    from jaxgpt.posttrain.rollout import Rules, make_rollout
    from jaxgpt.text.examples import Prompts, Sequences, row_keys

    policy = GPTConfig(block_size=64, vocab_size=2048, n_layer=4, n_embd=128)
    config = Config(policy, DataConfig(batch_size=rows))
    mesh = make_mesh(config)
    model = build_model(config.model, platform_of(mesh))
    prompts_BT = np.random.default_rng(0).integers(2048, size=(rows, PROMPT))
    params = jax.jit(model.init)(jax.random.key(0), prompts_BT[:1])["params"]

    def generate() -> None:
        sampling = SamplingConfig(temperature=1.0)
        for _ in generate_tokens(model, params, prompts_BT.tolist(), NEW, sampling):
            pass

    respond = make_rollout(model, Rules(NEW), mesh)
    row_B, everywhere = np.arange(rows), jax.device_put(params, replicated(mesh))
    weights_B, keys_B = np.ones(rows, np.float32), row_keys(0, row_B)
    batch = Prompts(Sequences.join(prompts_BT)).read(row_B, 16, weights_B, keys_B)

    def rollout() -> None:
        jax.block_until_ready(respond(everywhere, shard_batch(mesh, batch)))

    once = rollout if contender == "rollout" else generate
    calls = calls_in(seconds, once)

    def run() -> None:
        for _ in range(calls):
            once()

    return {"tokens": calls * rows * NEW}, run


if __name__ == "__main__":
    sys.exit(main())
