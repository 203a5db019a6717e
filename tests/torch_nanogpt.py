"""nanoGPT's model, optimizer and checkpoint in PyTorch, to check ours against.

Written from nanoGPT's definition, with its names.
"""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from jaxgpt.text.batches import batch


class LayerNorm(nn.Module):
    def __init__(self, width, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x):
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    def __init__(self, n_embd, n_head, bias):
        super().__init__()
        self.n_head = n_head
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=bias)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=bias)

    def forward(self, x):
        q, k, v = (
            part.unflatten(2, (self.n_head, -1)).transpose(1, 2)
            for part in self.c_attn(x).chunk(3, dim=2)
        )
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, n_embd, bias):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd, bias=bias)
        self.c_proj = nn.Linear(4 * n_embd, n_embd, bias=bias)

    def forward(self, x):
        return self.c_proj(functional.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, n_embd, n_head, bias):
        super().__init__()
        self.ln_1 = LayerNorm(n_embd, bias)
        self.attn = Attention(n_embd, n_head, bias)
        self.ln_2 = LayerNorm(n_embd, bias)
        self.mlp = MLP(n_embd, bias)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(
        self, *, n_layer, n_head, n_embd, block_size, vocab_size, bias, dropout
    ):
        super().__init__()
        assert dropout == 0
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(block_size, n_embd),
                "h": nn.ModuleList(
                    [Block(n_embd, n_head, bias) for _ in range(n_layer)]
                ),
                "ln_f": LayerNorm(n_embd, bias),
            }
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                deep = math.sqrt(2 * n_layer) if name.endswith("c_proj.weight") else 1
                nn.init.normal_(parameter, std=0.02 / deep)
            else:  # not zeros and ones, so that each counts
                nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.02)

    def forward(self, tokens):
        layers = self.transformer
        x = layers["wte"](tokens) + layers["wpe"](torch.arange(tokens.shape[1]))
        for block in layers["h"]:
            x = block(x)
        return self.lm_head(layers["ln_f"](x))


def configure_optimizer(model, settings):
    """AdamW with nanoGPT's two groups."""
    parameters = [p for _, p in model.named_parameters()]
    groups = [
        {
            "params": [p for p in parameters if p.dim() >= 2],
            "weight_decay": settings["weight_decay"],
        },
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (settings["beta1"], settings["beta2"])
    return torch.optim.AdamW(groups, lr=settings["learning_rate"], betas=betas)


def learning_rate(step, settings):
    """nanoGPT's get_lr."""
    lr, min_lr = settings["learning_rate"], settings["min_lr"]
    warmup, decay = settings["warmup_iters"], settings["lr_decay_iters"]
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    ratio = (step - warmup) / (decay - warmup)
    return min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (lr - min_lr)


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


def checkpoint(model, optimizer, model_args, iter_num, settings):
    """What nanoGPT's train.py saves."""
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": model_args,
        "iter_num": iter_num,
        "best_val_loss": torch.tensor(2.5),
        "config": settings,
    }


SETTINGS = {
    "learning_rate": 3e-3,
    "min_lr": 3e-4,
    "warmup_iters": 3,
    "lr_decay_iters": 20,
    "max_iters": 20,
    "weight_decay": 0.2,
    "beta1": 0.8,
    "beta2": 0.97,
    "grad_clip": 0.5,
    "decay_lr": True,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "eval_interval": 10,
    "eval_iters": 2,
    "log_interval": 1,
    "dataset": "shakespeare_char",
    "device": "cpu",
}
MODEL_ARGS = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 8,
    "vocab_size": 65,
    "dropout": 0.0,
}
CHARACTERS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
TOKENS = np.random.default_rng(0).integers(65, size=400)


def batches(steps):
    """The batches of these steps, for both programs."""
    return [batch(TOKENS, 1, step, batch_size=8, block_size=8) for step in steps]


def make(path, *, bias=True):
    """A model after 5 updates and its optimizer, saved at `path`."""
    torch.manual_seed(0)
    args = MODEL_ARGS | {"bias": bias}
    model = GPT(**args)
    optimizer = configure_optimizer(model, SETTINGS)
    train(model, optimizer, SETTINGS, range(5), batches(range(5)))
    torch.save(checkpoint(model, optimizer, args, 5, SETTINGS), path)
    return model, optimizer
