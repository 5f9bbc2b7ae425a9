"""The environment variables of a backend's process, which must be set before it imports anything."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

__all__ = ["THREADS", "cores", "environment", "kept_programs", "shared_accelerator"]

_ARITHMETIC: Mapping[str, str] = {
    # JAX needs x64 for float64. Full float32 products need the reduced formats of accelerators switched off. The library
    # itself sets neither. Only this process, which only tests, does.
    "JAX_ENABLE_X64": "1",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    "NVIDIA_TF32_OVERRIDE": "0",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0",
    # oneDNN in torch and TensorFlow. It reads the older name DNNL_DEFAULT_FPMATH_MODE only if this one is not set.
    "ONEDNN_DEFAULT_FPMATH_MODE": "STRICT",
    # TensorFlow only recognises BF16. Any other value means full precision.
    "TF_SET_ONEDNN_FPMATH_MODE": "STRICT",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}

# The XLA flags that lower the precision of float32. Other flags choose instructions or output folders. If `XLA_FLAGS` names
# a file of flags, the file stays as it is.
_INEXACT_FLAGS = re.compile(
    r"(?<!\S)--xla_(?:cpu_enable_fast_math|enable_fast_math|gpu_default_to_alg_dot_bf16_bf16_f32)(?:=\S*)?(?!\S)\s*"
)

# Without these, a single process would reserve most of an accelerator's memory.
_SHARED_ACCELERATOR: Mapping[str, str] = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
}


def shared_accelerator() -> dict[str, str]:
    """The variables that make a process allocate only the accelerator memory that it needs.

    Example:
        >>> sorted(shared_accelerator())
        ['TF_FORCE_GPU_ALLOW_GROWTH', 'XLA_PYTHON_CLIENT_PREALLOCATE']
    """
    return dict(_SHARED_ACCELERATOR)


THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")
"""The variables that set the number of threads of the libraries of a backend."""


def environment(
    own: Mapping[str, str],
    *,
    processes: int = 1,
    least_threads: int = 1,
    programs: Path | None = None,
    shipped: bool = False,
) -> dict[str, str]:
    """The environment of this process with the changes that a backend needs.

    Settings that lower the precision of float32 are switched off, even if the caller's environment sets them. Settings that
    choose instructions, such as `ONEDNN_MAX_CPU_ISA` or `TF_ENABLE_ONEDNN_OPTS`, stay.

    Args:
        own: the variables that this backend needs in addition to those of all backends.
        processes: the number of processes that run at once. Each gets its share of the cores, and allocates accelerator
            memory when it needs it, unless the caller's environment sets something else.
        least_threads: the least number of threads of each process.
        programs: the folder in which JAX caches compiled programs, so that two backends with the same program compile it
            once. A cache folder in the caller's environment has precedence. Without either, JAX caches nothing.
        shipped: whether to leave precisions as the frameworks and the caller's environment set them.

    Example:
        >>> environment({"KERAS_BACKEND": "jax"}, processes=10_000)["KERAS_BACKEND"]
        'jax'
    """
    threads = str(max(least_threads, cores() // processes))
    preferred: dict[str, str] = {}
    if processes > 1:
        # A thread that spins while it waits blocks the core that the other process needs.
        preferred = {**dict.fromkeys(THREADS, threads), "OMP_WAIT_POLICY": "PASSIVE", **_SHARED_ACCELERATOR}
    if programs is not None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        preferred |= kept_programs(programs)
    inherited = dict(os.environ)
    if shipped:
        return {**preferred, **inherited, "TF_CPP_MIN_LOG_LEVEL": "2", **own}
    if "XLA_FLAGS" in inherited:
        # The flags are removed, not set to false, because an unknown flag ends the process in a later XLA.
        inherited["XLA_FLAGS"] = _INEXACT_FLAGS.sub("", inherited["XLA_FLAGS"]).rstrip()
    return {**preferred, **inherited, **_ARITHMETIC, **own}


def kept_programs(folder: Path) -> dict[str, str]:
    """The variables that make JAX cache everything that it compiles in a folder.

    Args:
        folder: the folder. JAX does not write its files atomically, so processes that share it must ignore damaged files.

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
    """The number of cores that this process may use.

    Example:
        >>> cores() >= 1
        True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
