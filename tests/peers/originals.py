"""The real layers of published packages, trained a little, and saved the way their users do."""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

__all__ = ["PEERS", "Peer", "mimicry", "prepare_torchvision"]


def prepare_torchvision() -> None:
    """Let torchvision be imported beside a torch for the CPU.

    A torchvision that was built for CUDA, as the registry has it, does not load its own operators there, and then fails on
    describing two that nothing here calls.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        # Kept for the life of the process: with it the definitions would go.
        prepare_torchvision.library = library
        importlib.import_module("torchvision")


def _state_dict(model: nn.Module, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "model.pth")
    return folder / "model.pth"


@dataclass(frozen=True)
class Peer:
    """One published layer.

    Args:
        dialect: what we call it.
        build: gives a model and the attention layer in it.
        channels: of the layer's input.
        prefix: where the layer is in the saved file.
        save: as the package's users do.
        settings: what its file does not say.
    """

    dialect: str
    build: Callable[[], tuple[nn.Module, nn.Module]]
    channels: int
    prefix: str = ""
    save: Callable[[Any, Path], Path] = _state_dict
    settings: dict[str, Any] = field(default_factory=dict)


def _alone(make: Callable[[], nn.Module]) -> Callable[[], tuple[nn.Module, nn.Module]]:
    def build() -> tuple[nn.Module, nn.Module]:
        layer = make()
        return layer, layer

    return build


def _biggan() -> tuple[nn.Module, nn.Module]:
    from pytorch_pretrained_biggan import BigGAN, BigGANConfig

    layers = [(False, 8, 8), (True, 8, 4), (False, 4, 4), (True, 4, 1)]
    model = BigGAN(
        BigGANConfig(
            output_dim=16,
            z_dim=6,
            class_embed_dim=5,
            channel_width=11 * 4,
            num_classes=3,
            layers=layers,
            attention_layer_position=2,
        )
    )
    return model, model.generator.layers[2]


def mimicry(name: str, **options: Any) -> nn.Module:
    """A network of torch-mimicry's SAGAN for 32×32 pixels.

    As a whole the package cannot be imported: its metrics need TensorFlow 1, its data sets a module that torch no longer has.
    """
    prepare_torchvision()
    for part in ("metrics", "datasets"):
        sys.modules.setdefault(f"torch_mimicry.{part}", ModuleType(f"torch_mimicry.{part}"))
    network = getattr(importlib.import_module("torch_mimicry.nets.sagan.sagan_32"), name)
    return network(num_classes=3, **options)


def _mimicry() -> tuple[nn.Module, nn.Module]:
    model = mimicry("SAGANGenerator32", ngf=24, nz=7)
    return model, model.attn_block


def _save_mimicry(model: Any, folder: Path) -> Path:
    optimizer = torch.optim.Adam(model.parameters())
    model.save_checkpoint(str(folder / "netG"), 100, optimizer)
    return folder / "netG" / "netG_100_steps.pth"


def _fastai(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        prepare_torchvision()
        return getattr(importlib.import_module("fastai.layers"), name)(40)

    return make


def _fastai_network() -> tuple[nn.Module, nn.Module]:
    prepare_torchvision()
    from fastai.layers import ConvLayer, SelfAttention

    layer = SelfAttention(24)
    return nn.Sequential(ConvLayer(3, 24), nn.Sequential(ConvLayer(24, 24), layer)), layer


def _timm() -> nn.Module:
    prepare_torchvision()
    from timm.layers import NonLocalAttn

    return NonLocalAttn(24)


def _mmcv(**options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        prepare_torchvision()
        from mmcv.cnn import NonLocal2d

        return NonLocal2d(12, zeros_init=False, **options)

    return make


PEERS = {
    "biggan-hf": Peer("biggan-hf", _biggan, 11 * 16, "generator.layers.2."),
    "mimicry": Peer("mimicry", _mimicry, 24, "attn_block.", _save_mimicry),
    "fastai": Peer("fastai", _alone(_fastai("SelfAttention")), 40),
    "fastai in a network": Peer("fastai", _fastai_network, 24, "1.1."),
    "fastai-pooled": Peer("fastai-pooled", _alone(_fastai("PooledSelfAttention2d")), 40),
    "timm": Peer("timm", _alone(_timm), 24),
    "mmcv": Peer("mmcv", _alone(_mmcv()), 12),
    "mmcv without scale": Peer("mmcv", _alone(_mmcv(use_scale=False)), 12, settings={"use_scale": False}),
    "mmcv pooled": Peer("mmcv", _alone(_mmcv(sub_sample=True)), 12),
    "mmcv with norm": Peer("mmcv", _alone(_mmcv(norm_cfg={"type": "BN"}, reduction=3)), 12),
}
