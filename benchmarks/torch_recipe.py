"""nanoGPT's character-level training in PyTorch, for benchmarks.wall_clock.

python -m benchmarks.torch_recipe TEXT CONFIG [--compile]

CONFIG is a jaxgpt config with all sizes, as JSON. JAX is not imported.

B batch   T time
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from benchmarks.torch_gpt import GPT, make_adamw

_SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "dropout")


def main() -> None:
    """Trains, and prints the loss on the whole validation split."""
    text, config, *options = sys.argv[1:]
    settings = json.loads(config)
    torch.manual_seed(settings["train"]["seed"])
    characters = np.frombuffer(Path(text).read_bytes(), np.uint8)
    tokens = torch.tensor(np.unique(characters, return_inverse=True)[1])
    train, val = tokens.tensor_split([int(0.9 * len(tokens))])
    model = GPT(**{name: settings["model"][name] for name in _SIZES})
    fit(model, train, settings, compiles=options == ["--compile"])
    T = settings["model"]["block_size"]
    print(f"val loss {exact_loss(model, val, T):.4f} on the whole split", flush=True)


def fit(model: GPT, tokens: torch.Tensor, settings: Any, *, compiles: bool) -> None:
    """Runs all updates of the recipe, on windows sampled from `tokens`."""
    B, T = settings["data"]["batch_size"], settings["model"]["block_size"]
    steps, recipe = settings["train"]["max_steps"], settings["optimizer"]
    optimizer = make_adamw(
        model,
        recipe["learning_rate"],
        (recipe["beta1"], recipe["beta2"]),
        recipe["weight_decay"],
        fused=True,
    )
    schedule = make_schedule(optimizer, steps, recipe)
    run = torch.compile(model) if compiles else model
    for _ in range(steps):
        starts = torch.randint(len(tokens) - T, (B,))
        windows = torch.stack([tokens[start : start + T + 1] for start in starts])
        logits = run(windows[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        clip_grad_norm_(model.parameters(), recipe["grad_clip"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def make_schedule(optimizer: torch.optim.Optimizer, steps: int, recipe: Any) -> Any:
    """nanoGPT's get_lr: linear warmup, then a cosine to min_lr at the end."""
    warmup = recipe["warmup_steps"]
    cosine = CosineAnnealingLR(optimizer, steps - warmup, recipe["min_lr"])
    if not warmup:
        return cosine
    linear = LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [linear, cosine], [warmup])


@torch.no_grad()
def exact_loss(model: GPT, tokens: torch.Tensor, T: int) -> float:
    """Mean loss of every token but the first, in windows of T that do not overlap."""
    model.eval()
    whole, total = (len(tokens) - 1) // T * T, 0.0
    inputs, targets = tokens[:-1], tokens[1:]
    batches = [*inputs[:whole].view(-1, T).split(64), inputs[None, whole:]]
    answers = [*targets[:whole].view(-1, T).split(64), targets[None, whole:]]
    for inputs_BT, targets_BT in zip(batches, answers, strict=True):
        logits = model(inputs_BT).flatten(0, 1)
        flat = targets_BT.flatten()
        total += functional.cross_entropy(logits, flat, reduction="sum").item()
    return total / len(targets)


if __name__ == "__main__":
    main()
