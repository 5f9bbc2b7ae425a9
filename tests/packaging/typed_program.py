"""A user's program. Type checkers read it, as an editor does while you type; nothing runs it."""

from typing import Any, assert_type

import jax
import numpy as np
import torch
from flax import nnx
from numpy.typing import NDArray

import selfattn_core
import selfattn_flax
import selfattn_keras
import selfattn_torch
from selfattn_core import SelfAttentionConfig, conformance, porting, spec, verifying, viz
from selfattn_flax import linen
from selfattn_ops import jax as jax_ops
from selfattn_ops import tensorflow as tensorflow_ops
from selfattn_ops import torch as torch_ops

# The definition and the canonical file.
config = SelfAttentionConfig(64, spectral_norm=True)
assert_type(config, SelfAttentionConfig)
assert_type(config.channels, int)
assert_type(SelfAttentionConfig.pooled(64), SelfAttentionConfig)
params = selfattn_core.init_params(config, seed=0)
assert_type(params, dict[str, NDArray[Any]])
maps = np.ones((2, 12, 20, 64), np.float32)
assert_type(spec.forward(config, params, maps), NDArray[Any])
assert_type(spec.attention_map(config, params, maps), NDArray[Any])
assert_type(selfattn_core.load("a.safetensors"), tuple[SelfAttentionConfig, dict[str, NDArray[Any]]])
selfattn_core.save("a.safetensors", config, params)
selfattn_core.save_blocks("b.safetensors", {"generator": (config, params)})
assert_type(selfattn_core.parameter_table(config)["gamma"].shape, tuple[int, ...])
assert_type(selfattn_core.__version__, str)

# Pictures.
grid = viz.unflatten(spec.attention_map(config, params, maps), 12, 20)
assert_type(grid, NDArray[Any])
viz.save_figure(viz.attention_figure(maps[0], grid[0], [(3, 4)]), "map.png")
assert_type(viz.map_statistics(grid), viz.MapStatistics)

# Checkpoints, exported files, and the kit.
assert_type(porting.inspect("G.pth"), porting.InspectReport)
assert_type(porting.port("G.pth", "a.safetensors", dialect="biggan"), porting.PortReport)
assert_type(porting.load("G.pth", dialect="biggan"), tuple[SelfAttentionConfig, dict[str, NDArray[Any]]])
with porting.open_tensors("G.pth") as tensors:
    assert_type(tensors, porting.Tensors)
assert_type(verifying.verify("a.onnx", "a.safetensors"), verifying.VerifyReport)
assert_type(conformance.resolve("torch"), conformance.Backend)

# PyTorch.
layer = selfattn_torch.SelfAttention2d(64)
images = torch.ones(2, 64, 12, 20)
assert_type(layer(images), torch.Tensor)
assert_type(layer(images, need_weights=True), tuple[torch.Tensor, torch.Tensor])
assert_type(layer.config, SelfAttentionConfig)
assert_type(selfattn_torch.SelfAttention2d.from_config(config), selfattn_torch.SelfAttention2d)
assert_type(selfattn_torch.attention_grid(layer, images), torch.Tensor)
assert_type(selfattn_torch.to_canonical(layer), dict[str, NDArray[Any]])
assert_type(selfattn_torch.from_canonical(config, params), selfattn_torch.SelfAttention2d)
assert_type(selfattn_torch.load("a.safetensors"), selfattn_torch.SelfAttention2d)
selfattn_torch.save(layer, "a.safetensors")
selfattn_torch.refresh_spectral_norm(layer)
assert_type(selfattn_torch.convert(layer, dialect="heykeetae").passed, bool)
assert_type(torch_ops.attend(images, images, images), torch.Tensor)

# Flax.
nnx_layer = selfattn_flax.SelfAttention2D(64, rngs=nnx.Rngs(0))
features = jax.random.normal(jax.random.key(0), (2, 12, 20, 64))
assert_type(nnx_layer(features, sow_weights=True), jax.Array)
assert_type(nnx_layer.config, SelfAttentionConfig)
assert_type(selfattn_flax.attention_grid(nnx_layer, features), jax.Array)
assert_type(selfattn_flax.to_canonical(nnx_layer), dict[str, NDArray[Any]])
assert_type(selfattn_flax.from_canonical(config, params), selfattn_flax.SelfAttention2D)
assert_type(selfattn_flax.load("a.safetensors"), selfattn_flax.SelfAttention2D)
selfattn_flax.save(nnx_layer, "a.safetensors")
selfattn_flax.refresh_spectral_norm(nnx_layer)
assert_type(selfattn_flax.convert(nnx_layer, dialect="flax").passed, bool)
assert_type(linen.SelfAttention2D(kv_pool=2).kv_pool, int)
assert_type(jax_ops.attend(features, features, features), jax.Array)

# Keras, whose tensors are those of its backend.
keras_layer = selfattn_keras.SelfAttention2D(data_format="channels_last")
keras_layer(maps, return_attention_scores=True)
assert_type(keras_layer.config, SelfAttentionConfig)
selfattn_keras.attention_grid(keras_layer, maps)
assert_type(selfattn_keras.to_canonical(keras_layer), dict[str, NDArray[Any]])
assert_type(selfattn_keras.from_canonical(config, params), selfattn_keras.SelfAttention2D)
assert_type(selfattn_keras.load("a.safetensors"), selfattn_keras.SelfAttention2D)
selfattn_keras.save(keras_layer, "a.safetensors")
selfattn_keras.refresh_spectral_norm(keras_layer)
assert_type(selfattn_keras.convert(keras_layer, dialect="keras").passed, bool)
attend: Any = tensorflow_ops.attend
