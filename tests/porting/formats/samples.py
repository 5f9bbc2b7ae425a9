"""Small checkpoints of every format, each written by its own library, and what is in them.

Run as `python -m tests.porting.formats.samples LIBRARY FOLDER`, in a process of its own: some of these libraries do not share one.
"""

import pickle
import sys
from pathlib import Path

import numpy as np

# Every axis has another size, so that a swapped one is seen.
SHAPES = {
    "query.weight": (2, 11, 1, 1),
    "query.bias": (2,),
    "key.weight": (2, 11, 1, 1),
    "value.weight": (5, 11, 1, 1),
    "out.weight": (11, 5, 1, 1),
    "gamma": (1,),
}


def tensors(dtype=np.float32, seed=0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def write_torch(folder: Path) -> None:
    """`plain.pth`, a state dict, and `legacy.pth`, the same in the format before torch 1.6."""
    import torch

    state = {name: torch.from_numpy(array) for name, array in tensors().items()}
    torch.save(state, folder / "plain.pth")
    torch.save(state, folder / "legacy.pth", _use_new_zipfile_serialization=False)


def write_safetensors(folder: Path) -> None:
    """`plain.safetensors`."""
    import safetensors.numpy

    safetensors.numpy.save_file(tensors(), folder / "plain.safetensors", metadata={"source": "a sample"})


def write_npz(folder: Path) -> None:
    """`plain.npz`, and `plain.pkl`, the same arrays in a pickle."""
    np.savez(folder / "plain.npz", **tensors())
    (folder / "plain.pkl").write_bytes(pickle.dumps(tensors(), 2))


def write_flax(folder: Path) -> None:
    """`plain.msgpack`, `pieces.msgpack` (arrays in pieces), `linen` (Orbax) and `nnx` (Orbax, with the `value` level)."""
    import flax.serialization
    import jax.numpy as jnp
    from flax import nnx
    from orbax import checkpoint

    from selfattn_flax import SelfAttention2D

    layer = SelfAttention2D(11, 2, 5, out_projection=True, rngs=nnx.Rngs(3))
    layer.gamma[...] = jnp.full((1,), 0.7)
    tree = nnx.to_pure_dict(nnx.state(layer))
    flat = {
        "/".join(map(str, keys)): np.asarray(value)
        for keys, value in nnx.traversals.flatten_mapping(tree).items()
    }
    np.savez(folder / "flax.npz", **flat)
    (folder / "plain.msgpack").write_bytes(flax.serialization.msgpack_serialize({"params": tree, "step": 3}))
    flax.serialization.MAX_CHUNK_SIZE = 64
    pieces = {"params": {**tree}}
    (folder / "pieces.msgpack").write_bytes(flax.serialization.msgpack_serialize(pieces))
    narrow = {"kernel": jnp.asarray([[1.5, -2.25, 3.0]], jnp.bfloat16)}
    (folder / "narrow.msgpack").write_bytes(flax.serialization.to_bytes(narrow))
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / "linen").absolute(), {"params": tree})
        checkpointer.save((folder / "nnx").absolute(), nnx.state(layer))
        checkpointer.save((folder / "narrow").absolute(), narrow)


def write_keras(folder: Path) -> None:
    """`model.keras`, `model.weights.h5`, `old.h5`, and of TensorFlow `graph-1` and `tf2` (Checkpoint, the latter with an optimiser), `exported` (SavedModel) and `saver-7`."""
    import keras
    import tensorflow as tf

    from selfattn_keras import SelfAttention2D

    keras.utils.set_random_seed(5)
    model = keras.Sequential(
        [
            keras.Input((5, 7, 11)),
            SelfAttention2D(2, 5, out_projection=True, gamma_initializer="ones", name="first"),
            keras.layers.Conv2D(13, 3, name="between"),
            keras.layers.BatchNormalization(name="norm"),
            SelfAttention2D(3, use_bias=False, gamma_initializer="ones", name="second"),
        ]
    )
    weights = {}
    for weight in model.weights:
        weight.assign_add(keras.random.normal(weight.shape, dtype=weight.dtype))
        weights[weight.path] = np.asarray(weight)
    np.savez(folder / "keras.npz", **weights)
    model.save(folder / "model.keras")
    model.save_weights(folder / "model.weights.h5")
    keras.saving.save_model(model, folder / "old.h5")
    half = keras.Sequential([keras.Input((5, 7, 11)), keras.layers.Dense(3, dtype="bfloat16", name="narrow")])
    half.save_weights(folder / "half.weights.h5")
    np.savez(folder / "half.npz", **{"narrow/kernel": np.asarray(half.weights[0]).astype(np.float32)})

    scoped = {f"generator/attention/{name.replace('.', '/')}": array for name, array in tensors().items()}
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        variables = [tf.compat.v1.get_variable(name, initializer=array) for name, array in scoped.items()]
        tf.compat.v1.get_variable("step", initializer=np.int64(3))
        tf.compat.v1.get_variable("narrow", initializer=tf.cast([[1.5, -2.25, 3.0]], tf.bfloat16))
        assert variables
        session.run(tf.compat.v1.global_variables_initializer())
        tf.compat.v1.train.Saver().save(session, str(folder / "saver" / "model.ckpt"), global_step=7)
    model.compile("adam")
    model.optimizer.build(model.trainable_variables)
    tf.train.Checkpoint(optimizer=model.optimizer, net=model).write(str(folder / "tf2" / "ckpt"))
    model.export(str(folder / "exported"), format="tf_saved_model", verbose=False)
    attention = tf.Module()
    attention.kernel = tf.Variable(tensors()["query.weight"])
    tf.train.Checkpoint(attention=attention).save(str(folder / "graph" / "ckpt"))


if __name__ == "__main__":
    globals()[f"write_{sys.argv[1]}"](Path(sys.argv[2]))
