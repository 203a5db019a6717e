"""A small random GPT-2 of transformers, whose weights all have an effect."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

logging.disable_progress_bar()

CONFIG = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 16}
CONFIG |= {"vocab_size": 300, "bos_token_id": 299, "eos_token_id": 299}
CONFIG |= {"initializer_range": 0.2, "resid_pdrop": 0.25}


def make(folder, *, max_shard_size="50GB", **changes):
    """The model, saved in `folder`."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**CONFIG | changes)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # else zeros and ones
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model
