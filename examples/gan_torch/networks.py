"""Generator and discriminator in PyTorch."""

import torch
from torch import nn
from torch.nn.functional import interpolate, leaky_relu, one_hot
from torch.nn.utils.parametrizations import spectral_norm

from examples.gan.settings import CLASSES, LATENT, WIDTHS
from selfattn_torch import SelfAttention2d

__all__ = ["Discriminator", "Generator"]


class Generator(nn.Module):
    """A latent and a class to an image, by way of a 4×4 and an 8×8 map; attention acts on the latter."""

    def __init__(self) -> None:
        super().__init__()
        first, attended, last = WIDTHS["first"], WIDTHS["attended"], WIDTHS["last"]
        self.dense = nn.Linear(LATENT + CLASSES, 4 * 4 * first)
        self.conv1 = nn.Conv2d(first, attended, 3, padding=1)
        self.attention = SelfAttention2d(attended)
        self.conv2 = nn.Conv2d(attended, last, 3, padding=1)
        self.conv3 = nn.Conv2d(last, 1, 3, padding=1)

    def features(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """What the attention layer gets, (B, C, 8, 8)."""
        x = self.dense(torch.cat([latents, one_hot(labels, CLASSES).to(latents)], dim=1))
        x = torch.relu(x.unflatten(1, (4, 4, -1)).permute(0, 3, 1, 2))  # (B, C, 4, 4)
        return torch.relu(self.conv1(interpolate(x, scale_factor=2)))

    def forward(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Images (B, 1, 8, 8) of latents (B, LATENT) and labels (B,)."""
        x = self.attention(self.features(latents, labels))
        return torch.sigmoid(self.conv3(torch.relu(self.conv2(x))))


class Discriminator(nn.Module):
    """An image and a class to a score; spectral norm everywhere, attention in its pooled form."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = spectral_norm(nn.Conv2d(1, 32, 3, padding=1))
        self.attention = SelfAttention2d(
            32, value_channels=16, out_projection=True, bias=False, kv_pool=2, spectral_norm=True
        )
        self.conv2 = spectral_norm(nn.Conv2d(32, 64, 3, stride=2, padding=1))
        self.conv3 = spectral_norm(nn.Conv2d(64, 64, 3, stride=2, padding=1))
        self.dense = spectral_norm(nn.Linear(64, 1 + CLASSES))

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Scores (B,) of images (B, 1, 8, 8) as images of these classes."""
        x = leaky_relu(self.conv1(images), 0.2)
        x = leaky_relu(self.conv2(self.attention(x)), 0.2)
        x = leaky_relu(self.conv3(x), 0.2).sum(dim=(2, 3))
        scores = self.dense(x)
        # One output says whether it is a digit, the others whether it is this one.
        return scores[:, 0] + scores[:, 1:].gather(1, labels[:, None])[:, 0]
