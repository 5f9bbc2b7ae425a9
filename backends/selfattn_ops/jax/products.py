"""Products of matrices, summed in at least float32. With factors in bfloat16, derivatives of every order have such factors too.

JAX's own derivative of a product of 16-bit factors multiplies in float32, because the result, and with it the cotangent, is
float32. So the product with factors in bfloat16 is a primitive of its own, whose derivatives are the same primitive again.

Source: "JAX primitives" of the JAX documentation, https://docs.jax.dev/en/latest/jax-primitives.html.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

__all__ = ["contract", "product"]


def contract(
    subscripts: str, left: jax.Array, right: jax.Array, out_sharding: NamedSharding | None = None
) -> jax.Array:
    """A product in full precision, summed in at least float32, whatever `jax_default_matmul_precision` is.

    The derivatives have the same precision.
    """
    return jnp.einsum(
        subscripts,
        left,
        right,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.promote_types(left.dtype, jnp.float32),
        out_sharding=out_sharding,
    )


def product(left: jax.Array, right: jax.Array, factors: DTypeLike, *, flip: bool = False) -> jax.Array:
    """The matrix product of two arrays after each is rounded to `factors`.

    Args:
        left: (…, N, K), in at least float32.
        right: (…, K, M), or (…, M, K) with `flip`.
        factors: dtype of the factors. The derivatives too multiply in bfloat16 if it is bfloat16. Those with factors in
            float16 multiply in float32, because XLA has no faster product.
        flip: whether the last two axes of `right` are exchanged.

    Returns:
        (…, N, M), in at least float32.

    Example:
        >>> product(jnp.ones((2, 3)), jnp.ones((4, 3)), jnp.bfloat16, flip=True)[0]
        Array([3., 3., 3., 3.], dtype=float32)
    """
    if jnp.dtype(factors) == jnp.bfloat16:
        return _multiply(left, right, flips=(False, flip))
    return _matrices(left.astype(factors), right.astype(factors), (False, flip))


def _matrices(
    left: jax.Array, right: jax.Array, flips: tuple[bool, bool], out_sharding: NamedSharding | None = None
) -> jax.Array:
    subscripts = f"...{'kn' if flips[0] else 'nk'},...{'mk' if flips[1] else 'km'}->...nm"
    return contract(subscripts, left, right, out_sharding)


def _multiply(left: jax.Array, right: jax.Array, **options: Any) -> jax.Array:
    if jax.sharding.get_abstract_mesh().manual_axes:
        # Inside `shard_map` an operand that all devices share and one that differs between them have different types.
        varying = [jax.typeof(x).manual_axis_type.varying for x in (left, right)]
        left = jax.lax.pcast(left, tuple(varying[1] - varying[0]), to="varying")
        right = jax.lax.pcast(right, tuple(varying[0] - varying[1]), to="varying")
    return _product.bind(left, right, **options)


def _computed(left: jax.Array, right: jax.Array, **options: Any) -> jax.Array:
    return _matrices(left.astype(jnp.bfloat16), right.astype(jnp.bfloat16), **options)


def _computed_on_cpu(
    left: jax.Array, right: jax.Array, *, flips: tuple[bool, bool], out_sharding: NamedSharding | None = None
) -> jax.Array:
    """The same in the one form for which XLA's CPU library has 16-bit instructions: no transposed left factor.

    The library multiplies other forms in float32. But if XLA only later makes another form of this one, as it does where
    the result is transposed, nothing is left that can compute it. Barriers prevent that.
    """
    left, right = (x.astype(jnp.bfloat16) for x in (left, right))
    if flips[0]:
        left = _copied(jnp.swapaxes(left, -1, -2))
    else:
        right = _copied(right)
    left, right = jax.lax.optimization_barrier((left, right))
    return jax.lax.optimization_barrier(_matrices(left, right, (False, flips[1]), out_sharding))


def _copied(array: jax.Array) -> jax.Array:
    # A transposed array is a matter of layout, until it has been behind an axis of size 1.
    return jax.lax.squeeze(jax.lax.optimization_barrier(jax.lax.expand_dims(array, (0,))), (0,))


def _left_cotangent(
    cotangent: jax.Array, left: ad.UndefinedPrimal, right: jax.Array, *, flips: tuple[bool, bool], **_: Any
) -> jax.Array:
    operands = (right, cotangent) if flips[0] else (cotangent, right)
    return _cotangent(left.aval, operands, (flips[1], True) if flips[0] else (False, not flips[1]))


def _right_cotangent(
    cotangent: jax.Array, left: jax.Array, right: ad.UndefinedPrimal, *, flips: tuple[bool, bool], **_: Any
) -> jax.Array:
    operands = (cotangent, left) if flips[1] else (left, cotangent)
    return _cotangent(right.aval, operands, (True, flips[0]) if flips[1] else (not flips[0], False))


def _cotangent(aval: Any, operands: tuple[jax.Array, jax.Array], flips: tuple[bool, bool]) -> jax.Array:
    # On an explicit mesh, a sum over an axis that is sharded has to say where its result belongs.
    sharding = aval.sharding if aval.sharding.mesh.explicit_axes else None
    return _multiply(*operands, flips=flips, out_sharding=sharding).astype(aval.dtype)


def _batched(
    operands: tuple[jax.Array, jax.Array],
    axes: tuple[int | None, int | None],
    *,
    out_sharding: NamedSharding | None = None,
    **flips: Any,
) -> tuple[jax.Array, int]:
    pairs = list(zip(operands, axes, strict=True))
    size, mesh_axis = next(
        (x.shape[at], jax.typeof(x).sharding.spec[at]) for x, at in pairs if at is not None
    )
    left, right = (batching.bdim_at_front(x, at, size, mesh_axis) for x, at in pairs)
    if out_sharding is not None:
        out_sharding = out_sharding.update(spec=PartitionSpec(mesh_axis, *out_sharding.spec))
    return _multiply(left, right, out_sharding=out_sharding, **flips), 0


_product = Primitive("product_of_bfloat16")
_product.def_impl(_computed)
_product.def_abstract_eval(
    lambda *operands, **options: jax.make_jaxpr(lambda *x: _computed(*x, **options))(*operands).out_avals[0]
)
ad.defbilinear(_product, _left_cotangent, _right_cotangent)
batching.primitive_batchers[_product] = _batched
mlir.register_lowering(_product, mlir.lower_fun(_computed, multiple_results=False))
mlir.register_lowering(_product, mlir.lower_fun(_computed_on_cpu, multiple_results=False), platform="cpu")
