"""Training in PyTorch."""

import sys

import torch
from tqdm import tqdm

from examples.digits import torch_model
from examples.digits.data import Digits
from examples.digits.torch_model import Classifier

BATCH = 64
PEAK_LEARNING_RATE = 0.01


def train(digits: Digits, *, epochs: int, seed: int) -> Classifier:
    """Train a new classifier, and show its loss and gamma meanwhile.

    The number of epochs is fixed in advance, so the held-out images do not influence when the training stops.

    Args:
        digits: the training images.
        epochs: number of passes over them.
        seed: seed of the initial weights and of the order of the images.
    """
    # Such small images gain nothing from a second thread, and one thread adds in the same order on every machine.
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = Classifier()
    images, labels = torch_model.to_torch(digits.images), torch.from_numpy(digits.labels)
    steps = epochs * -(-len(digits) // BATCH)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps)
    with tqdm(total=steps, unit="step", disable=not sys.stderr.isatty(), leave=False) as bar:
        for epoch in range(epochs):
            total = 0.0
            for batch in torch.randperm(len(digits)).split(BATCH):
                loss = torch.nn.functional.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item() * len(batch)
                bar.update()
            state = f"loss {total / len(digits):.3f}, gamma {model.attention.gamma.item():+.3f}"
            bar.set_description(f"epoch {epoch + 1}/{epochs}, {state}")
            if bar.disable:
                print(f"   epoch {epoch + 1:2}/{epochs}: {state}", flush=True)
    return model
