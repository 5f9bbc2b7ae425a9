"""`load(path, dialect=…, prefix=…)` of every adapter: somebody's checkpoint as a layer of the framework, in one line."""

import os
import subprocess
import sys

import numpy as np
import pytest

from tests.porting.checkpoints import output, written

SCRIPTS = {
    "torch, and Keras on torch": """
import torch
import selfattn_torch, selfattn_keras
layer = selfattn_torch.load(path, dialect="mmcv", prefix="neck", settings={"use_scale": False})
with torch.no_grad():
    answers["torch"] = layer(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
layer = selfattn_keras.load(path, dialect="mmcv", prefix="neck", settings={"use_scale": False})
answers["keras"] = layer(x).detach().numpy()
load = selfattn_torch.load
""",
    "Flax": """
import selfattn_flax, selfattn_flax.linen
layer = selfattn_flax.load(path, dialect="mmcv", prefix="neck", settings={"use_scale": False})
answers["nnx"] = layer(x)
module, variables = selfattn_flax.linen.load(path, dialect="mmcv", prefix="neck", settings={"use_scale": False})
answers["linen"] = module.apply(variables, x)
load = selfattn_flax.load
""",
}
FRAME = """
import sys
import numpy as np
path, x_file, out = sys.argv[1:]
x = np.load(x_file)
answers = {}
BODY
np.savez(out, **answers)
stray = f"{path}.stray.npz"
np.savez(stray, **np.load(path), **{"neck.stray": np.ones(1)})
others = {"dialect": "mmcv", "prefix": "neck", "settings": {"use_scale": False}}
try:
    load(stray, **others)
    raise AssertionError("stray")
except ValueError as error:
    assert "pass strict=False" in str(error)
load(stray, **others, strict=False)
for options in ({"prefix": "neck"}, {"dialect": "mmcv", "block": "neck"}):
    try:
        load(path, **options)
        raise AssertionError(options)
    except ValueError as error:
        assert "canonical" in str(error)
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_line(script, tmp_path):
    path, original = written(tmp_path, "mmcv, use_scale=False")
    x, y = output(original, dtype="float32")
    np.save(tmp_path / "x.npy", x)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            FRAME.replace("BODY", SCRIPTS[script]),
            str(path),
            str(tmp_path / "x.npy"),
            str(tmp_path / "y.npz"),
        ],
        env=os.environ | {"KERAS_BACKEND": "torch"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "y.npz") as answers:
        assert len(answers.files) == 2
        for name in answers.files:
            error = np.abs(answers[name] - y).max() / np.abs(y).max()
            assert error < 30 * np.finfo(np.float32).eps, name
