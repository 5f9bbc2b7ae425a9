"""What the process of a backend finds in its environment, where it has to stand before anything is imported."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

__all__ = ["THREADS", "cores", "environment", "kept_programs", "shared_accelerator"]

_ARITHMETIC: Mapping[str, str] = {
    # float64 needs x64 in JAX, and full float32 products need the reduced formats of accelerators off. They are set
    # here, in a process that only checks, and nowhere in the library.
    "JAX_ENABLE_X64": "1",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    "NVIDIA_TF32_OVERRIDE": "0",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0",
    # oneDNN, in torch and TensorFlow; it looks at its older name, DNNL_DEFAULT_FPMATH_MODE, only where this is not set.
    "ONEDNN_DEFAULT_FPMATH_MODE": "STRICT",
    # TensorFlow knows BF16 and takes all else for none.
    "TF_SET_ONEDNN_FPMATH_MODE": "STRICT",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}

# What a list of flags for XLA may hold that lowers the precision of float32. Others choose instructions, or say where to
# write. Flags that `XLA_FLAGS` names by a file stay as they are.
_INEXACT_FLAGS = re.compile(
    r"(?<!\S)--xla_(?:cpu_enable_fast_math|enable_fast_math|gpu_default_to_alg_dot_bf16_bf16_f32)(?:=\S*)?(?!\S)\s*"
)

# Each by itself would take most of an accelerator's memory for its own.
_SHARED_ACCELERATOR: Mapping[str, str] = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
}


def shared_accelerator() -> dict[str, str]:
    """The variables by which a process takes of an accelerator's memory what it needs, and no more.

    Example:
        >>> sorted(shared_accelerator())
        ['TF_FORCE_GPU_ALLOW_GROWTH', 'XLA_PYTHON_CLIENT_PREALLOCATE']
    """
    return dict(_SHARED_ACCELERATOR)


THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")
"""The variables by which the libraries of a backend are told how many threads to take."""


def environment(
    own: Mapping[str, str],
    *,
    processes: int = 1,
    least_threads: int = 1,
    programs: Path | None = None,
    shipped: bool = False,
) -> dict[str, str]:
    """The environment of this process, with what a backend needs.

    What lowers the precision of float32 is switched off, also where the caller's own environment asks for it; what chooses
    instructions, `ONEDNN_MAX_CPU_ISA` or `TF_ENABLE_ONEDNN_OPTS`, stays.

    Args:
        own: what this backend needs beyond what all of them do.
        processes: that run at once; each gets its share of the cores and, as it needs it, of an accelerator's
            memory, unless the caller's own environment says otherwise.
        least_threads: that each gets, however few cores there are.
        programs: the folder in which JAX keeps what it has compiled. Two backends that make the same program of a case
            then compile it once. The caller's own is taken if there is one; without either nothing is kept.
        shipped: whether precisions are left as the frameworks, and the caller's own environment, have them.

    Example:
        >>> environment({"KERAS_BACKEND": "jax"}, processes=10_000)["KERAS_BACKEND"]
        'jax'
    """
    threads = str(max(least_threads, cores() // processes))
    preferred: dict[str, str] = {}
    if processes > 1:
        # A thread that spins while it waits takes the core from what it waits for.
        preferred = {**dict.fromkeys(THREADS, threads), "OMP_WAIT_POLICY": "PASSIVE", **_SHARED_ACCELERATOR}
    if programs is not None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        preferred |= kept_programs(programs)
    inherited = dict(os.environ)
    if shipped:
        return {**preferred, **inherited, "TF_CPP_MIN_LOG_LEVEL": "2", **own}
    if "XLA_FLAGS" in inherited:
        # Taken out, and not set to false: a flag that a later XLA does not know ends the process.
        inherited["XLA_FLAGS"] = _INEXACT_FLAGS.sub("", inherited["XLA_FLAGS"]).rstrip()
    return {**preferred, **inherited, **_ARITHMETIC, **own}


def kept_programs(folder: Path) -> dict[str, str]:
    """The variables by which JAX keeps all that it compiles in a folder.

    Args:
        folder: of one process at a time, or of processes that take a damaged program for none: JAX does not write its
            files atomically.

    Example:
        >>> kept_programs(Path("programs"))["JAX_COMPILATION_CACHE_DIR"]
        'programs'
    """
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def cores() -> int:
    """How many cores this process may use.

    Example:
        >>> cores() >= 1
        True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
