"""One of several processes that share the rows of a map: `python rows.py RANK WORLD STORE NAME…`.

Prints a line of JSON: what each named function of this file answers. Errors are the largest difference from one process on
the whole map, over the largest number.
"""

import copy
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from selfattn_torch import SelfAttention2d
from selfattn_torch.parallel import RowParallel, attend_rows, check_replicas

RANK, WORLD = int(sys.argv[1]), int(sys.argv[2])
WIDTH = 5


def layer_of(**options: Any) -> SelfAttention2d:
    """A layer on which no term of the function vanishes, the same in every process."""
    torch.manual_seed(1)
    layer = SelfAttention2d(6, 2, 4, out_projection=True, **options).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0.1, 0.6)
    for child in layer.children():
        if options.get("spectral_norm"):
            child.reset_state()
    return layer


def maps_of(height: int) -> tuple[torch.Tensor, torch.Tensor]:
    """X and w (B, C, H, W), the same in every process. Half of all numbers of x are equal, so that windows have ties."""
    torch.manual_seed(2)
    x = torch.randn(2, 6, height, WIDTH, dtype=torch.float64)
    return torch.where(torch.rand(1, 1, height, WIDTH) < 0.5, x[:, :, :1, :1], x), torch.randn_like(x)


def step(
    call: Callable[[torch.Tensor], torch.Tensor], layer: nn.Module, x: torch.Tensor, w: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The output, its gradient, and the gradients of a loss with an R1 penalty."""
    x = x.detach().requires_grad_()
    y = call(x)
    (dx,) = torch.autograd.grad((y * w).sum(), x, create_graph=True)
    loss = (y * w).sum() + 0.3 * dx.square().sum()
    names = dict(layer.named_parameters())
    gradients = torch.autograd.grad(loss, [x, *names.values()])
    return {"y": y, "dx": dx} | dict(zip(("x", *names), gradients, strict=True))


def largest_error(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """Over all quantities, each relative to its largest number, and gradients of parameters to the largest of all."""
    scale = max(tensor.abs().max() for name, tensor in want.items() if name not in ("y", "dx", "x"))
    errors = []
    for name, tensor in want.items():
        other = got[name].full_tensor() if isinstance(got[name], DTensor) else got[name]
        assert other.shape == tensor.shape
        size = tensor.abs().max() if name in ("y", "dx", "x") else scale
        errors.append((other - tensor).abs().max() / size)
    return torch.stack(errors).max().item()


def own(maps: torch.Tensor, heights: Sequence[int]) -> torch.Tensor:
    start = sum(heights[:RANK])
    return maps[:, :, start : start + heights[RANK]]


def summed(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The rows of all processes, and the sums of shares."""
    whole = {}
    for name, tensor in found.items():
        if name in ("y", "dx", "x"):
            parts: list[Any] = [None] * WORLD
            dist.all_gather_object(parts, tensor.detach())
            whole[name] = torch.cat(parts, 2)
        else:
            whole[name] = tensor.detach().clone()
            dist.all_reduce(whole[name])
    return whole


def divisions() -> list[tuple[int, ...]]:
    """Heights of the processes: equal and even, unequal, with one row each, and with none in the first and the last."""
    rest = (0,) * (WORLD - 2)
    return [(2,) * WORLD, (1,) * (WORLD - 1) + (4,), (0, *rest, 7), (3, *rest, 4), (7, *rest, 0)]


def splits() -> dict[str, float]:
    """Every division, with and without pooling."""
    found = {}
    for heights in divisions():
        x, w = maps_of(sum(heights))
        for pool in (1, 2, 3):
            for kv in ("gather", "stream"):
                # In blocks and at once, alternately.
                layer = layer_of(kv_pool=pool, block_size=4 if pool == 2 else None, spectral_norm=pool == 3)
                alone, given = copy.deepcopy(layer), None if pool == 2 else heights
                got = step(
                    lambda x, kv=kv, layer=layer, given=given: attend_rows(layer, x, kv=kv, heights=given),
                    layer,
                    own(x, heights),
                    own(w, heights),
                )
                found[f"{heights} {pool} {kv}"] = largest_error(summed(got), step(alone, alone, x, w))
    return found


def maps() -> dict[str, Any]:
    """The rows of the map of this process, and x without a batch."""
    layer, (x, _), heights = layer_of(kv_pool=2), maps_of(2 * WORLD + 1), (2,) * (WORLD - 1) + (3,)
    (_, want), start = layer(x, need_weights=True), sum(heights[:RANK]) * WIDTH
    want = want[:, start : start + heights[RANK] * WIDTH]
    found = {}
    for kv in ("gather", "stream"):
        y, attention = attend_rows(layer, own(x, heights), kv=kv, need_weights=True)
        found[kv] = max(
            (attention - want).abs().max().item(), (y - own(layer(x), heights)).abs().max().item()
        )
        single, row = attend_rows(layer, own(x, heights)[0], kv=kv, need_weights=True)
        found[f"{kv}, no batch"] = [list(single.shape), list(row.shape)]
    return found


class Communicated(TorchDispatchMode):
    """Counts collectives, and the bytes of what this process gives or gets, whichever is more."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if "c10d" in function.namespace and "wait" not in str(function) and "wrap" not in str(function):
            leaves = tree_leaves((args, result))
            entry = self.found.setdefault(function.overloadpacket.__name__, [0, 0])
            entry[0] += 1
            entry[1] += max(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))
        return result


def collectives() -> dict[str, Any]:
    """What is communicated in forward, first and second derivative."""
    found = {}
    for name, heights, pool, kv in (
        ("even", (2,) * WORLD, 1, "gather"),
        ("pooled", (2,) * WORLD, 2, "gather"),
        ("cut", (3,) * WORLD, 2, "gather"),
        ("stream", (2,) * WORLD, 1, "stream"),
    ):
        layer, (x, _) = layer_of(kv_pool=pool), maps_of(sum(heights))
        given = own(x, heights).requires_grad_()
        with Communicated() as forward:
            y = attend_rows(layer, given, kv=kv, heights=heights)
        with Communicated() as first:
            (dx,) = torch.autograd.grad(y.sum(), given, create_graph=True)
        with Communicated() as second:
            dx.square().sum().backward()
        with Communicated() as undeclared:
            attend_rows(layer, given, kv=kv)
        found[name] = [each.found for each in (forward, first, second, undeclared)]
    return found


def distributed_tensors() -> dict[str, Any]:
    """DTensors sharded along H or B, with parameters that are tensors or DTensors."""
    found: dict[str, Any] = {}
    mesh = init_device_mesh("cpu", (WORLD,))
    for pool in (1, 2):
        layer, (x, w) = layer_of(kv_pool=pool), maps_of(2 * WORLD - 1)
        want = step(layer, layer, x, w)
        for placement in (Shard(2), Shard(0), Replicate()):
            for replicated in (True, False):
                twin = copy.deepcopy(layer)
                twin = distribute_module(twin, mesh) if replicated else twin
                given = [distribute_tensor(each, mesh, [placement]) for each in (x, w)]
                got = step(twin, twin, *given)
                assert got["y"].placements == (placement,)
                for name, tensor in got.items() if not replicated and placement.is_shard() else ():
                    if name not in ("y", "dx", "x"):
                        # Gradients of joined kernels share their memory.
                        got[name] = tensor.clone(memory_format=torch.contiguous_format)
                        dist.all_reduce(got[name])
                found[f"{placement} {pool} {replicated}"] = largest_error(got, want)
    y, attention = layer(distribute_tensor(x, mesh, [Shard(0)]), need_weights=True)
    found["map"] = [list(y.shape), list(attention.shape)]
    return found


def two_dimensions() -> dict[str, float]:
    """Data × rows, as DTensor and under DDP and FSDP2, whose loss is multiplied by the number of row shards."""
    mesh = init_device_mesh("cpu", (2, WORLD // 2), mesh_dim_names=("data", "rows"))
    shards = WORLD // 2
    x, w = maps_of(2 * shards + 1)
    heights = (3,) + (2,) * (shards - 1)
    sample, row = mesh.get_coordinate()
    start = sum(heights[:row])
    mine = [each[sample : sample + 1, :, start : start + heights[row]] for each in (x, w)]
    found = {}
    for spectral_norm in (False, True):
        critic = Critic(spectral_norm=spectral_norm)
        want = dict(zip(dict(critic.named_parameters()), critic.gradients(x, w, 1 / 2), strict=True))
        for way in ("DDP", "FSDP2"):
            model = Critic(spectral_norm=spectral_norm)
            parallelize_module(model, mesh["rows"], {"attention": RowParallel()})
            model = DistributedDataParallel(model) if way == "DDP" else fully_shard(model)
            model(*mine, float(shards)).backward()
            got = [parameter.grad for parameter in model.parameters()]
            scale = max(tensor.abs().max() for tensor in want.values())
            whole = [each.full_tensor() if isinstance(each, DTensor) else each for each in got]
            errors = [(one - other).abs().max() for one, other in zip(whole, want.values(), strict=True)]
            found[f"{way} {spectral_norm}"] = (max(errors) / scale).item()
    return found


class Critic(nn.Module):
    """Two pointwise layers around the attention. Its forward gives the loss with the penalty."""

    def __init__(self, *, spectral_norm: bool) -> None:
        super().__init__()
        self.attention = layer_of(kv_pool=2, spectral_norm=spectral_norm)
        self.first = nn.Conv2d(6, 6, 1).double()

    def forward(self, x: torch.Tensor, w: torch.Tensor, scale: float) -> torch.Tensor:
        x = x.detach().requires_grad_()
        # Of a tensor that depends on the parameters, as in a network.
        y = self.attention(torch.tanh(self.first(x)))
        (dx,) = torch.autograd.grad((y * w).sum(), x, create_graph=True)
        return scale * ((y * w).sum() + 0.3 * dx.square().sum())

    def gradients(self, x: torch.Tensor, w: torch.Tensor, scale: float) -> tuple[torch.Tensor, ...]:
        """Of one process on the whole batch."""
        twin = copy.deepcopy(self)
        return torch.autograd.grad(twin(x, w, scale), list(twin.parameters()))


def spectral_state() -> dict[str, Any]:
    """Two forward passes a step: whether u and v are equal everywhere, and what shows that they are not."""
    found: dict[str, Any] = {}
    for way in ("DDP", "DDP without buffers", "FSDP2"):
        layer, (x, _) = layer_of(spectral_norm=True), maps_of(3)
        if way == "FSDP2":
            model: Any = fully_shard(layer)
        else:
            model = DistributedDataParallel(layer, forward_sync_buffers=way == "DDP")
        adam = torch.optim.SGD(model.parameters(), 1e-2)
        for number in range(3):
            real, fake = x + RANK, x * (RANK + number)
            (model(real).square().mean() + model(fake).square().mean()).backward()
            adam.step()
            adam.zero_grad()
        found[way] = differing(layer)
        if way != "FSDP2" and RANK == 1:
            # Past the wrapper, which would wait for the others.
            layer(x)
        if way != "FSDP2":
            found[f"{way}, one call more"] = differing(layer)
            for buffer in layer.buffers():
                dist.broadcast(buffer, 0)
            found[f"{way}, broadcast"] = differing(layer)
    return found


def differing(module: nn.Module) -> str:
    """The message of `check_replicas`, or nothing."""
    try:
        check_replicas(module)
    except ValueError as error:
        return str(error)
    return ""


def meta() -> dict[str, Any]:
    """FSDP2 from the meta device."""
    # Torch says so of every random operation on DTensors of a CPU.
    warnings.filterwarnings("ignore", "DTensor random operators", UserWarning)
    torch.manual_seed(RANK)
    with torch.device("meta"):
        layer = SelfAttention2d(16, 3, 8, out_projection=True, spectral_norm=True)
    fully_shard(layer)
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    weight = layer.value.weight.full_tensor()[:, :, 0, 0]
    sigma = torch.linalg.matrix_norm(weight, 2).item()
    estimate = (layer.value.u @ weight @ layer.value.v).item()
    layer.value.refresh_state()
    exact = (layer.value.u @ layer.value.weight.full_tensor()[:, :, 0, 0] @ layer.value.v).item()
    return {
        "differs": differing(layer),
        "ratio": estimate / sigma,
        "exact": exact / sigma,
        "y": list(layer(torch.randn(1, 16, 3, 4)).shape),
    }


def compiled() -> dict[str, Any]:
    """What compiles as one graph, and what does not."""
    layer, heights = layer_of(kv_pool=2), (3,) + (2,) * (WORLD - 1)
    x, w = (own(each, heights) for each in maps_of(sum(heights)))
    found: dict[str, Any] = {}
    x = x.requires_grad_()

    def penalty(x: torch.Tensor) -> torch.Tensor:
        (dx,) = torch.autograd.grad((attend_rows(layer, x, heights=heights) * w).sum(), x, create_graph=True)
        return dx.square().sum()

    want, wanted = attend_rows(layer, x), torch.autograd.grad(penalty(x), x)[0]
    first = torch.autograd.grad((want * w).sum(), x)[0]
    # torch looks at the gradient of a tensor between two graphs, and warns of that itself.
    warnings.filterwarnings("ignore", "The .grad attribute", UserWarning)
    for kv, given in (("gather", heights), ("gather", None), ("stream", heights)):
        torch._dynamo.reset()

        def call(x: torch.Tensor, kv: Any = kv, given: Any = given) -> torch.Tensor:
            return attend_rows(layer, x, kv=kv, heights=given)

        for whole in (True, False):
            name = f"{kv} {given is not None} {whole}"
            try:
                y = torch.compile(call, backend="aot_eager", fullgraph=whole)(x)
                found[name] = ((y - want).abs().max() / want.abs().max()).item()
                (dx,) = torch.autograd.grad((y * w).sum(), x)
                found[name] += ((dx - first).abs().max() / first.abs().max()).item() if dx.numel() else 0
            except torch._dynamo.exc.Unsupported as error:
                found[name] = str(error)
    torch._dynamo.reset()
    torch._dynamo.config.trace_autograd_ops = True
    (dx,) = torch.autograd.grad(torch.compile(penalty, backend="aot_eager", fullgraph=True)(x), x)
    found["penalty"] = ((dx - wanted).abs().max() / wanted.abs().max()).item()
    mesh = init_device_mesh("cpu", (WORLD,))
    whole = distribute_tensor(maps_of(sum(heights))[0], mesh, [Shard(2)])
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(whole).full_tensor()
    found["DTensor"] = (y - layer(whole.full_tensor())).abs().max().item()
    return found


def refused() -> dict[str, str]:
    """The messages for what cannot be computed. Every process raises, and none waits."""
    layer, (x, _) = layer_of(kv_pool=2), maps_of(4 * WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    backwards = DeviceMesh("cpu", list(range(WORLD))[::-1])
    pair = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("data", "rows"))
    other = layer_of(kv_pool=2)
    with torch.no_grad():
        other.value.weight[0] += RANK
        other.value.bias += RANK == 1
    styled = parallelize_module(other, mesh, RowParallel())
    sharded = distribute_module(layer_of(), mesh, lambda _, module, mesh: shard_all(module, mesh))
    attempts: dict[str, Callable[[], object]] = {
        "along W": lambda: layer(distribute_tensor(x, mesh, [Shard(3)])),
        "along C": lambda: layer(distribute_tensor(x, mesh, [Shard(1)])),
        "twice": lambda: layer(distribute_tensor(x, pair, [Shard(2), Shard(2)])),
        "backwards": lambda: layer(distribute_tensor(x, backwards, [Shard(2)])),
        "style backwards": lambda: parallelize_module(layer_of(), backwards, RowParallel()),
        "sharded parameters": lambda: sharded(distribute_tensor(x, mesh, [Shard(2)])),
        "width": lambda: attend_rows(layer, x[:, :, :2, : WIDTH - RANK]),
        "dtype": lambda: attend_rows(layer.float() if RANK else layer, x.float() if RANK else x),
        "config": lambda: attend_rows(layer_of(kv_pool=1 + RANK % 2), x[:, :, :2]),
        "kv differs": lambda: attend_rows(layer, x[:, :, :2], kv="stream" if RANK else "gather"),
        "weights": lambda: styled(x[:, :, :2]),
        "heights": lambda: attend_rows(layer, x[:, :, :2], heights=(1,) * WORLD),
        "too few heights": lambda: attend_rows(layer, x[:, :, :2], heights=(2,)),
        "kv": lambda: attend_rows(layer, x, kv="ring"),
        "numpy": lambda: attend_rows(layer, x.numpy()),
        "small": lambda: attend_rows(layer, x[:, :, : 1 if RANK == 0 else 0]),
        "style of a convolution": lambda: parallelize_module(nn.Conv2d(3, 3, 1), mesh, RowParallel()),
        "style on two dimensions": lambda: parallelize_module(layer_of(), pair, RowParallel()),
        "other modules": lambda: check_replicas(layer_of(bias=bool(RANK))),
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except (ValueError, TypeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
        dist.barrier()
    return found


def shard_all(module: nn.Module, mesh: Any) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))


def styled() -> dict[str, Any]:
    """`RowParallel` in a network, copied and printed, with rows as tensors and as DTensors."""
    model = nn.Sequential(nn.Conv2d(6, 6, 1).double(), layer_of(kv_pool=2))
    for parameter in model[0].parameters():
        dist.broadcast(parameter.data, 0)
    x, _ = maps_of(2 * WORLD)
    want, mesh = model(x), init_device_mesh("cpu", (WORLD,), mesh_dim_names=("rows",))
    found: dict[str, Any] = {}
    for kv in ("gather", "stream"):
        twin = parallelize_module(copy.deepcopy(model), mesh["rows"], {"1": RowParallel(kv=kv)})
        heights = (2,) * WORLD
        for name, each in (("tensor", twin), ("copy", copy.deepcopy(twin))):
            found[f"{kv} {name}"] = (each(own(x, heights)) - own(want, heights)).abs().max().item()
        y = twin[1](distribute_tensor(model[0](x).detach(), mesh, [Shard(2)]))
        found[f"{kv} DTensor"] = (y.full_tensor() - want).abs().max().item()
        found["repr"] = repr(twin[1]).splitlines()[0]
        found["keys"] = list(twin.state_dict()) == list(model.state_dict())
    return found


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=RANK, world_size=WORLD)
    found = {name: globals()[name]() for name in sys.argv[4:]}
    print(json.dumps(found))  # noqa: T201 - the answer
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
