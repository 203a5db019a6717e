"""nanoGPT's GPT in plain PyTorch, which ours is measured against.

Names are nanoGPT's, so that state dicts and checkpoints match; tests/ checks that its
losses and gradients equal ours.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises the last axis."""
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    """Causal self-attention with torch's scaled_dot_product_attention."""

    def __init__(self, n_embd: int, n_head: int, bias: bool, dropout: float) -> None:
        super().__init__()
        self.n_head, self.dropout = n_head, dropout
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=bias)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=bias)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attends from every position to itself and the positions before it."""
        q, k, v = (
            part.unflatten(2, (self.n_head, -1)).transpose(1, 2)
            for part in self.c_attn(x).chunk(3, dim=2)
        )
        rate = self.dropout if self.training else 0.0
        y = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=rate
        )
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, n_embd: int, bias: bool, dropout: float) -> None:
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd, bias=bias)
        self.c_proj = nn.Linear(4 * n_embd, n_embd, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transforms each position on its own."""
        return self.dropout(self.c_proj(functional.gelu(self.c_fc(x))))


class Block(nn.Module):
    """Attention and MLP, each a residual branch."""

    def __init__(self, n_embd: int, n_head: int, bias: bool, dropout: float) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(n_embd, bias)
        self.attn = Attention(n_embd, n_head, bias, dropout)
        self.ln_2 = LayerNorm(n_embd, bias)
        self.mlp = MLP(n_embd, bias, dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Runs one layer."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Maps token ids [B, T] to logits [B, T, V]."""

    def __init__(
        self,
        *,
        n_layer: int,
        n_head: int,
        n_embd: int,
        block_size: int,
        vocab_size: int,
        bias: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(block_size, n_embd),
                "drop": nn.Dropout(dropout),
                "h": nn.ModuleList(
                    [Block(n_embd, n_head, bias, dropout) for _ in range(n_layer)]
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

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns the logits of the token after each position."""
        layers: Any = self.transformer
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = layers["drop"](layers["wte"](tokens) + layers["wpe"](positions))
        for block in layers["h"]:
            x = block(x)
        return self.lm_head(layers["ln_f"](x))

    @torch.no_grad()
    def generate(self, tokens: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        """The lecture's `generate`: recomputes the whole window for each token."""
        block_size = self.get_parameter("transformer.wpe.weight").shape[0]
        for _ in range(max_new_tokens):
            logits = self(tokens[:, -block_size:])[:, -1]
            drawn = torch.multinomial(functional.softmax(logits, dim=-1), 1)
            tokens = torch.cat((tokens, drawn), dim=1)
        return tokens


def make_adamw(
    model: nn.Module,
    learning_rate: float,
    betas: tuple[float, float],
    decay: float,
    fused: bool | None = None,
) -> torch.optim.AdamW:
    """AdamW with nanoGPT's two groups: matrices decay, biases and norms do not."""
    parameters: list[Any] = [p for _, p in model.named_parameters()]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)
