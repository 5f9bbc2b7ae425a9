"""Interprets the few pickle instructions of PyTorch's files, without executing anything.

The reader only names what pickle would import and call. It collects every name that `torch.load(weights_only=True)` would not
accept either, and then the file is refused.

Why not torch itself: a Flax or Keras user can read the file without installing torch, no object of the file is ever built,
every problem is listed at once, and tensors are read one by one. Measured with torch 2.13 on a file of 400 MiB of which one
tensor of 4 MiB is read: importing torch and `torch.load(weights_only=True)` take 9 s and 595 MiB (with `mmap=True` 8 s and
199 MiB), this reader takes 1.2 s and 19 MiB, imports included.

Source: Lib/pickletools.py of CPython for the instructions; torch/_weights_only_unpickler.py and torch/_utils.py for what
state dicts are made of.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from selfattn_core.porting.errors import PortError
from selfattn_core.porting.formats.untrusted import numpy_pickle
from selfattn_core.porting.formats.untrusted.limits import MAX_TENSORS
from selfattn_core.porting.formats.untrusted.numpy_pickle import NumpyArray, NumpyType

__all__ = ["STORAGE_DTYPES", "Storage", "Tensor", "Unpickled", "unpickle"]

STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}
_TORCH_DTYPES = {
    f"torch.{name}": name
    for name in (
        *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "uint16"),
        *("uint32", "uint64", "bool", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2"),
        *("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
}
# Names that may occur and have no meaning here. Their values are ignored.
_IGNORED = {
    "collections.Counter",
    "torch.device",
    "torch.strided",
    "torch.preserve_format",
    "torch.contiguous_format",
    "torch.channels_last",
    "torch.Generator",
    "builtins.set",
    "builtins.complex",
    "builtins.bytearray",
    "_codecs.encode",
    "torch.serialization._get_layout",
}
_PLAIN = {
    "collections.OrderedDict",
    "torch.Size",
    "torch.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.nn.parameter.Buffer",
}
# Tensors that are not plain arrays. torch reads them, and this reader does not.
_UNREAD = {
    "torch._utils._rebuild_qtensor": "quantized",
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_sparse_csr_tensor": "sparse",
    "torch._utils._rebuild_nested_tensor": "nested",
    "torch._utils._rebuild_meta_tensor_no_storage": "meta",
    "torch._utils._rebuild_wrapper_subclass": "subclassed",
    "torch._utils._rebuild_device_tensor_from_numpy": "XLA",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "XLA",
}
_REBUILD = {
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch._tensor._rebuild_from_type_v2",
}
_KNOWN = _REBUILD | _PLAIN | _IGNORED | set(_UNREAD) | set(_TORCH_DTYPES)
# Types of settings, paths, dates and numbers that training scripts and Lightning save beside the weights. No object of them is
# created: the reader names them, and looks into dictionaries.
_DICTS = {
    "collections.defaultdict",
    "easydict.EasyDict",
    "flax.core.frozen_dict.FrozenDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning_utilities.core.rank_zero.AttributeDict",
    "munch.Munch",
    "pytorch_lightning.utilities.parsing.AttributeDict",
}
_SETTINGS = {
    "argparse.Namespace",
    "builtins.frozenset",
    "builtins.object",
    "builtins.range",
    "builtins.slice",
    "collections.deque",
    "copy_reg._reconstructor",
    "copyreg._reconstructor",
    "datetime.date",
    "datetime.datetime",
    "datetime.timedelta",
    "datetime.timezone",
    "decimal.Decimal",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.nodes.AnyNode",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib.PureWindowsPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
    "types.SimpleNamespace",
    "typing.Any",
    "uuid.UUID",
}
_BUILTIN_TYPES = {
    f"builtins.{name}" for name in ("bool", "bytes", "dict", "float", "int", "list", "str", "tuple")
}
_NUMPY = (
    numpy_pickle.ARRAYS
    | numpy_pickle.BUFFERS
    | numpy_pickle.SCALARS
    | {numpy_pickle.DTYPE, numpy_pickle.JAX, "numpy.ndarray"}
)
_ML_DTYPES = {f"ml_dtypes.{name}" for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")}
_KNOWN |= _DICTS | _SETTINGS | _BUILTIN_TYPES | _NUMPY | _ML_DTYPES
_NESTED = "torch.storage._load_from_bytes"
_MARK = object()
_MAX_OPERATIONS = 10 * MAX_TENSORS


@dataclass(frozen=True)
class Storage:
    """A run of numbers in the file.

    Args:
        key: its name in the file.
        dtype: the dtype of its numbers.
        numel: the number of elements according to the pickle.
    """

    key: str
    dtype: str
    numel: int


@dataclass(frozen=True)
class Tensor:
    """A view of a storage, counted in numbers, not in bytes. `unread` is the reason if it cannot be read."""

    storage: Storage
    offset: int
    shape: tuple[Any, ...]
    stride: tuple[Any, ...]
    dtype: str
    unread: str = ""


@dataclass(frozen=True)
class _Name:
    name: str


@dataclass
class _Ignored:
    """A value that is ignored."""

    name: str = ""


@dataclass
class Unpickled:
    """The content of a pickle.

    Args:
        value: dicts, lists, tuples, strings, numbers, `Tensor` and `NumpyArray`.
        blocked: names that would have been imported and that no state dict needs.
        storages: every storage that the pickle refers to, by its name in the file.
        states: dicts with the state that was set on them, for example PyTorch's versions of modules.
        settings: names of types of settings and similar types, whose objects are not created.
    """

    value: Any = None
    blocked: list[str] = field(default_factory=list)
    storages: dict[str, Storage] = field(default_factory=dict)
    states: list[tuple[dict[Any, Any], Any]] = field(default_factory=list)
    settings: dict[str, None] = field(default_factory=dict)


def unpickle(file: BinaryIO | bytes) -> Unpickled:
    """Read one pickle without executing anything.

    Args:
        file: the pickle. No byte after the pickle is read.

    Raises:
        PortError: if it is not a pickle, is damaged, or does something that no checkpoint does. The caller adds the path.

    Example:
        >>> import pickle
        >>> unpickle(pickle.dumps({"epoch": 3}, protocol=2)).value
        {'epoch': 3}
        >>> unpickle(pickle.dumps(print)).blocked
        ['builtins.print']
    """
    machine = _Machine()
    try:
        for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
            if count > _MAX_OPERATIONS:
                raise PortError(f"has more than {_MAX_OPERATIONS} instructions")
            machine.run(operation.name, argument)
    except PortError:
        raise
    # pickletools and a malformed stack raise these.
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        OverflowError,
        EOFError,
    ) as error:
        raise PortError(f"is a damaged pickle ({type(error).__name__}: {str(error)[:200]})") from None
    if len(machine.stack) != 1:
        raise PortError("is a damaged pickle (its stack does not end with one value)")
    machine.result.value = machine.stack[0]
    return machine.result


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.result = Unpickled()

    def run(self, operation: str, argument: Any) -> None:
        if operation in _CONSTANTS:
            self.stack.append(_CONSTANTS[operation]())
        elif operation in _LITERALS:
            self.stack.append(argument)
        elif operation in _STACK:
            _STACK[operation](self)
        elif operation in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[int(argument)] = self.stack[-1]
        elif operation in ("BINGET", "LONG_BINGET", "GET"):
            self.stack.append(self.memo[int(argument)])
        elif operation == "GLOBAL":
            self.name(*argument.split(" ", 1))
        elif operation == "PERSID":
            self.stack.append(argument)
            self.persistent()
        elif operation not in ("PROTO", "FRAME", "STOP"):
            raise PortError(f"uses the pickle instruction {operation}, which no state dict needs")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise PortError("is a damaged pickle (a mark where a value should be)")
        return value

    def pop_mark(self) -> list[Any]:
        place = len(self.stack) - 1
        while self.stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise PortError("is a damaged pickle (a mark is missing)")
        values = self.stack[place + 1 :]
        del self.stack[place:]
        return values

    def name(self, module: str, name: str) -> None:
        full = f"{module.replace('__builtin__', 'builtins')}.{name}"
        storage = module in ("torch", "torch.storage", "torch.cuda") and name in STORAGE_DTYPES
        if not storage and full not in _KNOWN and full not in self.result.blocked:
            self.result.blocked.append(full)
        if full in _DICTS or full in _SETTINGS:
            self.result.settings[full] = None
        self.stack.append(_Name(full))

    def stack_name(self) -> None:
        name, module = self.pop(), self.pop()
        self.name(str(module), str(name))

    def persistent(self) -> None:
        identity = self.pop()
        if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
            raise PortError(f"refers to {str(identity)[:80]}, expected a storage")
        kind, key, numel = identity[1], identity[2], identity[4]
        name = kind.name.rpartition(".")[2] if isinstance(kind, _Name) else ""
        if name.startswith(("QInt", "QUInt")):
            raise PortError(
                f"holds quantised numbers ({name}); in torch call dequantize() on its tensors, and save them again"
            )
        if name not in STORAGE_DTYPES or type(numel) is not int or numel < 0:
            raise PortError(
                f"refers to a storage of kind {name or str(kind)[:80]} and length {str(numel)[:40]}"
            )
        if len(identity) > 5 and identity[5] is not None:
            raise PortError(
                "holds a view of a storage, as torch wrote before 0.4; load it there and save it again"
            )
        storage = Storage(str(key), STORAGE_DTYPES[name], numel)
        if self.result.storages.setdefault(storage.key, storage) != storage:
            raise PortError(f"refers to the storage {storage.key[:80]} as two different ones")
        self.stack.append(storage)

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        name = function.name if isinstance(function, _Name) else ""
        if not isinstance(arguments, tuple):
            raise PortError("is a damaged pickle (a call without arguments)")
        if name in _UNREAD:
            self.stack.append(Tensor(Storage("", "uint8", 0), 0, (), (), "uint8", _UNREAD[name]))
        elif name in _REBUILD:
            self.stack.append(_rebuild(name, arguments))
        elif name in _MADE:
            self.stack.append(_MADE[name](arguments))
        else:
            self.stack.append(_Ignored(name))

    def build(self) -> None:
        state = self.pop()
        if isinstance(self.stack[-1], NumpyArray | NumpyType):
            self.stack[-1].set_state(state)
        elif isinstance(self.stack[-1], dict):
            self.result.states.append((self.stack[-1], state))

    def set_items(self, flat: list[Any]) -> None:
        target = self.stack[-1]
        if len(flat) % 2:
            raise PortError("is a damaged pickle (a key without a value)")
        if isinstance(target, dict):
            _fill(target, zip(flat[::2], flat[1::2], strict=True))
        elif not isinstance(target, _Ignored):
            raise PortError("is a damaged pickle (items of something that has none)")

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, _Ignored):
            raise PortError("is a damaged pickle (elements of something that has none)")


def _pairs(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    if arguments:
        _fill(result, ((pair[0], pair[1]) for pair in arguments[0]))
    return result


def _settings(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    return dict(arguments[0]) if arguments and isinstance(arguments[0], dict) else {}


def _dtype(arguments: tuple[Any, ...]) -> NumpyType:
    code = arguments[0]
    return numpy_pickle.type_of(code.name if isinstance(code, _Name) else code)


def _encoded(arguments: tuple[Any, ...]) -> Any:
    """Bytes in the form of protocols before 3."""
    plain = arguments[1:] in (("latin1",), ("latin-1",))
    return arguments[0].encode("latin-1") if plain else _Ignored("_codecs.encode")


# The results of the known calls, computed from their arguments only.
_MADE: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": _pairs,
    "torch.Size": lambda arguments: tuple(arguments[0]),
    "_codecs.encode": _encoded,
    "builtins.bytes": lambda arguments: _Ignored("builtins.bytes") if arguments else b"",
    numpy_pickle.DTYPE: _dtype,
    numpy_pickle.JAX: lambda arguments: numpy_pickle.from_state(arguments[2]),
    **dict.fromkeys(_DICTS, _settings),
    **dict.fromkeys(numpy_pickle.ARRAYS, lambda _: NumpyArray()),
    **dict.fromkeys(numpy_pickle.BUFFERS, numpy_pickle.from_buffer),
}


def _fill(target: dict[Any, Any], pairs: Any) -> None:
    for key, value in pairs:
        # Only keys that hash quickly. A hostile nested tuple can take for ever.
        if not isinstance(key, str | int | float | bytes | None):
            raise PortError(f"has a dict with a key of type {type(key).__name__}, expected names")
        if key in target:
            raise PortError(f"holds the key {str(key)[:200]!r} twice, so it is unclear which one counts")
        target[key] = value


def _rebuild(name: str, arguments: tuple[Any, ...]) -> Tensor:
    if name == "torch._tensor._rebuild_from_type_v2":
        # A subclass around the function that makes the tensor. It is plain, or its name was blocked.
        function, arguments = arguments[0], arguments[2]
        name = function.name if isinstance(function, _Name) else ""
        if name in _UNREAD or name not in _REBUILD:
            return Tensor(Storage("", "uint8", 0), 0, (), (), "uint8", _UNREAD.get(name, "subclassed"))
    if name.startswith("torch._utils._rebuild_parameter"):
        if not isinstance(arguments[0], Tensor):
            raise PortError("holds a parameter that is not a tensor")
        return arguments[0]
    storage, offset, shape, stride = arguments[:4]
    if isinstance(storage, _Ignored) and storage.name == _NESTED:
        raise PortError(
            "is a plain pickle of tensors, not a file in torch's own format. Load it with pickle.load in the code that wrote it, and "
            "save the result with torch.save"
        )
    if not isinstance(storage, Storage):
        raise PortError("holds a tensor without a storage")
    dtype = storage.dtype
    if name.endswith("_v3"):
        dtype = _TORCH_DTYPES.get(getattr(arguments[6], "name", ""), "unknown")
    if not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise PortError("holds a tensor whose shape is not a tuple")
    return Tensor(storage, offset, shape, stride, dtype)


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": _Ignored,
    "MARK": lambda: _MARK,
}
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}


def _tuple(machine: _Machine, size: int) -> None:
    values = tuple(machine.pop() for _ in range(size))
    machine.stack.append(values[::-1])


def _ignore_set(machine: _Machine) -> None:
    machine.pop_mark()
    machine.stack.append(_Ignored())


def _set_item(machine: _Machine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


def _dict(machine: _Machine) -> None:
    flat = machine.pop_mark()
    machine.stack.append({})
    machine.set_items(flat)


_STACK: dict[str, Callable[[_Machine], Any]] = {
    "TUPLE": lambda m: m.stack.append(tuple(m.pop_mark())),
    "TUPLE1": lambda m: _tuple(m, 1),
    "TUPLE2": lambda m: _tuple(m, 2),
    "TUPLE3": lambda m: _tuple(m, 3),
    "LIST": lambda m: m.stack.append(m.pop_mark()),
    "DICT": _dict,
    "FROZENSET": _ignore_set,
    "ADDITEMS": lambda m: m.pop_mark(),
    "APPEND": lambda m: m.append([m.pop()]),
    "APPENDS": lambda m: m.append(m.pop_mark()),
    "SETITEM": _set_item,
    "SETITEMS": lambda m: m.set_items(m.pop_mark()),
    "POP": lambda m: m.stack.pop(),
    "POP_MARK": lambda m: m.pop_mark(),
    "DUP": lambda m: m.stack.append(m.stack[-1]),
    "MEMOIZE": lambda m: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    "STACK_GLOBAL": _Machine.stack_name,
    "BINPERSID": _Machine.persistent,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.reduce,
    "BUILD": _Machine.build,
}
