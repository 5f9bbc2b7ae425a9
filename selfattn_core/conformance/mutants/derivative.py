"""Mutants of the first and second derivatives."""

from selfattn_core.conformance.mutants.mutant import Mutant, edited

__all__ = ["MUTANTS"]

_DS = "self.dS = layer.A * (self.dA - self.D)"
_G = "self.G = layer.gamma * layer.back_through_out(self.g)"
_DQ = '"query": self.dS @ layer.k,'
_DK = '"key": layer.pool.scatter(_transpose(self.dS) @ layer.q, layer.key_winners),'
_DV = '"value": layer.pool.scatter(_transpose(layer.A) @ self.G, layer.value_winners),'
_DX = "self.dx = self.g + sum("
_DGAMMA = 'gradients["gamma"] = np.sum(self.g * layer.z, keepdims=True).reshape(1)'
_OUTER = "return left.reshape(-1, left.shape[-1]).T @ right.reshape(-1, right.shape[-1])"
_TOTAL = "return np.asarray(rows.sum(axis=(0, 1)))"
_DOT_A = "dot_A = A * centred"
_DOT_DS = "dot_dS = A * (X - _rowsum(A * X))"
_DDQ = '"query": dot_dS @ layer.k + first.dS @ dot_k,'
_DDK = "_transpose(dot_dS) @ layer.q + _transpose(first.dS) @ dot_q"
_DDV = "_transpose(dot_A) @ first.G + _transpose(A) @ dot_G"
_R = "R = first.G @ _transpose(dot_v) + dot_G @ _transpose(layer.v)"
_TO_DY = "to_dy = self.dot_gamma * layer.z + gamma * self.dot_z + self.dot_x"
_TWO = '{"x": layer.unflatten(2 * dx)}'
_ARGMAX = "first = rows[:, windows].argmax(axis=2)"

MUTANTS: tuple[Mutant, ...] = (
    edited("softmax gradient without the row sum", "vjp", (_DS, "self.dS = layer.A * self.dA")),
    edited("map detached from the gradient", "vjp", (_DS, "self.dS = 0 * layer.A * (self.dA - self.D)")),
    edited("no gradient through the key", "vjp", (_DK, _DK.replace("@ layer.q", "@ (0 * layer.q)"))),
    edited("no gradient through the value", "vjp", (_DV, _DV.replace("@ self.G", "@ (0 * self.G)"))),
    edited("key gradient from the key", "vjp", (_DQ, _DQ.replace("@ layer.k", "@ (2 * layer.k)"))),
    edited("residual missing from the gradient of x", "vjp", (_DX, "self.dx = 0 * self.g + sum(")),
    edited("gamma missing from the gradient of x", "vjp", (_G, "self.G = layer.back_through_out(self.g)")),
    edited(
        "no gradient of gamma",
        "vjp",
        (_DGAMMA, 'gradients["gamma"] = np.zeros(1, self.g.dtype)'),
        seen_in="gamma as a plain tensor: the published f/g/h layer for PyTorch",
    ),
    edited(
        "gradient of gamma by dividing by gamma",
        "vjp",
        (_DGAMMA, 'gradients["gamma"] = (np.sum(self.D) / layer.gamma).reshape(1)'),
    ),
    edited(
        "gradient of gamma as a mean",
        "vjp",
        (_DGAMMA, 'gradients["gamma"] = (np.sum(self.g * layer.z) / max(1, self.g.size)).reshape(1)'),
    ),
    edited(
        "gradient of gamma through its absolute value",
        "vjp",
        (_DGAMMA, _DGAMMA.replace(".reshape(1)", ".reshape(1) * np.sign(layer.gamma)")),
    ),
    edited(
        "kernel gradients of the first sample only",
        "vjp",
        (
            _OUTER,
            _OUTER.replace("left.reshape", "left[:1].reshape").replace("right.reshape", "right[:1].reshape"),
        ),
    ),
    edited(
        "bias gradients as means",
        "vjp",
        (_TOTAL, "return np.asarray(rows.sum(axis=(0, 1)) / max(1, rows[..., 0].size))"),
    ),
    edited(
        "gamma missing from the gradient of the out kernel",
        "vjp",
        ("layer.gamma * _outer(layer.o, self.g)", "_outer(layer.o, self.g)"),
    ),
    edited(
        "gradient of a pooled window to the last of equal values",
        "vjp",
        (_ARGMAX, "last = rows[:, windows[:, ::-1]].argmax(axis=2); first = windows.shape[1] - 1 - last"),
    ),
    edited(
        "gradient of a pooled window to its first position",
        "vjp",
        (
            "np.put_along_axis(rows, winners, pooled, axis=1)",
            "np.put_along_axis(rows, np.sort(winners, axis=1), pooled, axis=1)",
        ),
    ),
    edited(
        "gradient one part in a thousand too large",
        "vjp",
        (_DQ, _DQ.replace("@ layer.k", "@ (layer.k * layer.k.dtype.type(1.001))")),
    ),
    edited("penalty with the map held constant", "r1", (_DOT_A, "dot_A = 0 * A * centred")),
    edited("penalty without the factor 2 of its gradient", "r1", (_TWO, '{"x": layer.unflatten(dx)}')),
    edited(
        "penalty not squared",
        "r1",
        ("return float(np.sum(dx * dx)), gradients", "return float(np.sqrt(np.sum(dx * dx))), gradients"),
        seen_in="the penalty of WGAN-GP put in its place",
    ),
    edited(
        "penalty as a mean over the batch",
        "r1",
        (
            "return float(np.sum(dx * dx)), gradients",
            "return float(np.sum(dx * dx) / max(1, len(x))), gradients",
        ),
    ),
    edited(
        "penalty whose gradient stops at dx",
        "r1",
        ("SecondOrder(layer, first, " + _TWO + ")", "SecondOrder(layer, first, {})"),
    ),
    edited("second order: row sum of U missing", "r1", ("centred = U - _rowsum(A * U)", "centred = U")),
    edited("second order: row sum of X missing", "r1", (_DOT_DS, "dot_dS = A * X")),
    edited("second order: query without dS k̇", "r1", (_DDQ, '"query": dot_dS @ layer.k,')),
    edited("second order: key without dSᵀ q̇", "r1", (_DDK, "_transpose(dot_dS) @ layer.q")),
    edited(
        "second order: value without Ȧᵀ G",
        "r1",
        (_DDV, "_transpose(A) @ dot_G + 0 * _transpose(dot_A) @ first.G"),
    ),
    edited("second order: R without G v̇ᵀ", "r1", (_R, "R = dot_G @ _transpose(layer.v)")),
    edited(
        "second order: winners of the value for the key",
        "r1",
        (
            'dot_k = layer.pool.gather(dot("key"), layer.key_winners)',
            'dot_k = layer.pool.gather(dot("key"), None if layer.key_winners is None else np.sort(layer.key_winners, axis=1))',
        ),
    ),
    edited(
        "second order: no gradient of gamma",
        "r1",
        (
            'gradients["gamma"] = np.sum(g * self.dot_z, keepdims=True).reshape(1)',
            'gradients["gamma"] = 0 * np.sum(g).reshape(1)',
        ),
    ),
    edited("mixed: R without Ġ vᵀ", "mixed", (_R, "R = first.G @ _transpose(dot_v)")),
    edited("mixed: value without Aᵀ Ġ", "mixed", (_DDV, "_transpose(dot_A) @ first.G")),
    edited("mixed: towards dy without ẋ", "mixed", (_TO_DY, _TO_DY.removesuffix(" + self.dot_x"))),
    edited(
        "mixed: towards dy without γ̇ z", "mixed", (_TO_DY, _TO_DY.replace("self.dot_gamma * layer.z + ", ""))
    ),
    edited(
        "mixed: towards x without dp Ẇpᵀ",
        "mixed",
        ("+ first.projected[name] @ _transpose(self.dot_kernel[name])", ""),
    ),
    edited(
        "mixed: cotangents of biases ignored",
        "mixed",
        ('return np.asarray(moved + cotangent(f"{name}.bias"))', "return np.asarray(moved)"),
    ),
    edited(
        "mixed: cotangents of kernels ignored",
        "mixed",
        ("+ layer.x @ self.dot_kernel[name]", ""),
    ),
    edited(
        "mixed: cotangent of the out bias ignored",
        "mixed",
        (' + cotangent("out.bias")', ""),
    ),
)
