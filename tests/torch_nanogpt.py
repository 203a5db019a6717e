"""nanoGPT's loop and checkpoint, with the PyTorch model of the benchmarks."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks import torch_gpt
from jaxgpt import OptimizerConfig
from jaxgpt.interop.torch_parity import nanogpt_learning_rate
from jaxgpt.text.batches import get_batch


class GPT(torch_gpt.GPT):
    """With norms and biases that are not ones and zeros, so that each has an effect."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        for parameter in self.parameters():
            if parameter.dim() < 2:
                nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.02)


def configure_optimizer(model, settings):
    """AdamW with nanoGPT's two groups."""
    betas, decay = (settings["beta1"], settings["beta2"]), settings["weight_decay"]
    return torch_gpt.make_adamw(model, settings["learning_rate"], betas, decay)


def learning_rate(step, settings):
    """The learning rate of update `step`, by nanoGPT's settings."""
    config = OptimizerConfig(
        learning_rate=settings["learning_rate"],
        min_lr=settings["min_lr"],
        warmup_steps=settings["warmup_iters"],
    )
    return nanogpt_learning_rate(step, config, settings["lr_decay_iters"])


def train(model, optimizer, settings, steps, batches):
    """nanoGPT's loop over the batches of `steps`; returns the losses."""
    losses = []
    for step, (inputs, targets) in zip(steps, batches, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        logits = model(torch.tensor(inputs))
        targets = torch.tensor(targets, dtype=torch.int64)
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings["grad_clip"])
        optimizer.step()
        losses.append(loss.item())
    return losses


SETTINGS = {"learning_rate": 3e-3, "min_lr": 3e-4, "warmup_iters": 3}
SETTINGS |= {"lr_decay_iters": 20, "max_iters": 20, "decay_lr": True}
SETTINGS |= {"weight_decay": 0.2, "beta1": 0.8, "beta2": 0.97, "grad_clip": 0.5}
SETTINGS |= {"batch_size": 4, "gradient_accumulation_steps": 2}
SETTINGS |= {"eval_interval": 10, "eval_iters": 2, "log_interval": 1}
SETTINGS |= {"dataset": "shakespeare_char", "device": "cpu"}
MODEL_ARGS = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8}
MODEL_ARGS |= {"vocab_size": 65, "dropout": 0.0}
CHARACTERS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
TOKENS = np.random.default_rng(0).integers(65, size=400)


def batches(steps):
    """The batches of these steps, for both programs."""
    return [get_batch(TOKENS, 1, step, batch_size=8, block_size=8) for step in steps]


def make(path, *, bias=True):
    """A model after 5 updates and its optimizer, saved at `path`."""
    torch.manual_seed(0)
    args = MODEL_ARGS | {"bias": bias}
    model = GPT(**args)
    optimizer = configure_optimizer(model, SETTINGS)
    train(model, optimizer, SETTINGS, range(5), batches(range(5)))
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    saved |= {"model_args": args, "config": SETTINGS}  # as nanoGPT's train.py does
    torch.save(saved | {"iter_num": 5, "best_val_loss": torch.tensor(2.5)}, path)
    return model, optimizer
