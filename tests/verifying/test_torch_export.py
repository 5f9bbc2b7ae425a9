"""Programs of `torch.export`, with arguments that are no tensors too."""

import pytest
import torch

import selfattn_torch
from selfattn_core import SelfAttentionConfig, save
from selfattn_core.conformance.cases.case import Case
from selfattn_core.conformance.cases.inputs import inputs
from selfattn_core.verifying import VerifyError, verify


@pytest.mark.parametrize("with_map", [False, True])
def test_a_program_and_its_map(tmp_path, with_map):
    config = SelfAttentionConfig(16, kv_pool=2)
    save(tmp_path / "layer.safetensors", config, inputs(Case("", "forward", "", config), "float32").params)
    layer = selfattn_torch.load(tmp_path / "layer.safetensors").eval()
    kwargs = {"need_weights": True} if with_map else {}
    program = torch.export.export(layer, (torch.zeros(2, 16, 5, 7),), kwargs)
    torch.export.save(program, tmp_path / "layer.pt2")
    report = verify(tmp_path / "layer.pt2", tmp_path / "layer.safetensors")
    assert report.passed, report.to_text()
    assert report.with_map == with_map
    assert report.layout == "channels_first"
    with pytest.raises(VerifyError, match="got maps of 4×4 positions; the file takes 5×7"):
        verify(tmp_path / "layer.pt2", tmp_path / "layer.safetensors", size=(4, 4))
