"""A SAGAN in PyTorch, whole: R1, spectral norm, bfloat16, averaged weights, compiled losses, checkpoints that resume.

Run as `python -m examples.sagan_torch`. To train on other images, copy this file and change the networks and the batches.
Exit codes: 0 trained, 1 the training fell short or the networks of `--start` give other images, 2 wrong usage, 3 something
is not installed or the device is missing, 130 interrupted.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from examples.command import BAD_INPUT, MISSING, run
from examples.gan import files, program
from examples.gan.batches import Batch
from examples.gan.settings import CLASSES, LATENT, WIDTHS
from selfattn_core import save_blocks
from selfattn_core.conformance.execution.devices import DeviceAbsentError, DeviceUnknownError, chosen

try:
    import torch
    from torch import nn
    from torch.nn.functional import interpolate, leaky_relu, one_hot, relu
    from torch.nn.utils.parametrizations import spectral_norm
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    import selfattn_torch
    from examples.gan import loop
    from selfattn_ops.devices.torch import devices
    from selfattn_torch import SelfAttention2d
except ModuleNotFoundError as error:
    sys.exit(program.missing(error, "torch"))

Array = NDArray[Any]

STEPS = 1500
GENERATOR_RATE = 1e-3
DISCRIMINATOR_RATE = 2e-3
BETAS = (0.0, 0.99)
EPSILON = 1e-8
WEIGHT_DECAY = 1e-4
R1_WEIGHT = 1.0
"""The penalty is this weight times half the mean squared norm of the gradient of the scores of real images."""
AVERAGE_DECAY = 0.99
"""The share of the old average in the averaged weights after each step."""

_CHECKPOINT = "checkpoint.pt"


class Generator(nn.Module):
    """Maps a latent and a class to an image, through a 4×4 and an 8×8 map. Attention acts on the 8×8 map."""

    def __init__(self) -> None:
        super().__init__()
        first, attended, last = WIDTHS["first"], WIDTHS["attended"], WIDTHS["last"]
        self.dense = nn.Linear(LATENT + CLASSES, 4 * 4 * first)
        self.conv1 = nn.Conv2d(first, attended, 3, padding=1)
        self.attention = SelfAttention2d(attended, spectral_norm=True)
        self.conv2 = nn.Conv2d(attended, last, 3, padding=1)
        self.conv3 = nn.Conv2d(last, 1, 3, padding=1)

    def features(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The input of the attention layer, (B, C, 8, 8)."""
        x = self.dense(torch.cat([latents, one_hot(labels, CLASSES).to(latents)], dim=1))
        x = relu(x.unflatten(1, (4, 4, -1)).permute(0, 3, 1, 2))  # (B, C, 4, 4)
        return relu(self.conv1(interpolate(x, scale_factor=2)))

    def forward(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Images (B, 1, 8, 8), float32, of latents (B, LATENT) and labels (B,)."""
        x = self.attention(self.features(latents, labels))
        return torch.sigmoid(self.conv3(relu(self.conv2(x))).to(latents))


class Discriminator(nn.Module):
    """Maps an image and a class to a score, with spectral norm everywhere and attention in its pooled form."""

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
        """Scores (B,), float32, of images (B, 1, 8, 8) as images of these classes."""
        x = leaky_relu(self.conv1(images), 0.2)
        x = leaky_relu(self.conv2(self.attention(x)), 0.2)
        x = leaky_relu(self.conv3(x), 0.2).sum(dim=(2, 3))
        scores = self.dense(x).to(images)
        # One output scores whether the image is a digit, the others whether it is the given one.
        return scores[:, 0] + scores[:, 1:].gather(1, labels[:, None])[:, 0]


def discriminator_loss(
    generator: Generator,
    discriminator: Discriminator,
    real: torch.Tensor,
    labels: torch.Tensor,
    latents: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The hinge loss and the R1 penalty on the real images.

    The inner gradient is computed inside this function, so that compiling the function includes it. torch cannot
    differentiate a compiled function twice from outside.
    """
    scores = discriminator(real, labels)
    (gradient,) = torch.autograd.grad(scores.sum(), real, create_graph=True)
    penalty = R1_WEIGHT / 2 * gradient.square().sum(dim=(1, 2, 3)).mean()
    with torch.no_grad():
        fake = generator(latents, labels)
    return relu(1 - scores).mean() + relu(1 + discriminator(fake, labels)).mean(), penalty


def generator_loss(
    generator: Generator, discriminator: Discriminator, latents: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Minus the mean score of new images."""
    return -discriminator(generator(latents, labels), labels).mean()


class Training:
    """Both networks, their optimisers and the averaged generator.

    Args:
        generator: the generator to train.
        discriminator: the discriminator to train.
        averaged: the average of an earlier training. By default a new one, which begins with the first step.
        precision: "bfloat16" for convolutions and matrix products, or "float32".
        compiler: a backend of `torch.compile`, or "none".
        device: device of the networks. Images are moved there and back.
    """

    def __init__(
        self,
        generator: Generator,
        discriminator: Discriminator,
        averaged: Generator | None = None,
        *,
        precision: str,
        compiler: str,
        device: str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        for network in (generator, discriminator, averaged):
            if network is not None:
                network.to(self.device)
        self.generator, self.discriminator, self.step = generator, discriminator, 0
        # u and v of a spectral norm are unit vectors. Their average is shorter than 1, and sigma would be too small.
        # `use_buffers=False` averages the parameters and copies the buffers.
        self.averaged = AveragedModel(
            averaged or generator, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE_DECAY), use_buffers=False
        )
        if averaged:
            self.averaged.n_averaged += 1  # otherwise the first step would copy
        self.generator_adam = _adam(generator, GENERATOR_RATE)
        self.discriminator_adam = _adam(discriminator, DISCRIMINATOR_RATE)
        self._autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bfloat16")
        self._discriminator_loss, self._generator_loss = discriminator_loss, generator_loss
        if compiler != "none":
            # Without this, `torch.autograd.grad` breaks a compiled graph.
            torch._dynamo.config.trace_autograd_ops = True  # noqa: SLF001 - the only way to it
            self._discriminator_loss = torch.compile(discriminator_loss, fullgraph=True, backend=compiler)
            self._generator_loss = torch.compile(generator_loss, fullgraph=True, backend=compiler)

    def update(self, batch: Batch) -> dict[str, float]:
        """Make one step of each network, and return the losses and gains before it."""
        gains = {f"gamma/{name}": network.attention.gamma.item() for name, network in self._networks()}
        real = self._tensor(batch.real).permute(0, 3, 1, 2).requires_grad_()
        labels, latents = self._tensor(batch.labels), self._tensor(batch.latents)
        with self._autocast:
            hinge, penalty = self._discriminator_loss(
                self.generator, self.discriminator, real, labels, latents
            )
        self.discriminator_adam.zero_grad()
        (hinge + penalty).backward()
        self.discriminator_adam.step()

        # Its weights get no gradient here, and in evaluation mode its spectral norm does not move.
        self.discriminator.requires_grad_(False).eval()
        with self._autocast:
            loss = self._generator_loss(
                self.generator,
                self.discriminator,
                self._tensor(batch.new_latents),
                self._tensor(batch.new_labels),
            )
        self.generator_adam.zero_grad()
        loss.backward()
        self.generator_adam.step()
        self.discriminator.requires_grad_(True).train()

        self.averaged.update_parameters(self.generator)
        self.step += 1
        losses = {"loss/discriminator": hinge, "loss/penalty": penalty, "loss/generator": loss}
        return {name: value.item() for name, value in losses.items()} | gains

    @torch.no_grad()
    def generate(self, latents: Array, labels: Array) -> Array:
        """Images (B, 8, 8, 1) of the averaged generator, in float32."""
        generator = self.averaged.module.eval()
        images = generator(self._tensor(latents), self._tensor(labels))
        return images.permute(0, 2, 3, 1).cpu().numpy()

    @torch.no_grad()
    def attend(self, latents: Array, labels: Array) -> Array:
        """The map (B, 8, 8, 8, 8) of the averaged generator's attention."""
        generator = self.averaged.module.eval()
        features = generator.features(self._tensor(latents), self._tensor(labels))
        return selfattn_torch.attention_grid(generator.attention, features).cpu().numpy()

    def gain(self) -> float:
        """The gamma of that map's layer."""
        return self.averaged.module.attention.gamma.item()

    @torch.no_grad()
    def samples(self, latents: Array, labels: Array) -> files.Samples:
        """Images and the discriminator's scores of them."""
        images = self.generate(latents, labels)
        self.discriminator.eval()
        scores = self.discriminator(self._tensor(images).permute(0, 3, 1, 2), self._tensor(labels))
        self.discriminator.train()
        return files.Samples(latents, labels, images, scores.cpu().numpy())

    def save(self, folder: Path) -> None:
        """Write everything that the next step depends on."""
        beside = folder / f"{_CHECKPOINT}.partial"
        torch.save({name: part.state_dict() for name, part in self._parts()} | {"step": self.step}, beside)
        # If the training is interrupted here, the file is the old or the new one, and always complete.
        beside.replace(folder / _CHECKPOINT)

    def load(self, folder: Path) -> None:
        """Continue from the last call of `save`."""
        state = torch.load(folder / _CHECKPOINT, map_location="cpu", weights_only=True)
        self.step = state["step"]
        for name, part in self._parts():
            part.load_state_dict(state[name])

    def export(self, folder: Path) -> None:
        """Write the networks as files that every framework reads; see `examples.gan.files`."""
        networks = (self.generator, self.discriminator, self.averaged.module)
        named = dict(zip(files.BLOCKS, networks, strict=True))
        blocks = {
            name: (network.attention.config, selfattn_torch.to_canonical(network.attention))
            for name, network in named.items()
        }
        source = f"examples.sagan_torch, step {self.step}"
        save_blocks(folder / files.ATTENTION, blocks, overwrite=True, source=source)
        files.save_networks(
            folder,
            {
                name: tensor.detach().cpu().permute(*_TO_FILE[tensor.ndim]).numpy()
                for prefix, network in named.items()
                for name, tensor in _tensors(prefix, network)
            },
        )

    def _tensor(self, array: Array) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def _networks(self) -> Iterator[tuple[str, nn.Module]]:
        yield from (("generator", self.generator), ("discriminator", self.discriminator))

    def _parts(self) -> Iterator[tuple[str, Any]]:
        yield from self._networks()
        yield "averaged", self.averaged
        yield from (("generator_adam", self.generator_adam), ("discriminator_adam", self.discriminator_adam))


def _adam(network: nn.Module, rate: float) -> torch.optim.Optimizer:
    # Only kernels decay. Decay would pull gamma back to 0, where the layer does nothing.
    kernels = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in network.parameters() if parameter.ndim <= 1]
    groups = [{"params": kernels, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, rate, BETAS, EPSILON)


def networks_of(folder: Path) -> tuple[Generator, Discriminator, Generator]:
    """Generator, discriminator and averaged generator from the files that `export`, of any framework, wrote."""
    arrays = files.load_networks(folder)
    networks = Generator(), Discriminator(), Generator()
    for prefix, network in zip(files.BLOCKS, networks, strict=True):
        network.attention = selfattn_torch.load(folder / files.ATTENTION, block=prefix)
        with torch.no_grad():
            for name, tensor in _tensors(prefix, network):
                tensor.permute(*_TO_FILE[tensor.ndim]).copy_(torch.from_numpy(arrays[name]))
    return networks


_TO_FILE = {4: (2, 3, 1, 0), 3: (1, 2, 0), 2: (1, 0), 1: (0,)}
"""In the files, kernels and the vectors of their input side have the channels last."""


def _tensors(prefix: str, network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of all layers but the attention layer, by their names in the files."""
    for name in ("dense", "conv1", "conv2", "conv3"):
        layer = network.get_submodule(name)
        state = dict(layer.named_parameters()) | dict(layer.named_buffers())
        for key, tensor in state.items():
            part = {"weight": "kernel", "original": "kernel", "_u": "u", "_v": "v"}.get(
                key.rpartition(".")[2], "bias"
            )
            if part == "v":
                # Torch's own order, (C_in, height, width).
                kernel = state["parametrizations.weight.original"]
                tensor = tensor.view(kernel.shape[1:])  # noqa: PLW2901 - the same memory, to be written to
            yield f"{prefix}.{name}.{part}", tensor


def main() -> int:
    """Train and return the exit code."""
    options = program.arguments("torch", (__doc__ or "").partition("\n")[0], steps=STEPS)
    try:
        device = chosen(options.device, devices())
    except (DeviceUnknownError, DeviceAbsentError) as error:
        print(f"--device: {error}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, DeviceUnknownError) else MISSING
    if code := program.refusal(options):
        return code
    # Such small images gain nothing from a second thread.
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    networks = networks_of(options.start) if options.start else (Generator(), Discriminator())
    training = Training(*networks, precision=options.precision, compiler=options.compiler, device=device)
    return loop.train(training, options)


if __name__ == "__main__":
    run(main)
