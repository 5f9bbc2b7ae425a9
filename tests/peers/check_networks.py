"""Networks of published packages before and after `convert`: outputs and gradients.

Run by `make test-peers`, in an environment of its own.
"""

import pytest
import torch
from torch import nn

from selfattn_core.conformance.verdicts.tolerance import FACTOR
from selfattn_core.porting import PortError
from selfattn_torch import SelfAttention2d, convert
from tests.peers.originals import mimicry, prepare_torchvision
from tests.porting.networks import check_network


def biggan():
    """BigGAN-128, of the widths and the depth of the published one."""
    from pytorch_pretrained_biggan import BigGAN, BigGANConfig

    blocks = [(16, 16), (16, 16), (16, 16), (16, 8), (8, 8), (8, 4), (4, 4), (4, 2), (2, 2), (2, 1)]
    layers = [(number % 2 == 1, *widths) for number, widths in enumerate(blocks)]
    model = BigGAN(
        BigGANConfig(
            output_dim=128,
            z_dim=128,
            class_embed_dim=128,
            channel_width=128,
            num_classes=1000,
            layers=layers,
            attention_layer_position=8,
            eps=1e-4,
            n_stats=51,
        )
    )
    classes = nn.functional.one_hot(torch.tensor([3]), 1000).float()
    model.train()
    with torch.no_grad():
        # The norms of new weights are estimated from nothing, and activations overflow.
        for _ in range(15):
            model(torch.randn(1, 128), classes, 0.7)
    return model, (torch.randn(1, 128), classes, 0.7), {"dialect": "biggan-hf"}


def mimicry_generator():
    """SAGAN of 32×32 pixels."""
    model = mimicry("SAGANGenerator32", ngf=24, nz=7)
    return model, (torch.randn(2, 7), torch.tensor([0, 2])), {"dialect": "mimicry"}


class Scores(nn.Module):
    """The discriminator alone returns them."""

    def __init__(self, discriminator):
        super().__init__()
        self.discriminator = discriminator

    def forward(self, x, y):
        return self.discriminator(x, y)[0]


def mimicry_discriminator():
    """Its critic, which has the spectral norm of the package."""
    model = Scores(mimicry("SAGANDiscriminator32", ndf=24))
    with torch.no_grad():
        for _ in range(15):
            model.train()(torch.randn(2, 3, 32, 32), torch.tensor([0, 2]))
    return model, (torch.randn(2, 3, 32, 32), torch.tensor([0, 2])), {"dialect": "mimicry"}


def fastai_unet():
    """A U-Net on ResNet-18 with self-attention, as `unet_learner(…, self_attention=True)` makes it."""
    prepare_torchvision()
    from fastai.vision.all import create_body
    from fastai.vision.models.unet import DynamicUnet
    from torchvision.models import resnet18

    model = DynamicUnet(create_body(resnet18(weights=None)), 3, (64, 64), self_attention=True)
    return model, (torch.randn(1, 3, 64, 64),), {"dialect": "fastai"}


def timm_resnet():
    """A ResNet-26 with non-local blocks."""
    prepare_torchvision()
    import timm

    model = timm.create_model("resnet26", block_args={"attn_layer": "nl"})
    return model, (torch.randn(1, 3, 64, 64),), {"dialect": "timm"}


def mmcv():
    """Non-local blocks between convolutions, one pooled and normed."""
    prepare_torchvision()
    from mmcv.cnn import NonLocal2d

    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        NonLocal2d(16, zeros_init=False),
        nn.Tanh(),
        NonLocal2d(16, sub_sample=True, norm_cfg={"type": "BN"}, zeros_init=False),
    )
    return model, (torch.randn(2, 3, 8, 10),), {"dialect": "mmcv", "match": NonLocal2d}


NETWORKS = (biggan, mimicry_generator, mimicry_discriminator, fastai_unet, timm_resnet, mmcv)


@pytest.mark.parametrize("build", NETWORKS)
def test_the_network_is_the_same(build):
    torch.manual_seed(0)
    model, given, options = build()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                # New layers add nothing, and would be the same whatever they compute.
                parameter.add_(0.5 + 0.1 * torch.randn(parameter.shape))
    report = convert(model, **options)
    assert sum(isinstance(module, SelfAttention2d) for module in report.model.modules()) == len(report.layers)
    assert (
        max(error for layer in report.layers for error in (*layer.old.values(), *layer.new.values()))
        <= FACTOR
    )
    check_network(given, model, report.model)


def test_torchgan_is_refused():
    prepare_torchvision()
    from torchgan.layers import SelfAttention2d as Original

    model = nn.Sequential(nn.Conv2d(3, 16, 3), Original(16))
    with pytest.raises(PortError, match=r"1 \(SelfAttention2d\): torchgan .* cannot be converted"):
        convert(model, dialect="torchgan", match=Original)
