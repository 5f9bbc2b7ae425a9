"""What each framework says about its devices, and the counters that it keeps of their memory."""

import types

import pytest

from selfattn_core.conformance.questions.peak_memory import PeakUnknownError
from selfattn_ops.devices import hosts


class Counter:
    """As `torch.cuda` counts: `call` takes 50 bytes more for a while, of 100 that there are; an earlier peak was 900."""

    peak, current = 900, 100

    def synchronize(self, device):
        self.device = device

    def reset_peak_memory_stats(self, device):
        self.peak = self.current

    def memory_allocated(self, device):
        return self.current

    def max_memory_allocated(self, device):
        return self.peak

    def call(self):
        self.peak = max(self.peak, self.current + 50)


def test_torch_counts(monkeypatch):
    from selfattn_ops.devices import torch as devices

    for kind in ("cuda", "xpu"):
        counter = Counter()
        monkeypatch.setattr(devices.torch, kind, counter)
        assert devices.peak_memory(counter.call, f"{kind}:1") == 50
        assert counter.device == f"{kind}:1"
    with pytest.raises(PeakUnknownError, match="mps:0"):
        devices.peak_memory(lambda: pytest.fail("called"), "mps:0")
    assert devices.peak_memory(lambda: None, "cpu:0") < 2**26


def test_jax_counts(monkeypatch):
    from selfattn_ops.devices import jax as devices

    stats = {"bytes_in_use": 100, "peak_bytes_in_use": 120}
    card = types.SimpleNamespace(platform="gpu", id=1, memory_stats=lambda: dict(stats))
    monkeypatch.setattr(devices, "_of_kind", lambda kind: [card] if kind == "gpu" else [])
    assert devices.peak_memory(lambda: stats.update(peak_bytes_in_use=150), "gpu:1") == 50
    with pytest.raises(PeakUnknownError, match="stayed below an earlier peak"):
        devices.peak_memory(lambda: None, "gpu:1")
    card.memory_stats = lambda: None
    with pytest.raises(PeakUnknownError, match="keeps no peak"):
        devices.peak_memory(lambda: pytest.fail("called"), "gpu:1")


def test_tensorflow_counts(monkeypatch):
    from selfattn_ops.devices import tensorflow as devices

    found = {"current": 100, "peak": 900}
    counters = types.SimpleNamespace(
        reset_memory_stats=lambda _: found.update(peak=found["current"]),
        get_memory_info=lambda name: dict(found) if name == "GPU:1" else {},
    )
    monkeypatch.setattr(devices.tf.config, "experimental", counters)
    assert devices.peak_memory(lambda: found.update(peak=150), "gpu:1") == 50


@pytest.mark.parametrize("framework", ["torch", "jax", "tensorflow"])
def test_the_cpu_is_there(framework):
    devices = pytest.importorskip(f"selfattn_ops.devices.{framework}")
    found = devices.devices()
    assert found["cpu"][0] == "cpu:0"
    assert devices.about("cpu:0")["model"] == hosts.processor()


def test_words_of_cards(monkeypatch):
    """A card of JAX's has two words and one name."""
    from selfattn_ops.devices import jax as devices

    card = types.SimpleNamespace(platform="gpu", id=0)
    monkeypatch.setattr(
        devices.jax, "local_devices", lambda backend: [card] if backend in ("gpu", "cuda") else []
    )
    found = devices.devices()
    assert found == {"cpu": (), "gpu": ("gpu:0",), "cuda": ("gpu:0",), "rocm": (), "tpu": ()}


def test_torch_names_a_card(monkeypatch):
    from selfattn_ops.devices import torch as devices

    monkeypatch.setattr(devices.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(devices.torch.cuda, "get_device_name", lambda device: f"A card at {device}")
    monkeypatch.setattr(devices.torch.version, "cuda", "12.9")
    monkeypatch.setattr(devices, "nvidia_driver", lambda: "580.1")
    assert devices.devices()["cuda"] == ("cuda:0", "cuda:1")
    assert devices.about("cuda:1") == {"model": "A card at cuda:1", "driver": "580.1, CUDA 12.9"}


@pytest.mark.parametrize("framework", ["torch", "jax", "tensorflow"])
def test_a_backend_with_a_beginning_of_its_own_notes_places(framework):
    devices = pytest.importorskip(f"selfattn_ops.devices.{framework}")

    class Backend(devices.OnDevices):
        def __init__(self):
            """No word of what is above it."""

    one, other = Backend(), Backend()
    zeros = {
        "torch": lambda: devices.torch.zeros(2),
        "jax": lambda: devices.jnp.zeros(2),
        "tensorflow": lambda: devices.tf.zeros(2),
    }[framework]()
    one.noted(zeros)
    assert (other.places(), one.places(), one.places()) == (set(), {"cpu:0"}, set())
