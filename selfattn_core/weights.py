"""The canonical file: one `.safetensors` file that every adapter reads and writes.

Keys are canonical names, `[block.]query.kernel` and so on. Kernels are (C_in, C_out). With spectral norm they are the raw
kernels, and the file also contains the state: `query.u`, `query.v` and so on. The metadata contains `format` = "selfattn",
`version` = "1", `source` (free text), and `config`. `config` is the JSON object of `SelfAttentionConfig.to_dict`, in which
an absent option has its default. In a file of several blocks it is a JSON object of such objects by block name.
"""

import io
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from selfattn_core.arrays import Array, widen
from selfattn_core.config import SelfAttentionConfig
from selfattn_core.files.safetensors import SafetensorsError, read_all, read_header, read_tensor, whole_file
from selfattn_core.files.writing import write_atomically
from selfattn_core.params import check_params, param_problems, parameter_table, state_table
from selfattn_core.problems import ProblemError, Remedy, Text
from selfattn_core.spectral_norm import unlike_unit_vectors

__all__ = ["configs_of", "load", "save", "save_blocks", "write_atomically"]

FORMAT = "selfattn"
VERSION = "1"
_READABLE = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.float32}

PathLike = str | os.PathLike[str]


def save(
    path: PathLike,
    config: SelfAttentionConfig,
    params: Mapping[str, Array],
    *,
    overwrite: bool = False,
    source: str = "",
) -> None:
    """Write one layer's weights.

    The file is complete or absent: it is written beside the target, read back, compared bit for bit and renamed.

    Args:
        path: path of the file. Its folder must exist.
        config: options of the layer.
        params: arrays by canonical name. bfloat16 is widened to float32, which is exact.
        overwrite: whether an existing file may be replaced.
        source: note on the origin of the weights, stored in the file.

    Raises:
        FileExistsError: if the target exists and `overwrite` is False. The target stays unchanged.
        OSError: if the file cannot be written. An existing target stays unchanged.
        ValueError: if the parameters do not fit the config. The message lists every problem.

    Example:
        >>> import tempfile
        >>> from selfattn_core import init_params
        >>> config = SelfAttentionConfig(16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/layer.safetensors", config, init_params(config, seed=0), source="an example")
        ...     load(f"{folder}/layer.safetensors")[0] == config
        True
    """
    tensors = _tensors(check_params(config, params), "")
    _write(Path(path), tensors, json.dumps(config.to_dict()), overwrite, source)


def save_blocks(
    path: PathLike,
    blocks: Mapping[str, tuple[SelfAttentionConfig, Mapping[str, Array]]],
    *,
    overwrite: bool = False,
    source: str = "",
) -> None:
    """Write the weights of several layers into one file.

    Args:
        path: path of the file. Its folder must exist.
        blocks: config and parameters of each layer by block name. Names may contain dots.
        overwrite: whether an existing file may be replaced.
        source: note on the origin of the weights, stored in the file.

    Raises:
        FileExistsError: if the target exists and `overwrite` is False.
        OSError: if the file cannot be written.
        ValueError: if there is no block, a name is empty, or parameters do not fit. The message lists every problem.

    Example:
        >>> import tempfile
        >>> from selfattn_core import init_params
        >>> config = SelfAttentionConfig(16)
        >>> blocks = {"generator.attention": (config, init_params(config, seed=0))}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_blocks(f"{folder}/gan.safetensors", blocks)
        ...     load(f"{folder}/gan.safetensors", block="generator.attention")[0] == config
        True
    """
    if not blocks:
        raise ValueError("save_blocks: got no blocks; expected at least one {name: (config, params)}.")
    tensors: dict[str, Array] = {}
    problems = []
    for name, (config, params) in blocks.items():
        if not name or name.startswith(".") or name.endswith("."):
            problems.append(f"block {name!r}: the name must not be empty and not begin or end with a dot")
        try:
            tensors |= _tensors(check_params(config, params), f"{name}.")
        except ValueError as error:
            problems.append(f"block {name!r}: {error}")
    if problems:
        raise ValueError("save_blocks: " + "\n".join(problems))
    configs = {name: config.to_dict() for name, (config, _) in blocks.items()}
    _write(Path(path), tensors, json.dumps(configs), overwrite, source)


def load(path: PathLike, *, block: str | None = None) -> tuple[SelfAttentionConfig, dict[str, Array]]:
    """Read one layer's weights.

    Args:
        path: a file that `save` or `save_blocks` wrote, here or in any adapter.
        block: name of the block, if the file holds several.

    Returns:
        The config and its parameters by canonical name, as new contiguous arrays in the file's dtype (bfloat16 as
        float32, which is exact).

    Warns:
        UserWarning: if vectors u and v of spectral norm do not have the length 1, for example because they are averages.
            They are returned unchanged.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is truncated, is not a canonical file or has a newer version. If its tensors do not fit its
            config (missing, extra, misshapen, of a wrong dtype, not finite; all are listed). If `block` is not in the
            file, or is needed and not given.

    Example:
        >>> load("there-is-no-such-file.safetensors")
        Traceback (most recent call last):
        ...
        FileNotFoundError: there-is-no-such-file.safetensors: no such file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file.")
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no ordinary file"
        raise ValueError(f"{path}: is {what}; expected a canonical .safetensors file.")
    with path.open("rb") as file:
        try:
            header = read_header(file)
        except SafetensorsError as error:
            raise ValueError(
                f"{path}: cannot be read as .safetensors; it is truncated or another format: {str(error).rstrip('.')}."
            ) from error
        metadata, names = header.metadata, list(header.tensors)
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{path}: is not a selfattn file: its metadata says format={metadata.get('format')!r}, expected {FORMAT!r}; "
                f"its tensors are {', '.join(names[:4]) or 'none'}{', …' if len(names) > 4 else ''}."
            )
        configs = configs_of(path, metadata)
        name = _choose(path, list(configs), block)
        config = configs[name]
        prefix = f"{name}." if name else ""
        table = parameter_table(config) | state_table(config)
        shapes = {row.name: row.shape for row in table.values()}
        problems = []
        params: dict[str, Array] = {}
        for key, row in header.tensors.items():
            owner = max((b for b in configs if not b or key.startswith(f"{b}.")), key=len, default=None)
            if owner is None:
                problems.append(f"unexpected: {key} belongs to no block of the file")
            if owner != name:
                continue
            canonical, dtype, shape = key.removeprefix(prefix), row.code, row.shape
            if dtype not in _READABLE:
                problems.append(f"wrong dtype: {key} is {dtype}, should be one of {', '.join(_READABLE)}")
            fits = shapes.get(canonical) == shape or (canonical == "gamma" and np.prod(shape) == 1)
            if dtype in _READABLE and fits:
                params[canonical] = read_tensor(file, row)
            else:
                # The shape is reported without reading the tensor, because a header may promise any size.
                params[canonical] = np.broadcast_to(np.zeros((), _READABLE.get(dtype, np.float32)), shape)
    problems += param_problems(config, params)
    if problems:
        raise ValueError(f"{path}: parameters do not fit {config}:\n  " + "\n  ".join(problems))
    checked = check_params(config, params, finite=False)
    _warn_of_averages(path, {name: checked[name] for name in state_table(config)})
    return config, {name: np.array(array, order="C") for name, array in checked.items()}


def _warn_of_averages(path: Path, state: Mapping[str, Array]) -> None:
    if text := unlike_unit_vectors(state):
        warnings.warn(
            f"{path}: {text}. refresh_spectral_norm computes them from the kernels: use that of selfattn_core.params for "
            "these arrays, or that of an adapter for its layers.",
            stacklevel=3,
        )


def _tensors(params: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {f"{prefix}{name}": widen(array) for name, array in params.items()}


def _write(path: Path, tensors: dict[str, Array], config: str, overwrite: bool, source: str) -> None:
    metadata = {"format": FORMAT, "version": VERSION, "config": config, "source": source}
    content = whole_file(tensors, metadata)
    _, back = read_all(io.BytesIO(content))
    if any(
        back[name].tobytes() != array.tobytes() or back[name].dtype != array.dtype
        for name, array in tensors.items()
    ):
        raise RuntimeError("the arrays read back differ from the given ones; nothing was written.")
    write_atomically(path, content, overwrite=overwrite)


def configs_of(path: PathLike, metadata: Mapping[str, str]) -> dict[str, SelfAttentionConfig]:
    """The config of each block of a canonical file, from its metadata.

    Args:
        path: path of the file, for messages.
        metadata: metadata of a file whose `format` is "selfattn".

    Returns:
        The configs by block name. A single unnamed block has the name "".

    Raises:
        ValueError: if the file has another version, or its config cannot be read.

    Example:
        >>> configs_of("layer.safetensors", {"version": "1", "config": '{"channels": 16}'})[""].qk_channels
        2
    """
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{path}: has version {metadata.get('version')!r}; this selfattn reads version {VERSION!r}: upgrade selfattn."
        )
    try:
        options = json.loads(metadata.get("config", ""))
        if not isinstance(options, dict) or not options:
            raise TypeError("not an object")
        if all(isinstance(value, dict) for value in options.values()):
            return {name: SelfAttentionConfig.from_dict(block) for name, block in options.items()}
        return {"": SelfAttentionConfig.from_dict(options)}
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the config in its metadata cannot be read: {error}") from error


def _choose(path: Path, blocks: list[str], block: str | None) -> str:
    named = [name for name in blocks if name]
    if block is None:
        if len(blocks) == 1:
            return blocks[0]
        which = Remedy("block", choices=tuple(named))
        raise ProblemError(
            (f"{path}: holds {len(blocks)} blocks, pass ", which, "."), kind="several_blocks", names=named
        )
    if block not in named:
        held: Text = (
            (f"the blocks {', '.join(named)}",) if named else ("one unnamed block: pass no ", Remedy("block"))
        )
        raise ProblemError(
            (f"{path}: has no block {block!r}; it holds ", *held, "."), kind="no_block", names=named
        )
    return block
