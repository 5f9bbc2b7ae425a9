"""Read the golden vectors without selfattn, and check a layer with them. The layer here is in plain numpy.

    python examples/golden_reader.py golden-vectors

In another language you need a JSON parser and a loop. docs/golden-vectors.md describes the files. Replace `Layer` and
`answers` by your own, and return None for what your layer cannot do.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

DTYPES = {"F32": "<f4", "F64": "<f8"}
STEP = 2.0**-60


def read(path: Path) -> tuple[dict, dict[str, dict[str, np.ndarray]]]:
    """The description of a file, and its arrays: first "input", "params", "cotangents" or "want", then the name.

    Args:
        path: a .safetensors file: eight bytes with the length of the JSON header, the header, then the bytes of the arrays.
    """
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    description = json.loads(header.pop("__metadata__")["golden"])
    groups: dict[str, dict[str, np.ndarray]] = {"input": {}, "params": {}, "cotangents": {}, "want": {}}
    for entry_name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        group, _, name = entry_name.partition(".")
        array = np.frombuffer(content[begin:end], DTYPES[entry["dtype"]])
        groups[group][name] = array.reshape(entry["shape"])
    return description, groups


class Layer:
    """The layer under test: its output, its map and its first derivatives, in the dtype of the arguments.

    Args:
        config: config in the file.
        params: parameters in the file.
        x: (B, H, W, C).
    """

    def __init__(self, config: dict, params: dict[str, np.ndarray], x: np.ndarray) -> None:
        batch, height, width, channels = x.shape
        self.config, self.params, self.shape = config, params, x.shape
        self.rows = x.reshape(batch, height * width, channels)
        # The positions in each pooling window, (M, p²). Positions beyond the last whole window belong to no window.
        p = config["kv_pool"]
        down, across = height // p, width // p
        positions = np.arange(height * width).reshape(height, width)[: down * p, : across * p]
        self.windows = positions.reshape(down, p, across, p).swapaxes(1, 2).reshape(down * across, p * p)
        self.q = self.project("query", self.rows)
        key, value = self.project("key", self.rows), self.project("value", self.rows)
        self.key_winners, self.value_winners = self.winners(key), self.winners(value)
        self.k = np.take_along_axis(key, self.key_winners, axis=1)
        self.v = np.take_along_axis(value, self.value_winners, axis=1)
        scores = self.q @ self.k.swapaxes(1, 2)
        exponentials = np.exp(scores - scores.real.max(axis=-1, keepdims=True))
        self.map = exponentials / exponentials.sum(axis=-1, keepdims=True)
        self.o = self.map @ self.v
        self.z = self.project("out", self.o) if config["out_projection"] else self.o
        self.y = (params["gamma"] * self.z + self.rows).reshape(x.shape)

    def norm(self, name: str) -> np.ndarray:
        """The spectral norm of a kernel as u and v estimate it, or 1 if the estimate is 0."""
        norm = self.params[f"{name}.v"] @ self.params[f"{name}.kernel"] @ self.params[f"{name}.u"]
        # A kernel of zeros still counts as zero with the imaginary part of a second derivative.
        return norm if norm.real != 0 else np.ones_like(norm)

    def kernel(self, name: str) -> np.ndarray:
        """The kernel of a projection, divided by its spectral norm if it has one."""
        kernel = self.params[f"{name}.kernel"]
        return kernel / self.norm(name) if self.config["spectral_norm"] else kernel

    def project(self, name: str, rows: np.ndarray) -> np.ndarray:
        """A 1×1 convolution, which is a product with a matrix."""
        projected = rows @ self.kernel(name)
        return projected + self.params[f"{name}.bias"] if self.config["use_bias"] else projected

    def winners(self, rows: np.ndarray) -> np.ndarray:
        """The position of the first largest value of each window and channel, (B, M, D)."""
        first = rows[:, self.windows].real.argmax(axis=2)
        return self.windows[np.arange(len(self.windows))[:, None], first]

    def scattered(self, pooled: np.ndarray, winners: np.ndarray) -> np.ndarray:
        """The gradient of each window, placed at its winner, (B, N, D)."""
        rows = np.zeros((*self.rows.shape[:2], pooled.shape[-1]), pooled.dtype)
        np.put_along_axis(rows, winners, pooled, axis=1)
        return rows

    def gradients(self, dy: np.ndarray) -> dict[str, np.ndarray]:
        """The gradient of sum(dy∘y) for x and every parameter."""
        g = dy.reshape(self.rows.shape)
        scaled = self.params["gamma"] * g
        to_o = scaled @ self.kernel("out").T if self.config["out_projection"] else scaled
        # The sum over keys of A∘dA, computed from the output, because a fused kernel never has all of A.
        subtracted = (to_o * self.o).sum(axis=-1, keepdims=True)
        to_scores = self.map * (to_o @ self.v.swapaxes(1, 2) - subtracted)
        projected = {
            "query": to_scores @ self.k,
            "key": self.scattered(to_scores.swapaxes(1, 2) @ self.q, self.key_winners),
            "value": self.scattered(self.map.swapaxes(1, 2) @ to_o, self.value_winners),
        }
        found = {"x": g + sum(d @ self.kernel(name).T for name, d in projected.items())}
        if self.config["out_projection"]:
            projected["out"] = scaled
        for name, d in projected.items():
            rows = self.o if name == "out" else self.rows
            to_kernel = np.einsum("bni,bnj->ij", rows, d)
            if self.config["spectral_norm"]:
                along = (to_kernel * self.kernel(name)).sum()
                direction = np.outer(self.params[f"{name}.v"], self.params[f"{name}.u"])
                if (direction * self.params[f"{name}.kernel"]).sum().real == 0:
                    direction = 0 * direction
                to_kernel = (to_kernel - along * direction) / self.norm(name)
            found[f"{name}.kernel"] = to_kernel
            if self.config["use_bias"]:
                found[f"{name}.bias"] = d.sum(axis=(0, 1))
        found["gamma"] = (g * self.z).sum().reshape(1)
        return {name: array.reshape(self.shape) if name == "x" else array for name, array in found.items()}


def second_derivatives(
    config: dict,
    params: dict[str, np.ndarray],
    x: np.ndarray,
    dy: np.ndarray,
    cotangents: dict[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """The gradient of the sum over names of sum(cotangent∘gradients[name]), for dy, x and every parameter.

    Second derivatives are symmetric, so this is the change of y and of the gradients if x and the parameters move along the
    cotangents. A tiny step in the imaginary direction, whose square vanishes, gives it without a difference of two numbers.
    If your framework can differentiate twice, use that instead.
    """

    def moved(name: str, array: np.ndarray) -> np.ndarray:
        along = cotangents.get(name, np.zeros_like(array))
        return array + 1j * (along * array.dtype.type(STEP))

    layer = Layer(config, {name: moved(name, array) for name, array in params.items()}, moved("x", x))
    found = {"dy": layer.y} | layer.gradients(dy)
    return {name: array.imag / x.dtype.type(STEP) for name, array in found.items()}


def after_power_iteration(config: dict, params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state after a pass in training moves it, before anything else is computed. The kernels stay the same."""
    moved = dict(params)
    for name in ("query", "key", "value", "out") if config["out_projection"] else ("query", "key", "value"):
        kernel = params[f"{name}.kernel"]
        u = normalised(params[f"{name}.v"] @ kernel)
        moved |= {f"{name}.u": u, f"{name}.v": normalised(kernel @ u)}
    return moved


def normalised(vector: np.ndarray) -> np.ndarray:
    """A vector scaled to length 1, or a fixed direction for a vector of zeros."""
    if not vector.any():
        vector = (2 * (np.arange(1, len(vector) + 1) ** 3 % 101) - 101).astype(vector.dtype)
    return vector / max(np.sqrt(vector @ vector), 1e-12)


def answers(golden: dict, groups: dict[str, dict[str, np.ndarray]]) -> dict[str, np.ndarray] | None:
    """The layer's answers to a file, by the names of its "want", or None if the layer cannot compute them.

    Args:
        golden: the description.
        groups: the arrays, in the dtype of the computation.
    """
    config, params, x = golden["config"], groups["params"], groups["input"]["x"]
    computation = golden["computation"]
    if computation in ("training_pass", "training_vjp"):
        params = after_power_iteration(config, params)
    layer = Layer(config, params, x)
    found = None
    if computation == "forward":
        found = {"y": layer.y}
    elif computation == "map":
        found = {"map": layer.map}
    elif computation == "training_pass":
        found = {"y": layer.y} | params
    elif computation in ("vjp", "training_vjp"):
        found = layer.gradients(groups["input"]["dy"])
    elif computation == "mixed":
        found = second_derivatives(config, params, x, groups["input"]["dy"], groups["cotangents"])
    elif computation == "r1":
        w = groups["input"]["w"]
        dx = layer.gradients(w)["x"]
        found = {"r1": (dx * dx).sum().reshape(1)} | second_derivatives(config, params, x, w, {"x": 2 * dx})
    return found


def complaints(golden: dict, groups: dict[str, dict[str, np.ndarray]], dtype: str) -> list[str] | None:
    """The errors in the layer's answer to a file, one line for each wrong quantity, or None without an answer.

    Args:
        golden: the description.
        groups: the arrays.
        dtype: dtype of the computation, "float32" or "float64".
    """
    cast = {
        group: {name: array.astype(dtype) for name, array in arrays.items()}
        for group, arrays in groups.items()
        if group != "want"
    }
    got = answers(golden, cast)
    if got is None:
        return None
    lines = []
    for name, want in groups["want"].items():
        where = f"{golden['case']} ({golden['title']}), {dtype}: {name}"
        if name not in got or got[name].shape != want.shape or got[name].dtype != dtype:
            lines.append(f"{where}: is missing, or not of shape {want.shape} and {dtype}")
            continue
        tolerance = golden["tolerances"][name]
        allowed = min(golden["factor"] * tolerance["floor"], tolerance["cap"])
        if dtype == "float64":
            allowed *= 2.0**-29
        error = np.abs(got[name] - want).max(initial=0.0)
        # Written so that NaN fails too.
        if not error <= allowed:
            lines.append(f"{where}: error {error:.3g}, allowed {allowed:.3g}")
    return lines


def main(folder: Path) -> int:
    """Check every file in both dtypes.

    Args:
        folder: folder of the golden vectors.

    Returns:
        The exit code: 1 if a comparison failed, 2 if there are no vectors.
    """
    if not (folder / "SHA256SUMS").is_file():
        print(f"{folder}: has no SHA256SUMS; name the folder of the golden vectors", file=sys.stderr)
        return 2
    checked = failed = unanswered = 0
    for line in (folder / "SHA256SUMS").read_text(encoding="ascii").splitlines():
        digest, name = line.split("  ")
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            print(f"{name}: is not the file that SHA256SUMS lists")
            failed += 1
            continue
        golden, groups = read(folder / name)
        for dtype in ("float32", "float64"):
            lines = complaints(golden, groups, dtype)
            if lines is None:
                unanswered += 1
                continue
            checked += len(groups["want"])
            failed += len(lines)
            print("".join(f"{complaint}\n" for complaint in lines), end="")
    print(f"{checked} comparisons, {failed} failed; {unanswered} computations were not answered")
    return int(failed > 0 or checked == 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "golden-vectors")))
