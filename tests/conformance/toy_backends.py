"""Backends for testing the kit: the spec with the protocol, and variants that break the protocol.

Tests name them "module:Class", as users name their own backends. The mutants of the kit cover wrong answers.
"""

import atexit
import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from selfattn_core import spec
from selfattn_core.conformance.questions import peak_memory
from selfattn_core.conformance.verdicts import product_formats


class Good:
    name = "good"

    def versions(self):
        return {"toy": "1"}

    def claims(self):
        return frozenset({"forward", "map", "vjp", "r1", "params"})

    def layouts(self):
        return ("channels_last",)

    def build(self, config, params, dtype, layout):
        return config, {name: array.astype(dtype) for name, array in params.items()}

    def forward(self, model, x):
        with np.errstate(all="ignore"):
            return spec.forward(*model, x)

    def attention_map(self, model, x):
        return spec.attention_map(*model, x)

    def vjp(self, model, x, dy):
        return spec.vjp(*model, x, dy)

    def r1(self, model, x, w):
        return spec.r1(*model, x, w)

    def params(self, model):
        return model[1]


class WrongShape(Good):
    def forward(self, model, x):
        return super().forward(model, x)[:, :1]


class Stretched(Good):
    """Two gigabytes of a view on one sample, of which no byte may reach the disk."""

    def forward(self, model, x):
        y = super().forward(model, x)
        return np.broadcast_to(y[:1], (2**19, *y.shape[1:]))


class StretchedExtra(Good):
    """The same under a name that nobody asked for."""

    def vjp(self, model, x, dy):
        return {**super().vjp(model, x, dy), "extra": np.broadcast_to(dy[:1], (2**19, *dy.shape[1:]))}


class WrongDtype(Good):
    def forward(self, model, x):
        return super().forward(model, x).astype(np.float16)


class Complex(Good):
    def forward(self, model, x):
        return super().forward(model, x).astype(np.complex64)


class Integers(Good):
    def forward(self, model, x):
        return super().forward(model, x).astype(int)


class NotANumber(Good):
    def forward(self, model, x):
        return super().forward(model, x) * np.nan


class Objects(Good):
    def forward(self, model, x):
        return super().forward(model, x).astype(object)


class Lists(Good):
    def forward(self, model, x):
        return super().forward(model, x).tolist()


class Nothing(Good):
    def forward(self, model, x):
        return None


class NoMapping(Good):
    def vjp(self, model, x, dy):
        return list(super().vjp(model, x, dy).values())


class WrongNames(Good):
    def vjp(self, model, x, dy):
        return {name.replace("kernel", "weight"): value for name, value in super().vjp(model, x, dy).items()}


class Raises(Good):
    def forward(self, model, x):
        raise RuntimeError("a bug in here")


class Talks(Good):
    def forward(self, model, x):
        print("hello " * 1000)  # noqa: T201 - a backend may print
        sys.stderr.write("noise\n")
        return super().forward(model, x)


class Dies(Good):
    def attention_map(self, model, x):
        os.kill(os.getpid(), signal.SIGSEGV)


class EndsItsParent(Good):
    def forward(self, model, x):
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(60)


class Leaves(Good):
    def attention_map(self, model, x):
        os._exit(9)


class LeavesCalmly(Good):
    def attention_map(self, model, x):
        os._exit(0)


class Hangs(Good):
    def attention_map(self, model, x):
        time.sleep(600)


class LeavesAtOnce(Good):
    def __init__(self):
        os._exit(0)


class InferenceOnly:
    """The smallest possible backend."""

    name = "inference"

    def versions(self):
        return {}

    def claims(self):
        return frozenset({"forward"})

    def layouts(self):
        return ("channels_last",)

    def build(self, config, params, dtype, layout):
        return config, params

    def forward(self, model, x):
        with np.errstate(all="ignore"):
            return spec.forward(*model, x)


class Core(InferenceOnly):
    def claims(self):
        return frozenset({"forward", "map"})

    def attention_map(self, model, x):
        return spec.attention_map(*model, x)


class NeverAnswers(InferenceOnly):
    """Never answers, and keeps writing to a file to show that it lives."""

    def forward(self, model, x):
        while True:
            if "TOY_BEATS" in os.environ:
                with Path(os.environ["TOY_BEATS"]).open("a", encoding="utf-8") as file:
                    file.write(f"{os.getpid()}\n")
            time.sleep(0.05)


class NeverStarts(NeverAnswers):
    """Its import takes for ever."""

    def __init__(self):
        self.forward(None, None)


class ClaimsNothing(Core):
    def claims(self):
        return frozenset()


class DeclinesAll(Core):
    def declines(self, config):
        return f"no {config.channels} channels today"


class ChannelsFirst(Core):
    def layouts(self):
        return ("channels_first",)


class SinglePrecision(Core):
    def dtypes(self):
        return ("float32",)


class Frugal(InferenceOnly):
    """Attends in blocks of query rows, so that its memory is linear. It computes flat layers."""

    keys = slice(None)

    def claims(self):
        return frozenset({"forward", "memory"})

    def forward(self, model, x):
        config, params = model
        rows = x.reshape(len(x), -1, config.channels)
        q, k, v = (
            rows @ params[f"{name}.kernel"] + params.get(f"{name}.bias", 0)
            for name in ("query", "key", "value")
        )
        k, v = k[:, self.keys], v[:, self.keys]
        blocks = []
        for first in range(0, rows.shape[1], 256):
            weights = np.exp(q[:, first : first + 256] @ k.mT)
            blocks.append(weights @ v / weights.sum(axis=-1, keepdims=True))
        return (params["gamma"] * np.concatenate(blocks, axis=1) + rows).reshape(x.shape)


class FrugalWithKeys(Frugal):
    """The same, with the first 4,096 keys only."""

    keys = slice(4096)


class NeverForgets(Frugal):
    """Simulates a system that cannot reset the peak of a process."""

    def __init__(self):
        peak_memory._RESET = Path(__file__) / "clear_refs"

    def claims(self):
        return frozenset({"forward", "memory", "vjp", "r1"})

    vjp, r1 = Good.vjp, Good.r1


class KnownFailure(NotANumber):
    def expected_failures(self):
        return {"SA-FWD-001": ("it divides by zero", "https://example.org/1")}


class KnownCrash(Dies):
    def expected_failures(self):
        return {"SA-MAP-001": ("it is slow", "https://example.org/1")}


class StaleFailure(Good):
    def expected_failures(self):
        return {"SA-FWD-001/float64": ("it divided by zero", "https://example.org/1")}


class UnknownFailure(Good):
    def expected_failures(self):
        return {"SA-XYZ-001": ("no such case", "https://example.org/1"), "SA-FWD-001": "no link"}


class UnclaimedFailure(Good):
    def expected_failures(self):
        why = ("nobody would ever know", "https://example.org/1")
        return dict.fromkeys(("SA-FWD-001/float23", "SA-CMP-001", "SA-FWD-001/float32/channels_first"), why)


class Lacking(InferenceOnly):
    def claims(self):
        return frozenset({"forward", "map"})


class Boastful(InferenceOnly):
    def claims(self):
        return frozenset({"forward", "telepathy"})


class Placeless(InferenceOnly):
    def layouts(self):
        return ()


class Formless(Core):
    """Every attribute has a wrong type."""

    name = None
    forward = 3
    update = "later"

    def versions(self):
        return None

    def claims(self):
        return ("forward",)

    def layouts(self):
        return "channels_last"

    def dtypes(self):
        return "float32"

    def expected_failures(self):
        return ["SA-FWD-001"]


class ClaimsAWord(Core):
    def claims(self):
        return "forward"


class ClaimsNone(Core):
    def claims(self):
        return None


class ClaimsAttribute(Core):
    claims = ("forward",)


class ClaimsOfSomething(Core):
    def claims(self, what):
        return frozenset({"forward", what})


class ClaimsMixed(Core):
    def claims(self):
        return ["forward", 3, ["map"]]


class ExpectsNumber(Lacking):
    def expected_failures(self):
        return {3: ("why", "where")}


class Configured(Core):
    def __init__(self, path, *, device, size=3):
        self.path, self.device, self.size = path, device, size


def configured(path):
    return Configured(path, device="any")


class Generous(Core):
    """Returns other types than tuples, and has methods with optional arguments."""

    declines = update = eager = None

    def __init__(self, *args, size=3, **kwargs):
        self.size = size

    def claims(self):
        return iter(["forward", "map"])

    def layouts(self):
        return {"channels_last": 1}

    def expected_failures(self):
        return {}


class Surroundings(InferenceOnly):
    """Reports its environment variables as versions, and writes the ids of its processes to a file."""

    def __init__(self):
        if "TOY_PROCESSES" in os.environ:
            with Path(os.environ["TOY_PROCESSES"]).open("a", encoding="utf-8") as file:
                file.write(f"{os.getpid()}\n")

    def versions(self):
        names = ("OMP_NUM_THREADS", "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_X64")
        return {name: os.environ[name] for name in names if name in os.environ}


class Exclusive(Good):
    """For a second after its start it holds a resource that only one process can have, such as a device."""

    def __init__(self):
        lock = Path(os.environ["TOY_LOCK"])
        lock.touch(exist_ok=False)
        atexit.register(lock.unlink)
        time.sleep(1)


class SaysMemory(Good):
    def forward(self, model, x):
        raise peak_memory.PeakUnknownError("forward")


class OnTwo(Good):
    """Computes in numpy, and reports the requested device as the place of its answers."""

    def __init__(self):
        self.device = ""

    def claims(self):
        return frozenset({*super().claims(), "memory", "shipped"})

    def devices(self):
        return {"cpu": ("cpu:0", "cpu:1"), "toy": ("toy:0",), "card": ()}

    @contextlib.contextmanager
    def on(self, device):
        self.device = device
        yield {"model": "A processor", "driver": "7"}
        self.device = ""

    def places(self):
        return {self.device}

    def peak_memory(self, call):
        call()
        return 1000 if self.device == "toy:0" else 2**40

    def default_products(self, left, right):
        return {
            "matrix product": product_formats.kept_bits(left, "tf32")
            @ product_formats.kept_bits(right, "tf32")
        }


class Strays(OnTwo):
    def places(self):
        return {"cpu:0"}


class Silent(OnTwo):
    def places(self):
        return frozenset()


class NoProducts(OnTwo):
    def default_products(self, left, right):
        raise NotImplementedError("no such product here")


class CoarseProducts(OnTwo):
    def default_products(self, left, right):
        return {"matrix product": 1.5 * (left @ right)}


class DiesOfProducts(OnTwo):
    def default_products(self, left, right):
        sys.stderr.write("an illegal instruction\n")
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGKILL)


class HangsInProducts(OnTwo):
    def default_products(self, left, right):
        time.sleep(600)


class DiesAsShipped(OnTwo):
    """In the process of the family "shipped", the variables for full precision are not set."""

    def __init__(self):
        super().__init__()
        if "NVIDIA_TF32_OVERRIDE" not in os.environ:
            os._exit(7)


class RunsOut(OnTwo):
    """Its device has no memory for a map of all positions."""

    def attention_map(self, model, x):
        raise MemoryError(f"{self.device}: out of memory")


class WithoutPlaces(Good):
    def devices(self):
        return {"cpu": ("cpu:0",)}


class NoPlaces(OnTwo):
    places = None


class NowhereToGo(OnTwo):
    """Has None for the three methods of a device."""

    devices = on = places = None


class NamesAreAWord(OnTwo):
    def devices(self):
        return {"cpu": "cpu:0", "toy": ("toy:0",), "card": (0, 1)}
