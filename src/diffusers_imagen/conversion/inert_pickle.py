"""Safe reading of pickles: calls in a file are recorded and never executed.

The standard library's `pickletools` parses a pickle; the few opcodes that dictionaries, lists, numbers, text, arrays
and tensors need are implemented here, with placeholders for classes and functions. No object of NumPy or torch is
created, called or changed. Each opcode takes bounded time and creates no more than its own bytes; keys of
dictionaries are text, so that no file controls hashing or comparison.
"""

import pickletools
import re
from collections.abc import Callable
from io import BytesIO
from typing import Any, NamedTuple


MAX_OPCODES = 2**16  # a dictionary of NeMo has some dozens
# names of the functions and classes used to build arrays and tensors; a file with others is rejected
KINDS = {
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",
    ("builtins", "bytes"): "bytes",
    ("__builtin__", "bytes"): "bytes",
    ("collections", "OrderedDict"): "OrderedDict",
    ("torch", "device"): "device",
    ("torch", "Size"): "Size",
    ("torch._utils", "_rebuild_tensor_v2"): "tensor",
    ("torch._utils", "_rebuild_parameter"): "parameter",
    ("torch.storage", "_load_from_bytes"): "storage_bytes",
}
for core in ("numpy.core", "numpy._core"):  # numpy 1, numpy 2
    KINDS[f"{core}.multiarray", "_reconstruct"] = "array"
    KINDS[f"{core}.multiarray", "scalar"] = "scalar"
    KINDS[f"{core}.numeric", "_frombuffer"] = "buffer_array"
# torch's storage types by dtype
STORAGES = {
    "Half": "float16",
    "Float": "float32",
    "Double": "float64",
    "BFloat16": "bfloat16",
    "Byte": "uint8",
    "Char": "int8",
    "Short": "int16",
    "Int": "int32",
    "Long": "int64",
    "Bool": "bool",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
}
KINDS |= {("torch", f"{name}Storage"): dtype for name, dtype in STORAGES.items()}

# the others are named only
CALLED = {"dtype", "array", "buffer_array", "scalar", "tensor", "parameter", "device", "Size"}
DTYPE = re.compile(r"[<>=|]?[biufcSU]\d{1,4}")  # no objects or structured types

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
VALUES = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT"}
VALUES |= {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
VALUES |= {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Global(NamedTuple):
    """Class or function named in a pickle, by its kind in `KINDS`."""

    kind: str


class Call:
    """Recorded call in a pickle: its kind, its arguments, and the state to set on the result."""

    __slots__ = ("kind", "args", "state")

    def __init__(self, kind: str, args: tuple):
        self.kind, self.args = kind, args
        self.state: tuple | None = None


class PickleMachine:
    """Interpreter of one pickle. A subclass may support more names.

    Args:
        file (`io.BytesIO`): Read up to the end of the pickle.
        persistent (`Callable`, *optional*): Resolves persistent ids; without it, a pickle that has any is rejected.
        nested (`Callable`, *optional*): Resolves the bytes of a nested file, a storage of torch; likewise.

    Raises:
        ValueError: For an opcode, a class or a function that embeddings do not need; other exceptions if the pickle is
            damaged.
    """

    kinds = KINDS
    max_opcodes = MAX_OPCODES
    key_types: tuple[type, ...] = (str,)  # allowed types of dictionary keys

    def __init__(
        self,
        file: BytesIO,
        persistent: Callable[[Any], Any] | None = None,
        nested: Callable[[bytes], Any] | None = None,
    ):
        self.file, self.persistent, self.nested = file, persistent, nested
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}
        self.made = 0  # total bytes passed to calls
        self.size = len(file.getbuffer())

    def run(self) -> Any:
        """Return the content of the pickle: plain values, with `Global` and `Call` for everything else."""
        for count, (opcode, argument, _) in enumerate(pickletools.genops(self.file)):
            if count >= self.max_opcodes:
                raise ValueError(f"it has more than {self.max_opcodes} opcodes")
            if opcode.name == "STOP":
                if self.outer or len(self.stack) != 1:
                    raise ValueError("it does not end with exactly one value")
                return self.stack[0]
            self._step(opcode.name, argument)
        raise ValueError("it has no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in VALUES:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in TUPLES:
            stack[-TUPLES[name] :] = [tuple(self._top(TUPLES[name]))]
        elif name in ("BINGET", "GET", "LONG_BINGET"):
            if argument not in self.memo:
                raise ValueError("it refers to a missing part")
            stack.append(self.memo[argument])
        elif name in ("BINPUT", "PUT", "LONG_BINPUT", "MEMOIZE"):
            place = len(self.memo) if name == "MEMOIZE" else argument
            if not 0 <= place < self.max_opcodes:
                raise ValueError("it uses a part number out of range")
            (self.memo[place],) = self._top(1)
        elif name not in ("PROTO", "FRAME"):
            operation = getattr(self, f"_do_{name.lower()}", None)
            if operation is None:
                raise ValueError(f"it has the opcode {name}, which is not needed there")
            operation(argument)

    def _top(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise ValueError("it takes more values from its stack than it has")
        return self.stack[-count:]

    def _pop(self, count: int) -> list[Any]:
        values = self._top(count)
        del self.stack[-count:]
        return values

    def _pop_mark(self) -> list[Any]:
        if not self.outer:
            raise ValueError("it has the end of a group without its start")
        values, self.stack = self.stack, self.outer.pop()
        return values

    def _do_mark(self, _) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def _do_tuple(self, _) -> None:
        self._push(tuple(self._pop_mark()))

    def _do_list(self, _) -> None:
        self._push(self._pop_mark())

    def _do_empty_list(self, _) -> None:
        self._push([])

    def _do_empty_dict(self, _) -> None:
        self._push({})

    def _do_dict(self, _) -> None:
        items = self._pop_mark()
        self._push({})
        self._set_items(items)

    def _do_setitem(self, _) -> None:
        self._set_items(self._pop(2))

    def _do_setitems(self, _) -> None:
        self._set_items(self._pop_mark())

    def _do_append(self, _) -> None:
        self._extend(self._pop(1))

    def _do_appends(self, _) -> None:
        self._extend(self._pop_mark())

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    def _set_items(self, items: list[Any]) -> None:
        (target,) = self._top(1)
        if type(target) is not dict or len(items) % 2:
            raise ValueError("it sets items of a value that is not a dictionary")
        for key, value in zip(items[::2], items[1::2]):
            if type(key) not in self.key_types:
                raise ValueError(f"it has a dictionary with a key of type {type(key).__name__}, but keys are text")
            target[key] = value

    def _extend(self, values: list[Any]) -> None:
        (target,) = self._top(1)
        if type(target) is not list:
            raise ValueError("it appends to a value that is not a list")
        target.extend(values)

    def _do_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._find(module, name)

    def _do_stack_global(self, _) -> None:
        self._find(*self._pop(2))

    def _find(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise ValueError("it names a class by a value that is not text")
        if (module, name) not in self.kinds:
            raise ValueError(f"it asks for {f'{module}.{name}'[:100]!r}, which is not needed there")
        self._push(Global(self.kinds[module, name]))

    def _do_reduce(self, _) -> None:
        function, args = self._pop(2)
        if type(function) is not Global or type(args) is not tuple:
            raise ValueError("it calls a value that is not a function")
        self._push(self._call(function.kind, args))

    def _call(self, kind: str, args: tuple) -> Any:
        if kind == "OrderedDict" and not args:
            return {}
        if kind == "bytes" and not args:
            return b""
        if kind == "storage_bytes":
            if self.nested is None or len(args) != 1 or type(args[0]) is not bytes:
                raise ValueError("it has a nested file that is not a storage")
            self._count(args[0])
            return self.nested(args[0])
        if kind == "encode":  # bytes, in protocols without a bytes type
            if len(args) != 2 or type(args[0]) is not str or args[1] not in ("latin1", "latin-1"):
                raise ValueError("it encodes what is not bytes as text")
            self._count(args[0])
            return args[0].encode("latin-1")
        if kind not in CALLED:
            raise ValueError(f"it calls {kind}, which is not needed there")
        if kind == "dtype" and (not args or type(args[0]) is not str or not DTYPE.fullmatch(args[0])):
            raise ValueError("it has an array type that is neither numbers nor text")
        return Call(kind, args)

    def _count(self, made: str | bytes) -> None:
        """Raise ValueError if a part is used by many calls, which would create more bytes than the file has."""
        self.made += len(made)
        if self.made > 2 * self.size:
            raise ValueError("it creates more bytes than it has")

    def _do_build(self, _) -> None:
        target, state = self._pop(2)
        if type(target) is Call and target.state is None and target.kind in ("array", "dtype"):
            if type(state) is not tuple or (target.kind == "dtype" and any(part is not None for part in state[2:5])):
                raise ValueError("it sets an invalid state of an array")
            target.state = state
        elif type(target) is not dict:  # attributes of torch's ordered dictionaries are dropped
            raise ValueError(f"it sets the state of {type(target).__name__}")
        self._push(target)

    def _do_binpersid(self, _) -> None:
        if self.persistent is None:
            raise ValueError("it has a persistent id")
        self._push(self.persistent(*self._pop(1)))
