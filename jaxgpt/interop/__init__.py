"""Exchange of weights with nanoGPT and Hugging Face, and parity with PyTorch."""

import importlib
from types import ModuleType


def required(package: str) -> ModuleType:
    """Imports torch or transformers; raises ImportError with how to install them."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"this needs {package}; install it with "
            "`pip install -r requirements-interop.txt`"
        ) from error
