"""Reads the golden vectors with nothing of selfattn, and checks a layer with them: here, fifteen lines of numpy.

    python examples/golden_reader.py golden-vectors

The same in another language is a JSON parser and a loop; docs/golden-vectors.md describes the files. Replace `attend`
by your own layer.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

DTYPES = {"F32": "<f4", "F64": "<f8"}


def read(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """The description and the arrays of a file.

    Args:
        path: a .safetensors file: eight bytes of length, that much JSON, then the arrays' bytes.
    """
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    description = json.loads(header.pop("__metadata__")["golden"])
    arrays = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        arrays[name] = np.frombuffer(content[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return description, arrays


def attend(config: dict, params: dict[str, np.ndarray], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The layer under test: y (B, H, W, C) and the map (B, N, M), in the dtype of its arguments."""

    def project(name: str, maps: np.ndarray) -> np.ndarray:
        return maps @ params[f"{name}.kernel"] + params.get(f"{name}.bias", x.dtype.type(0))

    def pooled(maps: np.ndarray) -> np.ndarray:
        p = config["kv_pool"]
        b, h, w, c = maps.shape
        whole = maps[:, : h // p * p, : w // p * p]
        return whole.reshape(b, h // p, p, w // p, p, c).max(axis=(2, 4)).reshape(b, (h // p) * (w // p), c)

    b, h, w, _ = x.shape
    q = project("query", x).reshape(b, h * w, config["qk_channels"])
    scores = q @ pooled(project("key", x)).swapaxes(1, 2)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    attended = (weights @ pooled(project("value", x))).reshape(b, h, w, config["value_channels"])
    if config["out_projection"]:
        attended = project("out", attended)
    return params["gamma"] * attended + x, weights


def main(folder: Path) -> int:
    """Check the files of the families "forward" and "map" in both dtypes.

    Args:
        folder: of the golden vectors.

    Returns:
        The exit code: 1 if a comparison failed, 2 if there are no vectors.
    """
    if not (folder / "SHA256SUMS").is_file():
        print(f"{folder}: has no SHA256SUMS; name the folder of the golden vectors", file=sys.stderr)
        return 2
    checked = failed = 0
    for line in (folder / "SHA256SUMS").read_text(encoding="ascii").splitlines():
        digest, name = line.split("  ")
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            print(f"{name}: is not the file that SHA256SUMS lists")
            failed += 1
            continue
        golden, arrays = read(folder / name)
        if golden["family"] not in ("forward", "map"):
            continue
        for dtype, shrink in (("float32", 1.0), ("float64", 2.0**-29)):
            params = {
                key[7:]: value.astype(dtype) for key, value in arrays.items() if key.startswith("params.")
            }
            y, attention = attend(golden["config"], params, arrays["input.x"].astype(dtype))
            quantity, got = ("y", y) if golden["family"] == "forward" else ("map", attention)
            error = np.abs(got - arrays[f"want.{quantity}"]).max(initial=0.0)
            tolerance = golden["tolerances"][quantity]
            allowed = shrink * min(golden["factor"] * tolerance["floor"], tolerance["cap"])
            checked += 1
            if not error <= allowed:
                print(
                    f"{golden['case']} ({golden['title']}), {dtype}: error {error:.3g}, allowed {allowed:.3g}"
                )
                failed += 1
    print(f"{checked} comparisons, {failed} failed")
    return int(failed > 0 or checked == 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "golden-vectors")))
