"""A step that blew up, taken again: where the first value is not finite."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import tyro

from jaxgpt.config import MeshConfig
from jaxgpt.files import log_line
from jaxgpt.parallel.mesh import make_mesh
from jaxgpt.run import BLOWUP, load_config
from jaxgpt.training.diagnosis import diagnose, load_blowup


def replay(
    folder: tyro.conf.Positional[Path],
    one_device: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> int:
    """Takes the step that stopped a run again, and shows the values of every layer.

    Args:
        folder: blowup, in the run directory
        one_device: use one device, whatever the run used; rounding may then differ
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}; give {BLOWUP}, in the directory of a run "
            "that a loss or a gradient which is not finite has stopped"
        )
    config = load_config(folder)
    if one_device:
        config = dataclasses.replace(config, mesh=MeshConfig(data=1))
    mesh = make_mesh(config, log_line)
    blowup = load_blowup(folder, mesh)
    rows, length = np.shape(blowup.batch[0])
    log_line(f"taking step {blowup.step + 1} again: {rows} x {length} tokens")
    found = diagnose(config, blowup.params, blowup.batch, blowup.key, mesh)
    for title, values in (
        ("the largest activation of each layer, forwards", found.activations),
        ("the largest gradient of each parameter, backwards", found.gradients),
    ):
        print(title)
        for name, value in values.items():
            shown = f"{value:12.4g}" if math.isfinite(value) else "  not finite"
            print(f"  {name:28}{shown}")
    print(f"loss {found.loss:.4f}, gradient norm {found.grad_norm:.4g}")
    print(f"the first values that are not finite: {found.first or 'none'}")
    return 0
