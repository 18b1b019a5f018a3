"""A pickle read as data: its opcodes are followed, and nothing in it is imported or called.

Every name that the pickle would import is a `Name`, and every object that it would make of one a `Placeholder`, which
records how. Only what torch writes for tensors, and a few containers, become what they stand for. The opcodes are
those of Python's pickletools; the machine around them has no way to reach an attribute or a callable.
"""

from __future__ import annotations

import io
import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

from surgery import dtypes
from surgery.stored import STORAGES, Storage, StoredTensor

LARGEST = 1 << 28  # bytes of a pickle that is read: the largest models take some megabytes
_DEPTH = 40  # how deep, and how far, what lies beside the tensors is looked into
_ENTRIES = 20_000
_TEXT = 4_000


@dataclass(frozen=True, eq=False, slots=True)
class Name:
    """Something that unpickling would import."""

    path: str


@dataclass(eq=False, slots=True)
class Placeholder:
    """What stands for an object: its class or the function that would have made it, and what it would have been given.

    `entries` are what would have been set or appended, `state` what would have become its attributes.
    """

    kind: str
    arguments: tuple[Any, ...] = ()
    state: Any = None
    entries: dict[Any, Any] = field(default_factory=dict)
    items: list[Any] = field(default_factory=list)

    @property
    def attributes(self) -> Mapping[Any, Any]:
        """The state where it is of attributes, else nothing."""
        found = self.state
        if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0] or found[1], dict):
            found = {**(found[0] or {}), **(found[1] or {})}  # (attributes, slots)
        return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Content:
    """`value` is what the pickle holds; `kinds` the names in it that are not known here, which `Name` and `Placeholder`
    stand for; `storages` by their keys, in the order in which they were met."""

    value: Any
    kinds: tuple[str, ...]
    storages: Mapping[str, Storage]


def read(stream: IO[bytes]) -> Content:
    """The next pickle of a stream. Raises what `surgery.archive.DAMAGE` lists where it is none, or is cut."""
    machine = _Machine()
    value = machine.run(stream)
    return Content(value, tuple(sorted(machine.kinds)), machine.storages)


def read_bytes(content: bytes) -> Content:
    return read(io.BytesIO(content))


# ---------------------------------------------------------------------------------------------------- the machine

_CONSTANTS = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "STRING", "BINSTRING", "SHORT_BINSTRING",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE",
    "BINUNICODE8", "FLOAT", "BINFLOAT",
})  # fmt: skip
_FIXED: Mapping[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_MADE: Mapping[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list}
_IDLE = frozenset({"PROTO", "FRAME", "STOP"})


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each mark
        self.memo: dict[int, Any] = {}
        self.kinds: set[str] = set()
        self.storages: dict[str, Storage] = {}

    def run(self, stream: IO[bytes]) -> Any:
        first: int | None = None
        for opcode, argument, position in pickletools.genops(stream):
            first = position if first is None else first
            if (position or 0) - (first or 0) > LARGEST:
                raise ValueError(f"a pickle of more than {LARGEST:,} bytes")
            name = opcode.name
            if name in _CONSTANTS:
                self.stack.append(argument)
            elif name in _FIXED:
                self.stack.append(_FIXED[name])
            elif name in _MADE:
                self.stack.append(_MADE[name]())
            elif name.endswith("GET"):
                self.stack.append(self.memo[int(str(argument))])
            elif name.endswith("PUT") or name == "MEMOIZE":
                self.memo[len(self.memo) if argument is None else int(str(argument))] = self.stack[-1]
            elif name not in _IDLE:
                step = getattr(self, f"_{name.lower()}", None)
                if step is None:
                    raise ValueError(f"the opcode {name} is not for files")
                step(argument)
        return self.stack.pop()

    def _mark(self, _: Any) -> None:
        self.below.append(self.stack)
        self.stack = []

    def _marked(self) -> list[Any]:
        found, self.stack = self.stack, self.below.pop()
        return found

    def _pop(self, _: Any) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self._marked()

    def _pop_mark(self, _: Any) -> None:
        self._marked()

    def _dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    # --- containers

    def _append(self, _: Any) -> None:
        value = self.stack.pop()
        _extend(self.stack[-1], [value])

    def _appends(self, _: Any) -> None:
        items = self._marked()
        _extend(self.stack[-1], items)

    _additems = _appends

    def _list(self, _: Any) -> None:
        items = self._marked()
        self.stack.append(items)

    def _tuple(self, _: Any) -> None:
        items = self._marked()
        self.stack.append(tuple(items))

    _frozenset = _tuple

    def _tuple1(self, _: Any) -> None:
        self._join(1)

    def _tuple2(self, _: Any) -> None:
        self._join(2)

    def _tuple3(self, _: Any) -> None:
        self._join(3)

    def _join(self, count: int) -> None:
        if len(self.stack) < count:
            raise ValueError("the pickle takes more from its stack than lies there")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def _dict(self, _: Any) -> None:
        items = self._marked()
        made: dict[Any, Any] = {}
        _set(made, items)
        self.stack.append(made)

    def _setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _set(self.stack[-1], [key, value])

    def _setitems(self, _: Any) -> None:
        items = self._marked()
        _set(self.stack[-1], items)

    # --- what would import or call

    def _named(self, path: str) -> Name:
        if not _expected(path):
            self.kinds.add(path)
        return Name(path)

    def _global(self, argument: Any) -> None:
        self.stack.append(self._named(str(argument).replace(" ", ".", 1)))

    def _stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise ValueError("a name that is no text")
        self.stack.append(self._named(f"{module}.{name}"))

    def _ext1(self, argument: Any) -> None:
        self.stack.append(self._named(f"copyreg.extension_{argument}"))

    _ext2 = _ext4 = _ext1

    def _reduce(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self._called(function, arguments))

    _newobj = _reduce

    def _newobj_ex(self, _: Any) -> None:
        named, arguments, kind = self.stack.pop(), self.stack.pop(), self.stack.pop()
        made = self._called(kind, arguments)
        if isinstance(made, Placeholder) and isinstance(named, dict):
            made.state = named
        self.stack.append(made)

    def _inst(self, argument: Any) -> None:
        arguments = tuple(self._marked())
        self.stack.append(self._called(self._named(str(argument).replace(" ", ".", 1)), arguments))

    def _obj(self, _: Any) -> None:
        kind, *arguments = self._marked()
        self.stack.append(self._called(kind, tuple(arguments)))

    def _build(self, _: Any) -> None:
        state = self.stack.pop()
        # Attributes of a dict or of a tensor (a state dict's _metadata) say nothing about weights.
        if isinstance(self.stack[-1], Placeholder):
            self.stack[-1].state = state

    def _persid(self, argument: Any) -> None:
        raise ValueError(f"a reference to {argument!r:.40}, which no file of torch has")

    def _binpersid(self, _: Any) -> None:
        self.stack.append(self._persistent(self.stack.pop()))

    def _called(self, function: Any, arguments: Any) -> Any:
        if not isinstance(arguments, tuple):
            raise ValueError("a call without a tuple of arguments")
        if isinstance(function, Placeholder):  # it would call what another call gave
            return Placeholder(function.kind, (function, arguments))
        if not isinstance(function, Name):
            raise ValueError(f"a call of something of type {type(function).__name__}")
        known = _KNOWN.get(function.path)
        if known is not None:
            made = known(arguments)
            if made is not None:
                return made
        if function.path in _RECONSTRUCTORS and arguments and isinstance(arguments[0], Name):
            function, arguments = arguments[0], arguments[1:]
        return Placeholder(function.path, arguments)

    def _persistent(self, described: Any) -> Any:
        """("storage", class, key, device, elements), and in the older stream a view of one: (key, offset, elements)."""
        if not isinstance(described, tuple) or not described:
            raise ValueError("a reference that is no tuple")
        if described[0] == "module" and len(described) > 1:  # the older stream keeps a module's source beside it
            return described[1]
        if described[0] != "storage" or len(described) < 5:
            raise ValueError(f"a reference to a {described[0]!r:.40}")
        _, kind, key, _, count = described[:5]
        name = kind.path.rpartition(".")[2] if isinstance(kind, Name) else ""
        if name not in STORAGES or not isinstance(key, str) or not _whole(count):
            raise ValueError("a storage that is not described as torch describes one")
        if len(described) > 5 and described[5] is not None:
            raise ValueError("a storage that is a view of another, which is not read here")
        found = self.storages.setdefault(key, Storage(key, STORAGES[name], count))
        if (found.dtype, found.count) != (STORAGES[name], count):
            found = Storage(key, STORAGES[name], count)  # its place is checked again where it is looked for
        return found


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, Placeholder):
        target = target.items
    if not isinstance(target, list):
        raise ValueError(f"items for a {type(target).__name__}")
    target.extend(items)


def _set(target: Any, items: list[Any]) -> None:
    if isinstance(target, Placeholder):
        target = target.entries
    if not isinstance(target, dict) or len(items) % 2:
        raise ValueError(f"entries for a {type(target).__name__}")
    target.update((_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True))


_SCALARS = (str, bytes, int, float, type(None))


def _key(key: Any) -> Any:
    """A key that can be hashed at no cost: of tuples within tuples, each twice in the next, it is not so."""
    flat = key if isinstance(key, tuple) else (key,)
    return key if all(isinstance(item, _SCALARS) for item in flat) else Placeholder("key", (key,))


# ---------------------------------------------------------------------------------------------------- what is known

_RECONSTRUCTORS = ("copyreg._reconstructor", "copy_reg._reconstructor", "copyreg.__newobj__", "copy_reg.__newobj__")
_ATTRIBUTES: Mapping[str, str] = {attribute: name for name, attribute in dtypes.attributes() if name != "F4"}


def _whole(value: Any) -> bool:
    return type(value) is int and value >= 0


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or not all(_whole(item) for item in value):
        raise ValueError("a shape that is not of whole numbers")
    return tuple(value)


def _tensor(arguments: tuple[Any, ...]) -> StoredTensor | None:
    """(storage, offset, shape, strides, and what matters in training only), as _rebuild_tensor and its second take."""
    storage, offset, shape, stride = arguments[:4]
    if not isinstance(storage, Storage):
        return None
    return StoredTensor(storage, storage.dtype, _offset(offset), _sizes(shape), _sizes(stride))


def _typed(arguments: tuple[Any, ...]) -> StoredTensor | None:
    """The third form names the type of the elements, and its storage counts bytes."""
    storage, offset, shape, stride, _, _, dtype = arguments[:7]
    name = _ATTRIBUTES.get(dtype.path.removeprefix("torch.")) if isinstance(dtype, Name) else None
    if not isinstance(storage, Storage) or name is None:
        return None
    return StoredTensor(storage, name, _offset(offset), _sizes(shape), _sizes(stride))


def _offset(value: Any) -> int:
    if not _whole(value):
        raise ValueError("an offset that is no whole number")
    return int(value)


def _parameter(arguments: tuple[Any, ...]) -> StoredTensor | None:
    return arguments[0] if arguments and isinstance(arguments[0], StoredTensor) else None


def _subclassed(arguments: tuple[Any, ...]) -> StoredTensor | None:
    """(function, class, its arguments, state): a tensor of a class of its own has the values of a plain one."""
    function, _, inner = arguments[:3]
    known = _TENSORS.get(function.path) if isinstance(function, Name) else None
    return known(inner) if known is not None and isinstance(inner, tuple) else None


_TENSORS: dict[str, Callable[[tuple[Any, ...]], StoredTensor | None]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _subclassed,
}


def _mapping(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    """A dict of another kind: of nothing, of pairs, or of another dict; a defaultdict names a function first."""
    made: dict[Any, Any] = {}
    for given in arguments:
        if isinstance(given, dict):
            made.update(given)
        elif isinstance(given, (list, tuple)):
            for pair in given:
                if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                    raise ValueError("a dict of something else than pairs")
                _set(made, list(pair))
    return made


def _sequence(arguments: tuple[Any, ...]) -> list[Any]:
    (given,) = arguments or ((),)
    if not isinstance(given, (list, tuple)):
        raise ValueError("a list of something that is none")
    return list(given)


def _encoded(arguments: tuple[Any, ...]) -> bytes | None:
    """Bytes, as Python 2's protocols spell them."""
    if len(arguments) == 2 and isinstance(arguments[0], str) and arguments[1] in ("latin1", "latin-1"):
        return arguments[0].encode("latin1")
    return None


# numpy's names of its scalars, and those of Python's struct.
_CODES = {
    "f2": "e", "f4": "f", "f8": "d", "b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H",
    "u4": "I", "u8": "Q",
}  # fmt: skip


def _number(arguments: tuple[Any, ...]) -> float | int | bool | None:
    """A scalar of numpy: its type, which is a placeholder of the class dtype, and its bytes."""
    kind, content = arguments if len(arguments) == 2 else (None, None)
    if not isinstance(kind, Placeholder) or not kind.arguments or not isinstance(content, bytes):
        return None
    state = kind.state if isinstance(kind.state, tuple) else ()
    order = ">" if len(state) > 1 and state[1] == ">" else "<"
    code = _CODES.get(kind.arguments[0]) if isinstance(kind.arguments[0], str) else None
    if code is None or struct.calcsize(order + code) != len(content):
        return None
    found: float | int | bool = struct.unpack(order + code, content)[0]
    return found


_BUILTINS = ("builtins", "__builtin__")
_KNOWN: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    **_TENSORS,
    **dict.fromkeys(("collections.OrderedDict", "collections.defaultdict", "collections.Counter"), _mapping),
    **{f"{module}.dict": _mapping for module in _BUILTINS},
    **{
        f"{module}.{kind}": _sequence for module in ("builtins", "__builtin__") for kind in ("set", "frozenset", "list")
    },
    "torch.Size": lambda arguments: _sizes(*arguments),
    "_codecs.encode": _encoded,
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
}


def _expected(path: str) -> bool:
    """Whether a name is one of those by which torch and numpy describe values."""
    module, _, name = path.rpartition(".")
    storage = name in STORAGES and module in ("torch", "torch.storage", "torch.cuda")
    kind = module == "torch" and name in _ATTRIBUTES
    return storage or kind or path in _KNOWN or path in _RECONSTRUCTORS or path == "numpy.dtype"


# ---------------------------------------------------------------------------------------------------- plain data


def plain(value: object) -> Any:
    """A value as data that JSON can hold: numbers, texts, lists and dicts; what is none of these, as text.

    A namespace, or a dict of a class of its own, is a dict of its entries. What is too long is cut, with "...".
    """
    return _Plain().of(value, 0)


class _Plain:
    def __init__(self) -> None:
        self.left = _ENTRIES

    def of(self, value: object, depth: int) -> Any:
        self.left -= 1
        if value is None or isinstance(value, (bool, float)):
            return value
        if isinstance(value, int):
            return int(value) if value.bit_length() <= 64 else f"a number of {value.bit_length()} bits"
        if isinstance(value, str):
            return str(value) if len(value) <= _TEXT else f"{value[:_TEXT]}..."
        if isinstance(value, bytes):
            return repr(value[:64])
        if depth > _DEPTH or self.left < 0:
            return "..."
        if isinstance(value, Mapping):
            return self._entries(value, depth)
        if isinstance(value, (list, tuple, set, frozenset)):
            found: list[Any] = []
            for item in value:
                if self.left < 0:
                    return [*found, "..."]
                found.append(self.of(item, depth + 1))
            return found
        return self._object(value, depth)

    def _entries(self, value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, item in value.items():
            if self.left < 0:
                found["..."] = "..."
                break
            found[key if isinstance(key, str) else str(self.of(key, depth + 1))] = self.of(item, depth + 1)
        return found

    def _object(self, value: object, depth: int) -> Any:
        if isinstance(value, Name):
            return value.path
        if isinstance(value, StoredTensor):
            return f"a tensor of {value.dtype} {list(value.shape)}"
        if isinstance(value, Placeholder):
            return self._placeholder(value, depth)
        shape = getattr(value, "shape", None)
        if isinstance(shape, tuple) and hasattr(value, "dtype"):
            return f"a tensor of {str(value.dtype).removeprefix('torch.')} {list(shape)}"
        if type(value).__name__ == "Namespace" and hasattr(value, "__dict__"):
            return self._entries(vars(value), depth)
        return repr(value)[:_TEXT]

    def _placeholder(self, value: Placeholder, depth: int) -> Any:
        attributes = value.attributes
        if value.kind.startswith("omegaconf."):  # a node holds its value, a container its nodes
            for inside in ("_content", "_val"):
                if inside in attributes:
                    return self.of(attributes[inside], depth + 1)
        if value.entries:
            return self._entries(value.entries, depth)
        if attributes:
            return self._entries(attributes, depth)
        if value.items:
            return self.of(value.items, depth)
        return f"{value.kind}({', '.join(_said(self.of(item, depth + 1)) for item in value.arguments)})"[:_TEXT]


def _said(value: object) -> str:
    return repr(value)
