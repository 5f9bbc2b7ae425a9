"""Mutants of the function: bugs in y and in the map."""

from selfattn_core.conformance.mutants.mutant import Mutant, edited

__all__ = ["MUTANTS"]

_MAP = "self.A = _softmax(self.q @ _transpose(self.k))"
_Q = 'self.q = self.store(self.project("query", self.x))'
_K = 'key = self.store(self.project("key", self.x))'
_V = 'value = self.store(self.project("value", self.x))'
_O = "self.o = self.store(self.A @ self.v)"
_Y = "layer.gamma * layer.z + layer.x"
_Z = 'self.z = self.project("out", self.o) if config.out_projection else self.o'
_BIAS = 'return projected + self.params[f"{name}.bias"] if self.config.use_bias else projected'
_EXP = "weights = np.exp(scores - scores.max(axis=-1, keepdims=True))"
_GATHER = "return rows if winners is None else np.asarray(np.take_along_axis(rows, winners, axis=1))"
_FIRST = "first = rows[:, windows].argmax(axis=2)"
_RETURNED_MAP = "return layer.A.astype(layer.dtype)"

# Reads the memory of (B, N, D) as (B, D, N).
_UNTRANSPOSED = "(lambda rows: rows.reshape(rows.shape[0], rows.shape[2], rows.shape[1]).swapaxes(1, 2))"
# Reads positions h·W + w as w·H + h.
_COLUMN_MAJOR = (
    "(lambda rows: rows.reshape(x.shape[0], x.shape[2], x.shape[1], -1 if rows.size else rows.shape[2])"
    ".swapaxes(1, 2).reshape(rows.shape))"
)
_NEIGHBOURS = (
    "scores = self.q @ _transpose(self.k); n = np.arange(scores.shape[1]); m = np.arange(scores.shape[2]); "
    "width = self.shape[2]; "
    "self.A = _softmax(scores if config.kv_pool > 1 else np.where({}, scores, -np.inf).astype(scores.dtype))"
)

MUTANTS: tuple[Mutant, ...] = (
    edited(
        "softmax over queries",
        "forward",
        (_MAP, "self.A = _transpose(_softmax(self.k @ _transpose(self.q)))"),
        seen_in="torchgan; heykeetae/Self-Attention-GAN of 8 to 15 June 2018",
    ),
    edited(
        "one softmax over all N·M scores",
        "map",
        (
            _MAP,
            (
                "scores = self.q @ _transpose(self.k); "
                "self.A = _softmax(scores.reshape(scores.shape[0], 1, np.prod(scores.shape[1:]))).reshape(scores.shape)"
            ),
        ),
        seen_in="segmentation_models_pytorch, PABBlock",
    ),
    edited(
        "attends along its own row only",
        "forward",
        (_MAP, _NEIGHBOURS.format("n[:, None] // width == m // width")),
        seen_in="ashpy; taki0112 in its first week; Flax attention on (B, H, W, C)",
    ),
    edited(
        "attends along its own column only",
        "forward",
        (_MAP, _NEIGHBOURS.format("n[:, None] % width == m % width")),
    ),
    edited(
        "(B, H, W, C) reshaped to (B, C, N) without a transpose",
        "forward",
        (_Q, f"{_Q}; self.q = {_UNTRANSPOSED}(self.q)"),
        (_K, f"{_K}; key = {_UNTRANSPOSED}(key)"),
        (_V, f"{_V}; value = {_UNTRANSPOSED}(value)"),
        seen_in="the published f/g/h layer for TensorFlow, and copies of it",
    ),
    edited(
        "(B, N, C) reshaped to (B, C, H, W) without a transpose",
        "permutation",
        (_O, f"{_O}; self.o = {_UNTRANSPOSED}(self.o)"),
        seen_in="segmentation_models_pytorch, PABBlock",
    ),
    edited("unflattened as (W, H)", "forward", (_O, f"{_O}; x = self; self.o = {_COLUMN_MAJOR}(self.o)")),
    edited("query flattened as (W, H)", "forward", (_Q, f"{_Q}; self.q = {_COLUMN_MAJOR}(self.q)")),
    edited(
        "map indexed as w·H + h, y right",
        "map",
        (_RETURNED_MAP, f"return {_COLUMN_MAJOR}(layer.A).astype(layer.dtype)"),
    ),
    edited(
        "map transposed, y right",
        "map",
        (_RETURNED_MAP, "return _transpose(layer.A).astype(layer.dtype)"),
        seen_in="torchgan; heykeetae/Self-Attention-GAN of 8 to 15 June 2018",
    ),
    edited(
        "query and key exchanged",
        "forward",
        (_Q, _Q.replace('"query"', '"key"')),
        (_K, _K.replace('"key"', '"query"')),
        seen_in="ports by name of fastai, deoldify, rosinality, pytorch-advanced",
    ),
    edited("query from the key projection", "forward", (_Q, _Q.replace('"query"', '"key"'))),
    edited(
        "scaled by 1/sqrt(Dk)",
        "forward",
        (
            _MAP,
            "self.A = _softmax(self.q @ _transpose(self.k) * self.x.dtype.type(config.qk_channels**-0.5))",
        ),
        seen_in="every multi-head layer",
    ),
    edited(
        "scaled by 1/sqrt(C)",
        "forward",
        (_MAP, "self.A = _softmax(self.q @ _transpose(self.k) * self.x.dtype.type(config.channels**-0.5))"),
        seen_in="timm",
    ),
    edited(
        "multiplied by sqrt(Dk)",
        "forward",
        (_MAP, "self.A = _softmax(self.q @ _transpose(self.k) * self.x.dtype.type(config.qk_channels**0.5))"),
        seen_in="open-mmlab/mmdetection#1447",
    ),
    edited(
        "scores / M in place of the softmax",
        "map",
        (_MAP, "self.A = self.q @ _transpose(self.k) / self.k.shape[1]"),
        seen_in="the dot_product mode of non-local blocks",
    ),
    edited(
        "ReLU on query and key",
        "forward",
        (_MAP, "self.q = np.maximum(self.q, 0); self.k = np.maximum(self.k, 0); " + _MAP),
        seen_in="a copy for tf.keras",
    ),
    edited(
        "exp without the row's maximum",
        "forward",
        (_EXP, "weights = np.exp(scores)"),
        seen_in="plemeri/InSPyReNet#36",
    ),
    edited(
        "softmax stabilised by the maximum over the batch",
        "forward",
        (_EXP, "weights = np.exp(scores - scores.max(initial=-np.inf))"),
    ),
    edited(
        "epsilon in the softmax",
        "map",
        (
            "weights / weights.sum(axis=-1, keepdims=True)",
            "weights / (weights.sum(axis=-1, keepdims=True) + 1e-5)",
        ),
    ),
    edited("residual dropped", "forward", (_Y, "layer.gamma * layer.z")),
    edited("gamma (o + x)", "forward", (_Y, "layer.gamma * (layer.z + layer.x)")),
    edited("gamma x + o", "forward", (_Y, "layer.gamma * layer.x + layer.z")),
    edited("residual added twice", "forward", (_Y, "layer.gamma * layer.z + 2 * layer.x")),
    edited("gamma ignored", "forward", (_Y, "layer.z + layer.x")),
    edited("gamma through abs", "forward", (_Y, "abs(layer.gamma) * layer.z + layer.x")),
    edited("gamma through a sigmoid", "forward", (_Y, "layer.z / (1 + np.exp(-layer.gamma)) + layer.x")),
    edited(
        "gamma created anew at every call",
        "forward",
        (_Y, "0 * layer.gamma * layer.z + layer.x"),
        seen_in="the published f/g/h layer for TensorFlow",
    ),
    edited(
        "out projection dropped",
        "forward",
        (
            _Z,
            _Z.replace(
                "config.out_projection", "config.out_projection and config.value_channels != config.channels"
            ),
        ),
        seen_in="heykeetae/Self-Attention-GAN#50",
    ),
    edited(
        "out projection transposed",
        "forward",
        (
            _Z,
            (
                "square = config.value_channels == config.channels; "
                'self.z = self.o @ self.kernel("out").T if square and config.out_projection else '
                '(self.project("out", self.o) if config.out_projection else self.o)'
            ),
        ),
    ),
    edited(
        "bias of the out projection outside gamma",
        "forward",
        (_Y, f'{_Y} + (layer.params["out.bias"] * (1 - layer.gamma) if "out.bias" in layer.params else 0)'),
    ),
    *(
        edited(
            f"{role} bias dropped",
            "forward",
            (
                _BIAS,
                (
                    f'return projected if name == "{role}" or not self.config.use_bias else '
                    'projected + self.params[f"{name}.bias"]'
                ),
            ),
        )
        for role in ("query", "value", "out")
    ),
    edited(
        "mean in place of max pooling",
        "forward",
        (_FIRST, f"self.mean = windows; {_FIRST}"),
        ("@dataclass(frozen=True)\nclass _Pool:", "@dataclass\nclass _Pool:"),
        (_GATHER, "return rows if winners is None else rows[:, self.mean].mean(axis=2)"),
    ),
    edited(
        "first entry in place of max pooling",
        "forward",
        (_FIRST, "first = np.zeros((rows.shape[0], len(windows), rows.shape[2]), int)"),
    ),
    edited("min in place of max pooling", "forward", (_FIRST, "first = rows[:, windows].argmin(axis=2)")),
    edited(
        "pooled by the largest absolute value",
        "forward",
        (_FIRST, "first = abs(rows[:, windows]).argmax(axis=2)"),
    ),
    edited(
        "key taken at the winners of the first channel",
        "forward",
        (_FIRST, f"{_FIRST}; first = np.broadcast_to(first[..., :1], first.shape)"),
    ),
    edited(
        "pooled before the projection",
        "forward",
        (_K, 'key = self.project("key", pooled(self, self.x))'),
        (_V, 'value = self.project("value", pooled(self, self.x))'),
        (
            "def _rowsum(rows",
            _POOLED_FIRST := (
                "def pooled(layer, x):\n"
                "    pool = layer.pool\n"
                "    if pool.side == 1:\n"
                "        return x\n"
                "    small = pool.gather(x, pool.winners(x))\n"
                "    down, across = pool.height // pool.side, pool.width // pool.side\n"
                "    grid = small.reshape(x.shape[0], down, across, x.shape[2])\n"
                "    grid = grid.repeat(pool.side, axis=1).repeat(pool.side, axis=2)\n"
                "    wide = np.full((x.shape[0], pool.height, pool.width, x.shape[2]), -9.0, x.dtype)\n"
                "    wide[:, : grid.shape[1], : grid.shape[2]] = grid\n"
                "    return wide.reshape(x.shape)\n\n\n"
                "def _rowsum(rows"
            ),
        ),
    ),
    edited(
        "keys and values not pooled",
        "map",
        ("_Pool(x.shape[1], x.shape[2], config.kv_pool)", "_Pool(x.shape[1], x.shape[2], 1)"),
    ),
    edited(
        "odd sizes refused",
        "forward",
        (
            "down, across, p = self.height // self.side,",
            (
                "assert self.height % self.side == self.width % self.side == 0\n"
                "        down, across, p = self.height // self.side,"
            ),
        ),
        seen_in="the authors' code and every BigGAN",
        raises=True,
    ),
    edited(
        "the last whole windows of an odd map, not the first",
        "forward",
        ("whole = positions[: down * p, : across * p]", "whole = positions[-down * p :, -across * p :]"),
    ),
    edited(
        "windows in column order",
        "map",
        (
            ".swapaxes(1, 2).reshape(down * across, p * p)",
            ".transpose(2, 0, 1, 3).reshape(down * across, p * p)",
        ),
    ),
    edited(
        "logits in 16 bits",
        "dtype",
        (_MAP, "self.A = _softmax(self.store(self.q @ _transpose(self.k)))"),
        seen_in="NVIDIA/apex#453",
    ),
    edited(
        "answers in float32 for every dtype",
        "dtype",
        (
            "return layer.unflatten(layer.store(layer.gamma * layer.z + layer.x))",
            "return (layer.gamma * layer.z + layer.x).reshape(x.shape)",
        ),
    ),
    edited(
        "returns x at gamma 0 without computing the attention",
        "nonfinite",
        (_Y, f"({_Y} if layer.gamma.any() else layer.x)"),
    ),
    edited(
        "NaN ignored by the pooling",
        "nonfinite",
        (_FIRST, "first = np.nan_to_num(rows, nan=-np.inf)[:, windows].argmax(axis=2)"),
        seen_in="tf.nn.max_pool2d",
    ),
    edited(
        "NaN in one sample reaches the others",
        "nonfinite",
        (_EXP, "weights = np.exp(scores - scores.max(axis=(0, -1), keepdims=True))"),
    ),
    edited("NaN scores masked out", "nonfinite", (_EXP, f"scores = np.nan_to_num(scores, nan=-1e9); {_EXP}")),
    edited(
        "samples of a batch see each other",
        "batch",
        (_MAP, "self.q = self.q - self.q.mean(axis=0) / 1000 if len(self.q) else self.q; " + _MAP),
    ),
    edited(
        "only the first 32 channels of the value",
        "forward",
        (
            _O,
            "self.o = self.store(self.A @ self.v) * (np.arange(self.v.shape[2]) < 32).astype(self.arithmetic)",
        ),
    ),
    edited(
        "only the first 16 channels of query and key",
        "forward",
        (_MAP, "self.A = _softmax(self.q[..., :16] @ _transpose(self.k[..., :16]))"),
    ),
    edited(
        "only the first 8 samples attend",
        "forward",
        (_O, "self.o = self.store(self.A @ self.v); self.o[8:] = 0"),
    ),
    edited(
        "running maximum that starts at 0",
        "map",
        (_EXP, _EXP.replace("keepdims=True)", "keepdims=True, initial=0)")),
    ),
    edited("gamma at most 1", "forward", (_Y, "np.minimum(layer.gamma, 1) * layer.z + layer.x")),
)
