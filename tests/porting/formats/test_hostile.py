"""Files made to deceive get a message each; nothing is executed, written, or allocated on their word."""

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from selfattn_core.porting import PortError, open_tensors
from tests.porting.formats.hostile import archive_files, h5_files, stream_files, torch_files

# Beyond what the process holds: the samples are small, and what they promise is not.
BOUND = 512 * 2**20


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    trace = folder / "TRACE"
    return trace, {
        **torch_files.write(_new(folder, "torch"), trace),
        **archive_files.write_npz(_new(folder, "npz"), trace),
        **archive_files.write_safetensors(_new(folder, "safetensors")),
        **h5_files.write(_new(folder, "h5")),
        **stream_files.write_msgpack(_new(folder, "msgpack")),
        **stream_files.write_tensorflow(_new(folder, "tensorflow")),
        **stream_files.write_other(_new(folder, "other")),
    }


def _new(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


def refusal(path: Path, **options) -> str:
    with pytest.raises(PortError) as error, open_tensors(path, **options) as opened:  # noqa: PT012 - some damage is in the values
        for key in opened:
            opened.read(key)
    return str(error.value)


def test_every_hostile_file_gets_its_own_message(hostile):
    trace, cases = hostile
    files = {path for case, _ in cases.values() for path in case.parent.rglob("*")}
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    wrong = {}
    try:
        resource.setrlimit(resource.RLIMIT_AS, (held + BOUND, hard))
        for name, (path, words) in cases.items():
            message = refusal(path)
            if words not in message or str(path.parent) not in message:
                wrong[name] = message
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert not wrong, "\n".join(f"{name}: {message}" for name, message in wrong.items())
    assert len(cases) > 100
    assert not trace.exists()
    assert {path for case, _ in cases.values() for path in case.parent.rglob("*")} == files


def test_the_payload_would_have_run(hostile, tmp_path):
    """Otherwise the trace that is not there would prove nothing."""
    import pickle

    from tests.porting.formats.hostile.marker import pickled

    pickle.loads(pickled(tmp_path / "TRACE"))  # noqa: S301 - our own
    assert (tmp_path / "TRACE").read_text() == "executed"


def test_every_problem_is_listed_at_once(tmp_path):
    path = tmp_path / "bad.safetensors"
    rows = {"a": archive_files.row((7,)), "b": archive_files.row(dtype="F33"), "c": archive_files.row((-1,))}
    path.write_bytes(archive_files.safetensors(rows, bytes(24)))
    message = refusal(path)
    assert all(f"  {key}: " in message for key in rows)


def test_a_file_that_may_not_be_read(tmp_path):
    """In a process that gives up its rights first, for root may read everything."""
    path = tmp_path / "secret.npz"
    np.savez(path, gamma=np.ones(1))
    path.chmod(0)
    tmp_path.chmod(0o755)
    script = """
import os, sys
from selfattn_core.porting import PortError, open_tensors
if os.getuid() == 0:
    os.setuid(65534)
try:
    open_tensors("secret.npz")
except PortError as error:
    print(error)
"""
    # The folder is entered before the rights are given up, for it is below one that only its owner may enter.
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith(
        "secret.npz: no permission to read it; see its owner and mode with `ls -l`."
    )


@pytest.fixture
def checkpoint(samples, tmp_path):
    """A sound checkpoint of Orbax to spoil."""
    return Path(shutil.copytree(samples / "linen", tmp_path / "linen"))


def spoil(path: Path, old: str, new: str) -> None:
    content = path.read_text(encoding="utf-8")
    assert old in content
    path.write_text(content.replace(old, new), encoding="utf-8")


def test_orbax_with_a_link(checkpoint, tmp_path):
    (tmp_path / "elsewhere").write_bytes(b"x")
    (checkpoint / "d" / "link").symlink_to(tmp_path / "elsewhere")
    assert "d/link is a symbolic link; links are not followed" in refusal(checkpoint)


def test_orbax_with_a_name_that_leads_out(checkpoint):
    spoil(checkpoint / "_METADATA", '"key": "gamma"', '"key": "../../gamma"')
    assert "is a path that leads elsewhere" in refusal(checkpoint)


def test_orbax_with_a_missing_array(checkpoint):
    spoil(checkpoint / "_METADATA", '"key": "gamma"', '"key": "sigma"')
    assert "arrays cannot be read:\n  params/sigma: " in refusal(checkpoint)


def test_orbax_with_an_array_twice(checkpoint):
    spoil(checkpoint / "_METADATA", '"key": "gamma"', '"key": "query"')
    message = refusal(checkpoint)
    assert "params/query: " in message


def test_orbax_half_written(checkpoint):
    for path in checkpoint.rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert str(checkpoint) in refusal(checkpoint)


def test_orbax_without_its_data(checkpoint):
    for path in checkpoint.rglob("d/*"):
        path.unlink()
    assert str(checkpoint) in refusal(checkpoint)


def test_orbax_with_damaged_metadata(checkpoint):
    (checkpoint / "_METADATA").write_text('{"tree_metadata": {"a": 3}}', encoding="utf-8")
    assert "is no row of a tree" in refusal(checkpoint)
    (checkpoint / "_METADATA").write_text('{"tree_metadata": ', encoding="utf-8")
    assert "is damaged: it is not JSON" in refusal(checkpoint)
    (checkpoint / "_METADATA").unlink()
    assert "is a folder, and neither a checkpoint of Orbax" in refusal(checkpoint)


def test_several_orbax_items(checkpoint, tmp_path):
    folder = tmp_path / "step"
    shutil.copytree(checkpoint, folder / "default")
    with open_tensors(folder) as opened:
        assert "params/gamma" in opened
    shutil.copytree(checkpoint, folder / "ema")
    assert "is not one checkpoint of Orbax; it holds" in refusal(folder)
