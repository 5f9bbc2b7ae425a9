"""Other formulas of first and second derivatives."""

from selfattn_core.conformance.right.implementation import RightImplementation, edited

__all__ = ["RIGHT"]

_D = "return _rowsum(self.A * dA)"
_DS = "self.dS = layer.A * (self.dA - self.D)"
_QUOTIENT = "return np.asarray(weights / weights.sum(axis=-1, keepdims=True))"
_G = "self.G = layer.gamma * layer.back_through_out(self.g)"
_DOT_DS = "dot_dS = A * (X - _rowsum(A * X))"
_CENTRED = "centred = U - _rowsum(A * U)"
_DOT_O = "self.dot_o = dot_A @ layer.v + A @ dot_v"
_TWO = 'SecondOrder(layer, first, {"x": layer.unflatten(2 * dx)}).gradients()'
_NORMALISED = "return np.asarray((dW - np.sum(dW * self.applied) * self.direction) / self.sigma)"
_D_FROM_OUTPUT = (_D, "return _rowsum(G * self.o)")
_LOGARITHM = (
    _QUOTIENT,
    "return np.exp(scores - (scores.max(axis=-1, keepdims=True) + np.log(weights.sum(axis=-1, keepdims=True))))",
)
_X_FROM_OUTPUT = (_DOT_DS, "dot_dS = A * (X - _rowsum(dot_G * layer.o + first.G * self.dot_o))")

RIGHT: tuple[RightImplementation, ...] = (
    edited("D from the output", "rowsum(A∘dA) = rowsum(G∘o).", _D_FROM_OUTPUT),
    edited("log-sum-exp in numpy", "exp(s) / Σ exp s = exp(s − log Σ exp s).", _LOGARITHM),
    edited("as fused kernels compute", "Both of the above.", _LOGARITHM, _D_FROM_OUTPUT),
    edited(
        "both row sums from the output",
        "rowsum(A∘X) = rowsum(Ġ∘o + G∘ȯ).",
        _LOGARITHM,
        _D_FROM_OUTPUT,
        _X_FROM_OUTPUT,
    ),
    edited(
        "products before differences",
        "A∘(dA − D) = A∘dA − A∘D, as some frameworks differentiate the softmax.",
        (_DS, "self.dS = layer.A * self.dA - layer.A * _rowsum(layer.A * self.dA)"),
        (_DOT_DS, "dot_dS = A * X - A * _rowsum(A * X)"),
    ),
    edited(
        "the tangent of the average from the centre",
        "Ȧ v = (A∘U) v − u o.",
        (_DOT_O, "self.dot_o = (A * U) @ layer.v - _rowsum(A * U) * layer.o + A @ dot_v"),
    ),
    edited(
        "gamma last",
        "γ (ḡ Woᵀ) = (γ ḡ) Woᵀ.",
        (_G, "self.G = layer.back_through_out(layer.gamma * self.g)"),
    ),
    edited(
        "doubled at the end",
        "The gradient of the penalty is linear.",
        (
            _TWO,
            '{name: 2 * gradient for name, gradient in SecondOrder(layer, first, {"x": layer.unflatten(dx)}).gradients().items()}',
        ),
    ),
    edited(
        "spectral norm from the raw kernel",
        "⟨dW, W⟩ = ⟨dW, K⟩ / σ.",
        (
            _NORMALISED,
            "return dW / self.sigma - np.sum(dW * (self.applied * self.sigma)) * self.direction / self.sigma**2",
        ),
    ),
    edited(
        "the first row sum of the tangent from scores",
        "u = rowsum(A∘U) is the average of U, one key at a time.",
        (_CENTRED, "centred = U - np.einsum('bnm,bnm->bn', A, U)[..., None]"),
    ),
)
