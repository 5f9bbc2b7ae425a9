"""The published layers in a few lines of numpy each: their checkpoints as they are saved, and what they compute from them.

Written from the originals' own formulas, in their own layouts and names, and knowing nothing of `selfattn_core.porting`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

C, DK, DV = 24, 3, 12


@dataclass
class Original:
    dialect: str
    tensors: dict[str, np.ndarray]
    forward: Callable[[dict[str, np.ndarray], np.ndarray], np.ndarray]
    layout: str
    prefix: str
    settings: dict[str, object]


# ---- arithmetic of the originals


def conv(x, w, b=None):
    y = np.einsum("oi,bihw->bohw", w.reshape(w.shape[:2]), x)
    return y if b is None else y + b[:, None, None]


def dense(x, w, b=None):
    y = x @ w[0, 0]
    return y if b is None else y + b


def flat(x):
    return x.reshape(*x.shape[:2], -1)


def rows(x):
    return x.reshape(x.shape[0], -1, x.shape[-1])


def pool(x):
    b, c, h, w = x.shape
    return x[:, :, : h // 2 * 2, : w // 2 * 2].reshape(b, c, h // 2, 2, w // 2, 2).max(axis=(3, 5))


def pool_last(x):
    return pool(x.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)


def softmax(s, axis):
    e = np.exp(s - s.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def t(x):
    return x.swapaxes(1, 2)


def batch_norm(z, p, name, eps):
    shaped = {
        part: p[f"{name}.{part}"][:, None, None] for part in ("weight", "bias", "running_mean", "running_var")
    }
    return (z - shaped["running_mean"]) / np.sqrt(shaped["running_var"] + eps) * shaped["weight"] + shaped[
        "bias"
    ]


# ---- spectral norms of the originals, each from its own stored tensors


def hook(p, name):
    w = p[f"{name}.weight_orig"]
    return w / (p[f"{name}.weight_u"] @ w.reshape(len(w), -1) @ p[f"{name}.weight_v"])


def parametrization(p, name):
    w = p[f"{name}.parametrizations.weight.original"]
    u, v = (p[f"{name}.parametrizations.weight.0._{part}"] for part in "uv")
    return w / (u @ w.reshape(len(w), -1) @ v)


def ajbrock(p, name, eps=1e-8, kernel="weight", u="u0"):
    w = p[f"{name}.{kernel}"]
    m, u = w.reshape(len(w), -1), p[f"{name}.{u}"]
    v = u @ m
    v = v / max(np.linalg.norm(v), eps)
    u = v @ m.T
    u = u / max(np.linalg.norm(u), eps)
    return w / np.squeeze(v @ m.T @ u.T)


def wrapper(p, name, eps=1e-4):
    w, u = p[f"{name}.module.weight_bar"], p[f"{name}.module.weight_u"]
    m = w.reshape(len(w), -1)
    v = m.T @ u
    v = v / (np.linalg.norm(v) + eps)
    u = m @ v
    u = u / (np.linalg.norm(u) + eps)
    return w / (u @ m @ v)


def rosinality_norm(p, name):
    w, u = p[f"{name}.weight_orig"], p[f"{name}.weight_u"]
    m = w.reshape(len(w), -1)
    v = m.T @ u
    v = v / np.linalg.norm(v)
    u = m @ v
    u = u / np.linalg.norm(u)
    return w / (u @ m @ v)


def official(p, name, leaf="w", u="u", norm=lambda a: a / (np.sqrt((a**2).sum()) + 1e-12)):
    w = p[f"{name}/{leaf}"]
    m, u = w.reshape(-1, w.shape[-1]), p[f"{name}/{u}"]
    v = norm(u @ m.T)
    u = norm(v @ m)
    return w / np.squeeze(v @ m @ u.T)


def l2(a, eps=1e-12):
    return a / np.sqrt(max((a**2).sum(), eps))


def left(w, u):
    m = w.reshape(-1, w.shape[-1])
    v = l2(m.T @ u)
    u = l2(m @ v)
    return w / np.squeeze(u.T @ m @ v)


# ---- the layers


def bmm_rows(q, k, v):
    """Softmax over the last axis of qᵀk, then v·Aᵀ: q, k, v are (B, d, N)."""
    return v @ t(softmax(t(q) @ k, -1))


def bmm_columns(q, k, v):
    """Softmax over axis 1 of qᵀk, then v·A, as in fastai: the second argument makes the outputs."""
    return v @ softmax(t(q) @ k, 1)


def bias_of(p, name):
    return p[f"{name}.bias" if f"{name}.bias" in p else f"{name}.module.bias"]


def flat_layer(names, gain, kernel, attend, bias=True):
    def forward(p, x):
        query, key, value = (
            flat(conv(x, kernel(p, name), bias_of(p, name) if bias else None)) for name in names
        )
        return gain(p) * attend(query, key, value).reshape(x.shape) + x

    return forward


def pooled_layer(names, gain, kernel, bias=False):
    def forward(p, x):
        def project(name, z):
            return conv(z, kernel(p, name), p[f"{name}.bias"] if bias else None)

        theta, phi, g, o = names
        attended = bmm_rows(flat(project(theta, x)), flat(pool(project(phi, x))), flat(pool(project(g, x))))
        return gain(p) * project(o, attended.reshape(len(x), -1, *x.shape[2:])) + x

    return forward


def last_layer(names, gain, kernel, bias=None, pooled=True):
    """The TensorFlow layers: (B, H, W, C) throughout, softmax over the last axis."""

    def forward(p, x):
        def project(name, z):
            return dense(z, kernel(p, name), bias(p, name) if bias else None)

        query, key, value, *out = names
        pooling = pool_last if pooled else (lambda z: z)
        scores = rows(project(query, x)) @ t(rows(pooling(project(key, x))))
        attended = softmax(scores, -1) @ rows(pooling(project(value, x)))
        attended = attended.reshape(*x.shape[:3], -1)
        return gain(p) * (project(out[0], attended) if out else attended) + x

    return forward


def plain(p, name):
    return p[f"{name}.weight"]


def gain(key):
    return lambda p: p[key].reshape(())


# ---- their checkpoints


class Maker:
    """Random tensors that hide nothing: kernels that make peaked maps, biases and vectors that are not trivial."""

    def __init__(self, seed):
        self.rng = np.random.Generator(np.random.PCG64(seed))
        self.p = {}

    def normal(self, *shape, scale=1.0):
        return self.rng.standard_normal(shape) * scale

    def unit(self, *shape):
        vector = self.normal(*shape)
        return vector / np.linalg.norm(vector)

    def weight(self, key, shape, fan_in):
        self.p[key] = self.normal(*shape, scale=1.3 / np.sqrt(fan_in))

    def vectors(self, u, v, kernel, shape, fan_in, steps=2, length=1.0):
        """A kernel with the vectors of a training that has not converged."""
        self.weight(kernel, shape, fan_in)
        # Larger than 1, so that the map of the divided kernel is still peaked.
        m = self.p[kernel].reshape(shape[0], -1)
        a = self.unit(shape[0])
        for _ in range(steps):
            b = m.T @ a
            b /= np.linalg.norm(b)
            a = m @ b
            a /= np.linalg.norm(a)
        self.p[u], self.p[v] = a * length, b * length


WIDTHS = {"query": (DK, C), "key": (DK, C), "value": (C, C)}
POOLED = {"query": (DK, C), "key": (DK, C), "value": (DV, C), "out": (C, DV)}


def torch_checkpoint(
    seed, names, widths, form, axes=2, bias=False, gain_key="gamma", gain_shape=(1,), length=1.0
):
    """A state dict: `names` are the children in the order query, key, value, out by the ORIGINAL's names."""
    make = Maker(seed)
    ones = (1,) * axes
    for name, (out, fan_in) in zip(names, widths.values(), strict=True):
        shape = (out, fan_in, *ones)
        if form == "plain":
            make.weight(f"{name}.weight", shape, fan_in)
        elif form == "hook":
            make.vectors(
                f"{name}.weight_u", f"{name}.weight_v", f"{name}.weight_orig", shape, fan_in, length=length
            )
        elif form == "parametrization":
            base = f"{name}.parametrizations.weight"
            make.vectors(f"{base}.0._u", f"{base}.0._v", f"{base}.original", shape, fan_in)
        elif form == "old hook":
            make.weight(f"{name}.weight", shape, fan_in)
            make.weight(f"{name}.weight_orig", shape, fan_in)
            make.p[f"{name}.weight_u"] = make.unit(out)
        elif form in ("ajbrock", "ajbrock, small"):
            # Small, so that eps 1e-6 matters.
            make.p[f"{name}.weight"] = make.normal(
                *shape, scale=1.3 / np.sqrt(fan_in) if form == "ajbrock" else 1e-6
            )
            make.p[f"{name}.u0"], make.p[f"{name}.sv0"] = make.normal(1, out, scale=0.3), np.array([7.0])
        elif form == "mimicry's own":
            make.weight(f"{name}.weight", shape, fan_in)
            make.p[f"{name}.sn_u"], make.p[f"{name}.sn_sigma"] = make.unit(1, out), np.array([7.0])
        elif form in ("wrapper", "SpectralNorm class"):
            # Small, so that eps 1e-4 matters.
            make.p[f"{name}.module.weight_bar"] = make.normal(*shape, scale=0.01)
            make.p[f"{name}.module.weight_u"], make.p[f"{name}.module.weight_v"] = (
                make.unit(out),
                make.unit(fan_in),
            )
        elif form == "rosinality":
            # Small, so that an eps would matter: the original has none.
            make.p[f"{name}.weight_orig"] = make.normal(*shape, scale=0.01)
            make.weight(f"{name}.weight", shape, fan_in)
            make.p[f"{name}.weight_u"] = make.unit(out)
        if bias:
            inner = "module." if form == "SpectralNorm class" else ""
            make.p[f"{name}.{inner}bias"] = make.normal(out, scale=0.4)
    make.p[gain_key] = np.full(gain_shape, 0.7)
    return make.p


def tensorflow_checkpoint(seed, names, widths, leaf, vector=None, bias=None, gain_key="gamma", gain_shape=()):
    make = Maker(seed)
    for name, (out, fan_in) in zip(names, widths.values(), strict=True):
        make.weight(f"{name}/{leaf}", (1, 1, fan_in, out), fan_in)
        if vector:
            key, shape = vector(name, fan_in, out)
            make.p[key] = make.normal(*shape)
        if bias:
            make.p[f"{name}/{bias}"] = make.normal(out, scale=0.4)
    make.p[gain_key] = np.full(gain_shape, 0.7)
    return make.p


def under(prefix, tensors):
    return {prefix + name: value for name, value in tensors.items()}


KERNEL = {
    "plain": plain,
    "hook": hook,
    "parametrization": parametrization,
    "old hook": plain,
    "ajbrock": ajbrock,
    "ajbrock, small": lambda p, name: ajbrock(p, name, 1e-6),
    "mimicry's own": lambda p, name: ajbrock(p, name, 1e-12, u="sn_u"),
    "wrapper": wrapper,
    "SpectralNorm class": lambda p, name: wrapper(p, name, 1e-12),
    "rosinality": rosinality_norm,
}

# dialect, children in the order (first, second, third[, out]) of the original's attention, form, more
FLAT = [
    ("fgh", ("f", "g", "h"), "plain", bmm_rows, 2, True, {}),
    ("heykeetae", ("query_conv", "key_conv", "value_conv"), "plain", bmm_rows, 2, True, {}),
    ("heykeetae", ("query_conv", "key_conv", "value_conv"), "old hook", bmm_rows, 2, True, {}),
    ("heykeetae", ("query_conv", "key_conv", "value_conv"), "SpectralNorm class", bmm_rows, 2, True, {}),
    ("deoldify", ("query", "key", "value"), "SpectralNorm class", bmm_columns, 1, False, {}),
    ("fgh", ("f", "g", "h"), "SpectralNorm class", bmm_rows, 2, True, {}),
    ("danet", ("query_conv", "key_conv", "value_conv"), "plain", bmm_rows, 2, True, {}),
    ("fastai-1", ("query", "key", "value"), "hook", bmm_columns, 1, False, {}),
    (
        "mmseg-pam",
        ("query_project", "key_project", "value_project"),
        "plain",
        bmm_rows,
        2,
        True,
        {"gain_key": "gamma.scale", "gain_shape": ()},
    ),
    ("pytorch-advanced", ("query_conv", "key_conv", "value_conv"), "plain", bmm_columns, 2, True, {}),
    ("fastai", ("query.0", "key.0", "value.0"), "hook", bmm_columns, 1, False, {}),
    ("fastai", ("query.0", "key.0", "value.0"), "parametrization", bmm_columns, 1, False, {}),
    ("deoldify", ("query", "key", "value"), "hook", bmm_columns, 1, False, {}),
    ("rosinality", ("query", "key", "value"), "rosinality", bmm_columns, 1, True, {"gain_shape": ()}),
    ("torch", ("query", "key", "value"), "plain", bmm_rows, 2, True, {}),
    ("torch", ("query", "key", "value"), "parametrization", bmm_rows, 2, True, {}),
]
SN = [f"snconv1x1_{n}" for n in ("theta", "phi", "g")]
ONES = [f"conv1x1_{n}" for n in ("theta", "phi", "g", "attn")]
AVERAGED = {"length": 0.9}
MMAGIC = ("theta.conv", "phi.conv", "g.conv", "o.conv")
POOLED_TORCH = [
    ("biggan", ("theta", "phi", "g", "o"), "ajbrock", False, {"gain_shape": ()}),
    ("biggan", ("theta", "phi", "g", "o"), "plain", False, {"gain_shape": ()}),
    ("biggan-v1", ("theta", "phi", "g", "o_conv"), "wrapper", False, {}),
    ("biggan-hf", (*SN, "snconv1x1_o_conv"), "hook", False, {}),
    ("studiogan", ONES, "hook", False, {"gain_key": "sigma", **AVERAGED}),
    ("studiogan", ONES, "parametrization", False, {"gain_key": "sigma"}),
    ("studiogan", ONES, "plain", False, {"gain_key": "sigma"}),
    ("studiogan", ONES, "SpectralNorm class", False, {"gain_key": "sigma"}),
    ("voletiv", (*SN, "snconv1x1_attn"), "hook", True, {"gain_key": "sigma"}),
    ("mimicry", ("theta", "phi", "g", "o"), "hook", False, {"gain_shape": ()}),
    ("mimicry", ("theta", "phi", "g", "o"), "mimicry's own", False, {"gain_shape": ()}),
    ("mimicry", ("theta", "phi", "g", "o"), "plain", False, {"gain_shape": ()}),
    ("fastai-1-pooled", ("theta", "phi", "g", "o"), "hook", False, {}),
    ("mmagic", MMAGIC, "plain", False, {"gain_shape": ()}),
    ("mmagic", MMAGIC, "hook", False, {"gain_shape": ()}),
    ("mmagic", MMAGIC, "ajbrock, small", False, {"gain_shape": ()}),
    ("fastai-pooled", ("query.0", "key.0", "value.0", "out.0"), "hook", False, {}),
]


def _flat(row, seed):
    name, names, form, attend, axes, bias, more = row
    tensors = torch_checkpoint(seed, names, WIDTHS, form, axes, bias, **more)
    forward = flat_layer(names, gain(more.get("gain_key", "gamma")), KERNEL[form], attend, bias)
    settings = {"kv_pool": 1} if name == "torch" else {}
    return Original(name, under("net.attn.", tensors), forward, "BCHW", "net.attn.", settings)


def _pooled(row, seed):
    name, names, form, bias, more = row
    tensors = torch_checkpoint(seed, names, POOLED, form, 2, bias, **more)
    forward = pooled_layer(names, gain(more.get("gain_key", "gamma")), KERNEL[form], bias)
    return Original(name, under("blocks.3.1.", tensors), forward, "BCHW", "blocks.3.1.", {})


def _unsaved_gamma(seed):
    tensors = torch_checkpoint(seed, ("f", "g", "h"), WIDTHS, "plain", 2, True)
    del tensors["gamma"]
    forward = flat_layer(("f", "g", "h"), lambda _: 0.4, plain, bmm_rows)
    return Original("fgh", under("attn.", tensors), forward, "BCHW", "attn.", {"gamma": 0.4})


def row_vector(name, _, out):
    return f"{name}/u", (1, out)


def _sagan_tf(seed):
    names = ("sn_conv_theta", "sn_conv_phi", "sn_conv_g", "sn_conv_attn")
    tensors = tensorflow_checkpoint(seed, names, POOLED, "w", row_vector, gain_key="sigma_ratio")
    prefix = "model/g_non_local/"
    forward = last_layer(names, gain("sigma_ratio"), official)
    extra = {f"{prefix}sn_conv_theta/w/Adam": np.ones((1, 1, C, DK)), "model/other/w": np.ones(3)}
    return Original("sagan-tf", under(prefix, tensors) | extra, forward, "BHWC", prefix, {})


def _tfgan(seed):
    scope = "Generator/generator/g_ops"
    names = ("sn_conv_theta", "sn_conv_phi", "sn_conv_g", "sn_conv_attn")

    def u(name):
        return f"{name}/{scope}/{name}/weights/spectral_normalize/spectral_norm/spectral_norm_u"

    tensors = tensorflow_checkpoint(
        seed,
        names,
        POOLED,
        "weights",
        lambda name, fan_in, _: (u(name), (fan_in, 1)),
        gain_key="sigma_ratio",
    )
    forward = last_layer(names, gain("sigma_ratio"), lambda p, name: left(p[f"{name}/weights"], p[u(name)]))
    return Original("tfgan", under(f"{scope}/", tensors), forward, "BHWC", f"{scope}/", {})


def _compare_gan(seed, side, averaged):
    names = ("conv2d_theta", "conv2d_phi", "conv2d_g", "conv2d_attn_g")

    def vector(name, fan_in, out):
        shape = (1, out) if side == "auto" and fan_in > out else (fan_in, 1)
        return f"{name}/kernel/u_var", shape

    spectral = vector if side else None
    tensors = tensorflow_checkpoint(seed, names, POOLED, "kernel", spectral, gain_key="sigma")
    ending = "/ExponentialMovingAverage" if averaged else ""
    if averaged:
        copies = tensorflow_checkpoint(seed + 1, names, POOLED, "kernel", gain_key="sigma")
        tensors |= {name + ending: value * 1.2 for name, value in copies.items()}

    def kernel(p, name):
        w = p[f"{name}/kernel{ending}"]
        if not side:
            return w
        u = p[f"{name}/kernel/u_var"]
        if u.shape[0] == 1:
            return official({f"{name}/w": w, f"{name}/u": u}, name, norm=l2)
        return left(w, u)

    prefix = "generator/B4/non_local_block/"
    forward = last_layer(names, gain(f"sigma{ending}"), kernel)
    return Original("compare-gan", under(prefix, tensors), forward, "BHWC", prefix, {})


def _biggan_tfhub(seed, ending):
    names = ("theta", "phi", "g", "o_conv")
    tensors = tensorflow_checkpoint(seed, names, POOLED, "w", gain_shape=(1,))
    tensors |= {
        f"{name}{ending}": value * 0.8
        for name, value in tensorflow_checkpoint(seed + 1, names, POOLED, "w", gain_shape=(1,)).items()
    }
    make = Maker(seed + 2)
    for name, (out, _) in zip(names, POOLED.values(), strict=True):
        tensors[f"{name}/u0"] = make.normal(1, out)

    def kernel(p, name):
        w = p[f"{name}/w{ending}"].transpose(3, 2, 0, 1)
        w = ajbrock({f"{name}.weight": w, f"{name}.u0": p[f"{name}/u0"]}, name, 1e-4)
        return w.transpose(2, 3, 1, 0)

    prefix = "module/Generator/attention/"
    forward = last_layer(names, gain(f"gamma{ending}"), kernel)
    return Original("biggan-tfhub", under(prefix, tensors), forward, "BHWC", prefix, {})


def _taki(name, seed, normed):
    # The roles in the order query, key, value: g, f, h, for scores are g·fᵀ.
    names = ("g_conv", "f_conv", "h_conv") + (("attn_conv",) if name != "taki0112-2018" else ())
    widths = {"taki0112": POOLED, "taki0112-out": WIDTHS | {"out": (C, C)}, "taki0112-2018": WIDTHS}[name]
    inner = "" if normed else "conv2d/"
    vector = row_vector if normed else None
    tensors = tensorflow_checkpoint(
        seed, names, widths, f"{inner}kernel", vector, f"{inner}bias", gain_shape=(1,)
    )

    def kernel(p, n):
        return official(p, n, "kernel", "u", l2) if normed else p[f"{n}/conv2d/kernel"]

    forward = last_layer(
        names, gain("gamma"), kernel, lambda p, n: p[f"{n}/{inner}bias"], pooled=name == "taki0112"
    )
    prefix = "generator/self_attention/"
    return Original(name, under(prefix, tensors), forward, "BHWC", prefix, {})


def _norm_tensors(make, name, channels):
    make.p |= {
        f"{name}.weight": make.normal(channels),
        f"{name}.bias": make.normal(channels),
        f"{name}.running_mean": make.normal(channels),
        f"{name}.running_var": np.exp(make.normal(channels)),
        f"{name}.num_batches_tracked": np.array(7),
    }


def _timm(seed, scaled=True):
    make = Maker(seed)
    for name, (out, fan_in) in {"t": (8, C), "p": (8, C), "g": (8, C), "z": (C, 8)}.items():
        make.weight(f"{name}.weight", (out, fan_in, 1, 1), fan_in)
        make.p[f"{name}.weight"] *= 2
        make.p[f"{name}.bias"] = make.normal(out, scale=0.4)
    _norm_tensors(make, "norm", C)

    def forward(p, x):
        theta, phi, g = (flat(conv(x, p[f"{n}.weight"], p[f"{n}.bias"])) for n in "tpg")
        attention = softmax(t(theta) @ phi * (C**-0.5 if scaled else 1.0), -1)
        attended = t(attention @ t(g)).reshape(len(x), -1, *x.shape[2:])
        return batch_norm(conv(attended, p["z.weight"], p["z.bias"]), p, "norm", 1e-5) + x

    settings = {} if scaled else {"use_scale": False}
    return Original("timm", under("layer2.0.attn.", make.p), forward, "BCHW", "layer2.0.attn.", settings)


def _nonlocal(name, seed, pooled, normed, scaled=True):
    make = Maker(seed)
    mmcv = name == "mmcv"
    tail = ".conv" if mmcv else ""
    level = ".0" if pooled else ""
    out_conv, norm = ("conv_out.conv", "conv_out.bn") if mmcv else ("W.0" if normed else "W", "W.1")
    names = (f"theta{tail}", f"phi{level}{tail}", f"g{level}{tail}", out_conv)
    for child, (out, fan_in) in zip(names, ((DV, C), (DV, C), (DV, C), (C, DV)), strict=True):
        make.weight(f"{child}.weight", (out, fan_in, 1, 1), fan_in)
        if not (mmcv and normed and child == out_conv):
            make.p[f"{child}.bias"] = make.normal(out, scale=0.4)
    if normed:
        _norm_tensors(make, norm, C)
    pooling = pool if pooled else (lambda z: z)

    def forward(p, x):
        theta, phi, g = (conv(x, p[f"{n}.weight"], p[f"{n}.bias"]) for n in names[:3])
        scores = t(flat(theta)) @ flat(pooling(phi))
        if mmcv and scaled:
            scores = scores / theta.shape[1] ** 0.5
        attended = t(softmax(scores, -1) @ t(flat(pooling(g)))).reshape(len(x), -1, *x.shape[2:])
        z = conv(attended, p[f"{out_conv}.weight"], p.get(f"{out_conv}.bias"))
        return x + (batch_norm(z, p, norm, 1e-5) if normed else z)

    settings = {} if scaled else {"use_scale": False}
    return Original(name, under("neck.", make.p), forward, "BCHW", "neck.", settings)


def _ours(name, seed, flax_value=False):
    """Our own layers in their own layouts, with an out projection, and pooling that nothing but a setting tells."""
    make = Maker(seed)
    sep, leaf = (".", "kernel") if name == "canonical" else ("/", "kernel")
    value = "/value" if flax_value else ""
    for child, (out, fan_in) in POOLED.items():
        shape = (fan_in, out) if name == "canonical" else (1, 1, fan_in, out)
        make.weight(f"{child}{sep}{leaf}{value}", shape, fan_in)
        make.p[f"{child}{sep}bias{value}"] = make.normal(out, scale=0.4)
    make.p[f"gamma{value}"] = np.array([0.7])

    def kernel(p, child):
        w = p[f"{child}{sep}{leaf}{value}"]
        return w.reshape(1, 1, *w.shape[-2:])

    forward = last_layer(
        ("query", "key", "value", "out"),
        gain(f"gamma{value}"),
        kernel,
        lambda p, n: p[f"{n}{sep}bias{value}"],
    )
    prefix = f"generator{sep}attention{sep}"
    return Original(name, under(prefix, make.p), forward, "BHWC", prefix, {"kv_pool": 2})


def _keras_book(seed, names, gain_key):
    tensors = tensorflow_checkpoint(
        seed, names, POOLED, "kernel", None, "bias", gain_key=gain_key, gain_shape=(1,)
    )
    forward = last_layer(names, gain(gain_key), lambda p, n: p[f"{n}/kernel"], lambda p, n: p[f"{n}/bias"])
    prefix = "model/self_attention/"
    return Original("keras-book", under(prefix, tensors), forward, "BHWC", prefix, {})


def _pathology(seed, pooled):
    # Scores are g·fᵀ: the second convolution is the query.
    names = ("conv_layer_2", "conv_layer_1", "conv_layer_3", "conv_layer_4")[: 4 if pooled else 3]
    tensors = tensorflow_checkpoint(
        seed, names, POOLED if pooled else WIDTHS, "filter_conv", row_vector, "bias", gain_shape=(1,)
    )
    forward = last_layer(
        names,
        gain("gamma"),
        lambda p, n: official(p, n, "filter_conv", "u", l2),
        lambda p, n: p[f"{n}/bias"],
        pooled=pooled,
    )
    prefix = "generator/attention_block_2_512/"
    return Original("pathology-gan", under(prefix, tensors), forward, "BHWC", prefix, {})


def _builders() -> dict[str, Callable[[], Original]]:
    found: dict[str, Callable[[], Original]] = {}
    for row in FLAT:
        found[f"{row[0]}, {row[2]}"] = lambda row=row: _flat(row, 1)
    for row in POOLED_TORCH:
        found[f"{row[0]}, {row[2]}"] = lambda row=row: _pooled(row, 2)
    found["fgh, gamma never saved"] = lambda: _unsaved_gamma(3)
    found["sagan-tf"] = lambda: _sagan_tf(4)
    found["tfgan"] = lambda: _tfgan(5)
    for side in ("", "left", "auto"):
        found[f"compare-gan, {side or 'plain'}"] = lambda side=side: _compare_gan(6, side, False)
    found["compare-gan, auto, averaged"] = lambda: _compare_gan(6, "auto", True)
    found["biggan-tfhub"] = lambda: _biggan_tfhub(7, "/ema_b999900")
    found["biggan-tfhub, deep"] = lambda: _biggan_tfhub(7, "/ema_0.9999")
    for name in ("taki0112", "taki0112-out", "taki0112-2018"):
        found[name] = lambda name=name: _taki(name, 8, True)
        found[f"{name}, plain"] = lambda name=name: _taki(name, 8, False)
    by_name = ("Conv_Theta", "Conv_Phi", "Conv_G", "Conv_AttnG")
    found["keras-book"] = lambda: _keras_book(12, by_name, "sigma")
    found["keras-book, Conv_g"] = lambda: _keras_book(12, (*by_name[:2], "Conv_g", by_name[3]), "sigma")
    attributes = ("conv_theta", "conv_phi", "conv_g", "conv_attn_g")
    found["keras-book, attributes"] = lambda: _keras_book(12, attributes, "Sigma")
    for pooled in (False, True):
        found[f"pathology-gan, {1 + pooled}"] = lambda pooled=pooled: _pathology(13, pooled)
    found["timm"] = lambda: _timm(9)
    found["timm, use_scale=False"] = lambda: _timm(9, scaled=False)
    for name in ("mmcv", "nonlocal"):
        for pooled in (False, True):
            for normed in (False, True):
                label = f"{name}{', pooled' * pooled}{', norm' * normed}"
                found[label] = lambda n=name, a=pooled, b=normed: _nonlocal(n, 10, a, b)
    found["mmcv, use_scale=False"] = lambda: _nonlocal("mmcv", 10, False, False, scaled=False)
    for name in ("canonical", "keras", "flax"):
        found[name] = lambda name=name: _ours(name, 11)
    found["flax, an Orbax level"] = lambda: _ours("flax", 11, flax_value=True)
    return found


ORIGINALS = _builders()
