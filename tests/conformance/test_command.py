"""The command `selfattn conform`."""

import json
import re
import subprocess
import sys


def selfattn(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from selfattn_core.cli import main; main(prog_name='selfattn')"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)


def test_the_command_exits_by_what_it_found(on_path, tmp_path):
    good = selfattn("conform", "toy_backends:InferenceOnly", "--level", "core", "--json", "-")
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["backends"][0]["name"] == "toy_backends:InferenceOnly"
    assert "noise floor" in good.stderr
    assert "conformant at  no level" in re.sub(r" {2,}", "  ", good.stderr)
    bad = selfattn("conform", "toy_backends:NotANumber", "toy_backends:InferenceOnly", "--level", "core")
    assert bad.returncode == 1
    assert "FAILED" in bad.stdout
    assert "toy_backends:InferenceOnly" in bad.stdout
    wrong = selfattn("conform", "tensorfow", "a:", ":b")
    assert wrong.returncode == 2
    assert "unknown backend tensorfow; known are torch" in wrong.stderr
    assert "unknown backend a:; known" in wrong.stderr
    assert "unknown backend :b; known" in wrong.stderr
    refused = selfattn("conform", "toy_backends:Absent", "toy_backends:NotANumber", "--level", "core")
    assert refused.returncode == 2
    assert "did not start: backend 'toy_backends:Absent': toy_backends has no 'Absent'." in refused.stdout
    nothing = selfattn("conform", "toy_backends:ClaimsNothing", "--level", "core")
    assert nothing.returncode == 1
    assert "toy_backends:ClaimsNothing: claims no case of level core" in nothing.stdout
    one = tmp_path / "report"
    same = selfattn("conform", "torch", "--json", str(one), "--html", str(tmp_path / "." / "report"))
    assert same.returncode == 2
    assert f"--json and --html cannot all go to {one}" in " ".join(same.stderr.split())
    assert not one.exists()
    unwritable = selfattn(
        "conform", "toy_backends:InferenceOnly", "--json", str(tmp_path / "absent" / "r.json")
    )
    assert unwritable.returncode == 2
    assert "there is no folder" in unwritable.stderr
    assert "core" not in unwritable.stdout, "no backend is asked before that"
    assert "Traceback" not in unwritable.stderr


def test_the_module_is_the_command():
    command = [sys.executable, "-m", "selfattn_core.cli", "conform", "tensorfow"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "Usage: selfattn conform" in result.stderr
