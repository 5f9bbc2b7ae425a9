"""Sums in other orders, with the derivatives of the definition."""

from selfattn_core.conformance.right.implementation import RightImplementation, edited

__all__ = ["RIGHT"]

_OUTER = "return left.reshape(-1, left.shape[-1]).T @ right.reshape(-1, right.shape[-1])"
_TOTAL = "return np.asarray(rows.sum(axis=(0, 1)))"
_ROWSUM = "return np.asarray(rows.sum(axis=-1, keepdims=True))"
_DIVISOR = "weights.sum(axis=-1, keepdims=True)"
_SCORES = "self.A = _softmax(self.q @ _transpose(self.k))"
_AVERAGE = "self.o = self.store(self.A @ self.v)"
_DX = "self.dx = self.g + sum(d @ _transpose(layer.kernel(name)) for name, d in self.projected.items())"
_GAMMA = "np.sum(self.g * layer.z, keepdims=True).reshape(1)"

RIGHT: tuple[RightImplementation, ...] = (
    edited(
        "sums over positions in reverse",
        "A sum has no order.",
        (_TOTAL, "return np.asarray(rows[::-1, ::-1].sum(axis=(0, 1)))"),
        (_ROWSUM, "return np.asarray(rows[..., ::-1].sum(axis=-1, keepdims=True))"),
        (_OUTER, f"left, right = left[::-1, ::-1], right[::-1, ::-1]; {_OUTER}"),
    ),
    edited(
        "sums one term after another",
        "A sum has no order.",
        (_TOTAL, "return sum(rows.reshape(-1, rows.shape[-1]), np.zeros(rows.shape[-1], rows.dtype))"),
        (_ROWSUM, "return np.cumsum(rows, axis=-1)[..., -1:]"),
        (_DIVISOR, "np.cumsum(weights, axis=-1)[..., -1:]"),
    ),
    edited(
        "kernel gradients sample by sample",
        "A sum over batch and positions is a sum of sums.",
        (
            _OUTER,
            "return sum(a.T @ b for a, b in zip(left, right)) + np.zeros((left.shape[-1], right.shape[-1]), left.dtype)",
        ),
        (_TOTAL, "return np.asarray(rows.sum(axis=1).sum(axis=0))"),
    ),
    edited(
        "products without BLAS",
        "einsum sums the same products.",
        (_OUTER, "return np.einsum('bnd,bne->de', left, right)"),
        (_SCORES, "self.A = _softmax(np.einsum('bnd,bmd->bnm', self.q, self.k))"),
        (_AVERAGE, "self.o = self.store(np.einsum('bnm,bmd->bnd', self.A, self.v))"),
    ),
    edited(
        "the average in blocks of four keys",
        "A sum is a sum of sums.",
        (
            _AVERAGE,
            "self.o = self.store(sum(self.A[..., i : i + 4] @ self.v[:, i : i + 4] for i in range(0, self.k.shape[1], 4)))",
        ),
    ),
    edited(
        "gradient of x from one product",
        "A sum of products is the product of what is joined.",
        (
            _DX,
            (
                "self.dx = np.concatenate([*self.projected.values()], axis=-1) @ np.concatenate("
                "[_transpose(layer.kernel(name)) for name in self.projected]) + self.g"
            ),
        ),
    ),
    edited(
        "gradient of gamma by positions",
        "A sum over channels and then positions is the whole sum.",
        (_GAMMA, "np.einsum('bnc,bnc->bn', self.g, layer.z).sum(keepdims=True).reshape(1)"),
    ),
)
