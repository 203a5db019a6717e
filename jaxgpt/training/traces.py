"""What a start has traced, kept for the next: to trace takes as long as to load.

Programs of CPUs are kept as StableHLO, beside the compiled ones of JAX's cache, by a
digest of all that they come from. With them the second start of `shakespeare-char-cpu`
takes 2 cores 2.1 s to its first step, and else 2.7.

Only `train.py` keeps any, since no digest of sources knows of a function that a running
program has replaced.
"""

import hashlib
import sys
import sysconfig
from collections.abc import Callable
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib
import numpy as np
import optax
from jax import export
from jax.sharding import Mesh

import jaxgpt
from jaxgpt.config import Config
from jaxgpt.models import build_model
from jaxgpt.parallel.defaults import keeps_traces, platform_of, train_options
from jaxgpt.processes import several_processes
from jaxgpt.runtime import replace_file
from jaxgpt.training import step
from jaxgpt.training.sharding import activations_over

_INSTALLED = {"site-packages", "dist-packages"}  # folders of libraries

for _type in (
    optax.EmptyState,
    optax.MaskedState,
    optax.ScaleByAdamState,
    optax.ScaleByScheduleState,
):
    export.register_namedtuple_serialization(_type, serialized_name=_type.__name__)
export.register_pytree_node_serialization(
    step.TrainState,
    serialized_name="TrainState",
    serialize_auxdata=lambda static_fields: b"",  # it has none
    deserialize_auxdata=lambda data: (),
)


def create_state(config: Config, mesh: Mesh, params: Any = None) -> step.TrainState:
    """As `step.create_state` of the config's model."""
    model = build_model(config.model, platform_of(mesh))

    def trace() -> export.Exported:
        return export.export(step.init_on(mesh, model, config))()

    if params is None and (kept := _kept(trace, mesh, ("init", config, mesh))):
        return _compile(kept, mesh)()
    return step.create_state(model, config, mesh, params)


def compile_train_steps(config: Config, mesh: Mesh, count: int) -> jax.stages.Compiled:
    """As `step.compile_train_steps` of the config's model."""
    model = build_model(config.model, platform_of(mesh))

    def trace() -> export.Exported:
        train_steps, arguments = step.jit_train_steps(model, config, mesh, count)
        with activations_over(mesh):
            return export.export(train_steps)(*arguments)

    if kept := _kept(trace, mesh, ("train_steps", config, mesh, count)):
        return _compile(kept, mesh, **train_options(config, mesh))
    return step.compile_train_steps(model, config, mesh, count)


def _kept(
    trace: Callable[[], export.Exported], mesh: Mesh, of: tuple[Any, ...]
) -> export.Exported | None:
    """The trace of that as it was kept, or made now and kept; None if it can't be.

    It can't be of what calls back to Python, as `jax.debug.print` does.
    """
    if (folder := _folder(mesh)) is None:
        return None
    path = folder / _digest(of)
    with suppress(OSError):
        checksum, data = (content := path.read_bytes())[:32], content[32:]
        if hashlib.sha256(data).digest() == checksum:
            return export.deserialize(bytearray(data))
    try:
        exported = trace()
        data = bytes(exported.serialize())
    except (NotImplementedError, ValueError):
        return None
    with suppress(OSError):  # where nothing can be kept, the next start is as slow
        content = hashlib.sha256(data).digest() + data
        replace_file(path, lambda aside: aside.write_bytes(content))
    return exported


def _folder(mesh: Mesh) -> Path | None:
    """Where traces are kept; None where JAX keeps no compiled programs on this disk.

    Nor are any kept by several processes, or of what is no CPU, where it is untried.
    """
    settings = jax.config.values
    compiled = settings["jax_compilation_cache_dir"] or "://"
    if "://" in compiled or not settings["jax_enable_compilation_cache"]:
        return None
    return (
        Path(compiled) / "traces"
        if keeps_traces(mesh) and not several_processes()
        else None
    )


def _digest(of: tuple[Any, ...]) -> str:
    """Tells apart what is traced, and all that has a say in it."""
    versions = [library.__version__ for library in (jax, jaxlib, flax, optax, np)]
    settings = sorted(jax.config.values.items(), key=itemgetter(0))
    digest = hashlib.sha256(repr((of, versions, settings)).encode())
    for path in sorted(_sources()):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _sources() -> set[Path]:
    """Files of this package, and of what is loaded but no library's."""
    standard = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))
    loaded = [getattr(module, "__file__", None) for module in [*sys.modules.values()]]
    own = {Path(file) for file in loaded if file and not file.startswith(standard)}
    own = {path for path in own if _INSTALLED.isdisjoint(path.parts)}
    own = {path for path in own if path.is_file()}  # of torch.classes it is none
    return own.union(Path(jaxgpt.__file__).parent.rglob("*.py"))


def _compile(
    exported: export.Exported, mesh: Mesh, **options: Any
) -> jax.stages.Compiled:
    """Compiles a trace, with the options of `jax.jit`, which it does not keep."""
    shapes = [
        jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding)
        for aval, sharding in zip(
            exported.in_avals, exported.in_shardings_jax(mesh), strict=True
        )
    ]
    arguments, _ = jax.tree.unflatten(exported.in_tree, shapes)
    out = jax.tree.unflatten(exported.out_tree, exported.out_shardings_jax(mesh))
    jitted = jax.jit(exported.call, out_shardings=out, **options)
    return jitted.lower(*arguments).compile()
