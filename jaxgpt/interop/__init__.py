"""Weights from and to PyTorch: nanoGPT's checkpoints, Hugging Face's GPT-2, parity."""

import importlib
from types import ModuleType


def required(package: str) -> ModuleType:
    """Imports torch or transformers; raises ImportError that says how to get them."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"this needs {package}; install it with "
            "`pip install -r requirements-interop.txt`"
        ) from error
