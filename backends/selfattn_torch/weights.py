"""Conversion of the PyTorch layer's weights to and from canonical arrays and files."""

from collections.abc import Mapping
from operator import attrgetter
from typing import TypeVar

import numpy as np
import torch
from torch import nn

import selfattn_core
from selfattn_core import SelfAttentionConfig, parameter_table
from selfattn_core.arrays import Array
from selfattn_core.params import check_params, projections, state_table
from selfattn_core.porting.load import load_any
from selfattn_core.weights import PathLike
from selfattn_torch.layer import SelfAttention2d
from selfattn_torch.projection import Projection
from selfattn_torch.spectral_norm import SpectralConv2d

Layer = TypeVar("Layer", bound=SelfAttention2d)


def to_canonical(layer: SelfAttention2d) -> dict[str, Array]:
    """The layer's weights and its spectral norm state, if any, as new contiguous numpy arrays by canonical name.

    Args:
        layer: a layer on any device. bfloat16 is widened to float32, which is exact.

    Returns:
        Kernels (C_in, C_out), biases (C_out,) and gamma (1,). With spectral norm the kernels are the raw ones.

    Raises:
        ValueError: if a projection is sharded, or is not a plain convolution that computes with its own kernel.

    Example:
        >>> to_canonical(SelfAttention2d(16))["query.kernel"].shape
        (16, 2)
    """
    _check_plain(layer)
    params = {}
    for name in parameter_table(layer.config) | state_table(layer.config):
        tensor = attrgetter(name.replace("kernel", "weight"))(layer).detach().cpu()
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.float()
        if name.endswith("kernel"):
            tensor = tensor[:, :, 0, 0].T
        params[name] = np.array(tensor.numpy(), order="C")
    return params


def from_canonical(
    config: SelfAttentionConfig,
    params: Mapping[str, Array],
    *,
    block_size: int | None = None,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
) -> SelfAttention2d:
    """A layer with these weights.

    Args:
        config: options of the layer.
        params: arrays by canonical name.
        block_size: see `SelfAttention2d`.
        device: device of the parameters; by default the CPU.
        dtype: dtype of the parameters; by default that of the arrays.

    Raises:
        ValueError: if the arrays do not fit the config. It lists every problem.

    Example:
        >>> layer = SelfAttention2d(16)
        >>> twin = from_canonical(layer.config, to_canonical(layer))
        >>> torch.equal(twin.key.weight, layer.key.weight)
        True
    """
    return make(SelfAttention2d, config, params, block_size=block_size, device=device, dtype=dtype)


def make(
    kind: type[Layer],
    config: SelfAttentionConfig,
    params: Mapping[str, Array],
    *,
    block_size: int | None = None,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
) -> Layer:
    """`from_canonical` for a given class."""
    arrays = check_params(config, params)
    # The layer is made on the meta device, so that torch's random state does not change.
    layer = kind.from_config(config, block_size=block_size, device="meta", dtype=dtype)
    state = {}
    for name, array in arrays.items():
        tensor = _tensor(np.array(array, order="C"))
        if name.endswith("kernel"):
            tensor = tensor.T[:, :, None, None].contiguous()
        state[name.replace("kernel", "weight")] = tensor.to(device=device or "cpu", dtype=dtype)
    layer.load_state_dict(state, assign=True)
    return layer


def load(
    path: PathLike,
    *,
    block: str | None = None,
    dialect: str | None = None,
    prefix: str | None = None,
    settings: Mapping[str, str | bool | float] | None = None,
    strict: bool = True,
    block_size: int | None = None,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
) -> SelfAttention2d:
    """Load a layer from a canonical file, whichever framework wrote it, or from anybody's checkpoint.

    Args:
        path: a canonical `.safetensors` file. With `dialect`, a checkpoint in any format that `selfattn inspect` reads.
        block: name of the block, if a canonical file holds several.
        dialect: dialect of a checkpoint: a name that `selfattn dialects` lists, or your own `.toml` file.
        prefix: prefix of the block, if a checkpoint holds several.
        settings: facts that a checkpoint does not contain, for example {"use_scale": False}.
        strict: whether unused tensors under the prefix are an error.
        block_size: see `SelfAttention2d`.
        device: device of the parameters; by default the CPU.
        dtype: dtype of the parameters; by default that of the file.

    Warns:
        UserWarning: if stored vectors u and v of spectral norm do not have length 1, for example because they are
            averages. Also if neither `settings` nor a native file of this library contains `kv_pool`.

    Raises:
        FileNotFoundError: if the canonical file does not exist.
        ValueError: if the file is incomplete or does not fit. It lists every problem.
    """
    config, params = load_any(
        path, block=block, dialect=dialect, prefix=prefix, settings=settings, strict=strict
    )
    return from_canonical(config, params, block_size=block_size, device=device, dtype=dtype)


def save(layer: SelfAttention2d, path: PathLike, *, overwrite: bool = False, source: str = "") -> None:
    """Write the layer's weights to a canonical file.

    Args:
        layer: the layer.
        path: the `.safetensors` file; its folder must exist.
        overwrite: whether an existing file may be replaced.
        source: note on the origin of the weights, stored in the file.

    Raises:
        FileExistsError: if the file exists and `overwrite` is False.
        OSError: if the file cannot be written. An existing file then stays unchanged.
        ValueError: if a weight is not finite.

    Example:
        >>> import tempfile
        >>> layer = SelfAttention2d(16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(layer, f"{folder}/layer.safetensors")
        ...     load(f"{folder}/layer.safetensors").config == layer.config
        True
    """
    selfattn_core.save(path, layer.config, to_canonical(layer), overwrite=overwrite, source=source)


def _check_plain(layer: SelfAttention2d) -> None:
    """Refuse a layer whose stored kernel is only a shard, or is changed before it is used."""
    problems = []
    expected = (SpectralConv2d,) if layer.config.spectral_norm else (Projection, nn.Conv2d)
    if any(hasattr(parameter, "full_tensor") for parameter in layer.parameters()):
        problems.append("the parameters are sharded")
    for name in projections(layer.config):
        child = layer.get_submodule(name)
        if type(child) not in expected:
            problems.append(f"{name} is a {type(child).__name__}")
        elif "weight" not in dict(child.named_parameters(recurse=False)):
            problems.append(f"the weight of {name} is computed by a hook")
    if problems:
        raise ValueError(
            f"SelfAttention2d: got a layer with these problems: {', '.join(problems)}. Expected plain convolutions that "
            "compute with their own, whole weights. Merge an adapter into its base, remove parametrizations and hooks, for "
            'example with torch.nn.utils.parametrize.remove_parametrizations(layer.query, "weight"), and gather shards into '
            "a layer that is not sharded."
        )


def _tensor(array: Array) -> torch.Tensor:
    """The array as a tensor that shares its memory. bfloat16 goes through its bits: torch does not accept numpy's."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
