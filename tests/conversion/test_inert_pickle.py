"""Hostile pickles: each is refused in one line, at once, and changes nothing in NumPy and torch."""

import copy
import io
import pickle
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from diffusers_imagen.conversion.inert_pickle import MAX_OPCODES, PickleMachine
from diffusers_imagen.conversion.nemo_embeddings import LEGACY_MAGIC, unpickle_embeddings


END = b"."
KEY = b"\x8c\x07t5_text"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def raw(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def name(module: str, function: str) -> bytes:
    return f"c{module}\n{function}\n".encode()


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def group(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def call(module: str, function: str, *args: bytes) -> bytes:
    return name(module, function) + group(*args) + b"R"


def states(value: bytes) -> bytes:
    """A dictionary of NeMo with such a value."""
    return b"\x80\x04}" + KEY + value + b"s" + END


NDARRAY = name("numpy", "ndarray")
RECONSTRUCT = call("numpy.core.multiarray", "_reconstruct", NDARRAY, group(number(0)), raw(b"b"))


def dtype(code="f4", order="<") -> bytes:
    state = group(number(3), text(order), b"N", b"N", b"N", number(-1), number(-1), number(0))
    return call("numpy", "dtype", text(code), b"\x89", b"\x88") + state + b"b"


def array(shape=(2, 3), kind=None, data=bytes(24), order=b"\x89", version=1) -> bytes:
    sizes = group(*map(number, shape))
    kind = dtype() if kind is None else kind
    data = raw(data) if isinstance(data, bytes) else data[0]
    return RECONSTRUCT + group(number(version), sizes, kind, order, data) + b"b"


def buffer_array(*args: bytes) -> bytes:
    return call("numpy._core.numeric", "_frombuffer", *args)


def legacy(key="1", count=6, kind="FloatStorage", stored=6, data=bytes(24), keys=None) -> bytes:
    """A storage in a file of torch.save's older format."""
    pid = group(text("storage"), name("torch", kind), text(key), text("cpu"), number(count), b"N")
    file = b"\x8a\x0a" + LEGACY_MAGIC.to_bytes(10, "little") + END + b"M\xe9\x03." + b"}."
    return file + pid + b"Q." + (b"(" + text(key) + b"l." if keys is None else keys) + struct.pack("<q", stored) + data


def tensor(storage=None, offset=0, size=(2, 3), stride=(3, 1)) -> bytes:
    if storage is None:
        storage = call("torch.storage", "_load_from_bytes", raw(legacy()))
    place = [number(offset), group(*map(number, size)), group(*map(number, stride))]
    hooks = name("collections", "OrderedDict") + b")R"
    return call("torch._utils", "_rebuild_tensor_v2", storage, *place, b"\x89", hooks)


def zipped(value: bytes, compression=zipfile.ZIP_STORED, data=bytes(24), **entries: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", value)
        archive.writestr("archive/data/0", data)
        for key, content in entries.items():
            archive.writestr(f"archive/{key}", content)
    return file.getvalue()


def stored(count=6, kind="FloatStorage", key="0") -> bytes:
    return group(text("storage"), name("torch", kind), text(key), text("cpu"), number(count)) + b"Q"


def test_the_parts_of_the_table_below_are_sound():
    for data in (
        states(array()),
        states(tensor()),
        zipped(states(tensor(stored()))),
        states(buffer_array(raw(bytes(24)), dtype(), group(number(2), number(3)), text("C"))),
    ):
        assert torch.equal(unpickle_embeddings(data)["t5_text"], torch.zeros(2, 3))


def nested_tuples(depth: int) -> bytes:
    return b"N" + b"\x85" * depth


HOSTILE = {
    # that called functions of NumPy and torch
    "an array of objects over bytes": states(
        call("numpy", "ndarray", group(number(2), number(2)), call("numpy", "dtype", text("O")), raw(b"A" * 32))
    ),
    "objects by dtype": states(array(kind=call("numpy", "dtype", text("O")))),
    "objects in a list": states(array(kind=dtype("O8", "|"), data=[b"(NNNNNNl"])),
    "a structured dtype": states(array(kind=call("numpy", "dtype", b"(" + group(text("a"), text("O")) + b"l"))),
    "a dtype of bytes": states(array(kind=dtype("V24", "|"))),
    "a dtype that is void": states(array(kind=dtype("f0"))),
    "a dtype by an array": states(array(kind=array())),
    "a dtype without a call": states(array(kind=name("numpy", "dtype"))),
    "a buffer array of objects": states(
        buffer_array(raw(bytes(48)), dtype("O8", "|"), group(number(2), number(3)), text("C"))
    ),
    "a buffer array of a list": states(
        buffer_array(b"(NNNNNNl", dtype(), group(number(2), number(3)), text("C"))
    ),
    "a buffer array without a shape": states(buffer_array(raw(bytes(24)))),
    "a buffer array of a strange order": states(
        buffer_array(raw(bytes(24)), dtype(), group(number(2), number(3)), text("K"))
    ),
    "a scalar of objects": states(call("numpy.core.multiarray", "scalar", dtype("O8", "|"), raw(bytes(8)))),
    # that set states
    "__defaults__ of a function": b"\x80\x04" + name("torch._utils", "_rebuild_tensor_v2") + b"N}"
    b"\x8c\x0c__defaults__(N" + b"NNNNtsa\x86b.",
    "the state of a function": states(name("torch._utils", "_rebuild_tensor_v2") + b"}" + text("a") + b"Nsb"),
    "the state of a class": states(NDARRAY + b"}" + text("__module__") + text("x") + b"sb"),
    "two states of a dtype": states(array(kind=dtype() + group(number(3), text("|"), b"N", b"N", b"N") + b"b")),
    "the state of a list": states(b"]}b"),
    "the state of a number": states(b"K\x01}b"),
    "two states of an array": states(array() + group(number(1)) + b"b"),
    # of arrays
    "a shape beyond the bytes": states(array(shape=(2000, 3000))),
    "a shape short of the bytes": states(array(shape=(1, 3))),
    "a negative size": states(array(shape=(-2, -3))),
    "a huge shape": states(array(shape=(2**31 - 1, 2**31 - 1))),
    "a huge shape of nothing": states(array(shape=(0, 2**31 - 1), data=b"")),
    "sizes that are no numbers": states(RECONSTRUCT + group(number(1), group(text("2")), dtype(), b"\x89", raw(b"")) + b"b"),
    "sizes that are truths": states(RECONSTRUCT + group(number(1), group(b"\x88\x88"), dtype(), b"\x89", raw(bytes(4))) + b"b"),
    "a thousand dimensions": states(array(shape=(1,) * 1000, data=bytes(4))),
    "no state": states(RECONSTRUCT),
    "a short state": states(RECONSTRUCT + group(number(1)) + b"b"),
    "half a number": states(array(shape=(1, 1), data=bytes(3))),
    "text for bytes": states(array(data=[text("a" * 24)])),
    "a strange byte order": states(array(kind=dtype("f4", "~"))),
    # of tensors
    "an offset beyond the storage": states(tensor(offset=2**30)),
    "a negative offset": states(tensor(offset=-100)),
    "strides beyond the storage": states(tensor(stride=(2**26, 1))),
    "negative strides": states(tensor(stride=(-3, -1))),
    "a huge size over one number": states(tensor(size=(2**20, 2**20), stride=(0, 0))),
    "fewer strides than sizes": states(tensor(stride=(1,))),
    "a storage that is an array": states(tensor(array())),
    "a storage that is a number": states(tensor(number(7))),
    "a tensor of nothing": states(name("torch._utils", "_rebuild_tensor_v2") + b")R"),
    "a parameter of nothing": states(name("torch._utils", "_rebuild_parameter") + b")R"),
    "a parameter of itself": states(name("torch._utils", "_rebuild_parameter") + group(NDARRAY) + b"R"),
    "a storage of a count": states(tensor(call("torch.storage", "_load_from_bytes", number(2**31 - 1)))),
    "a storage of a pickle": states(tensor(call("torch.storage", "_load_from_bytes", raw(states(array()))))),
    "a storage of a zip": states(tensor(call("torch.storage", "_load_from_bytes", raw(zipped(states(array())))))),
    "a storage in a storage": states(
        tensor(call("torch.storage", "_load_from_bytes", raw(call("torch.storage", "_load_from_bytes", raw(b"."))  + END)))
    ),
    "a storage of objects": states(tensor(call("torch.storage", "_load_from_bytes", raw(legacy(kind="Size"))))),
    "a storage of a false size": states(tensor(call("torch.storage", "_load_from_bytes", raw(legacy(stored=2**40))))),
    "a storage of a huge size": states(
        tensor(call("torch.storage", "_load_from_bytes", raw(legacy(count=2**31 - 1, stored=2**31 - 1))))
    ),
    "a storage of a negative size": states(
        tensor(call("torch.storage", "_load_from_bytes", raw(legacy(count=-1, stored=-1))))
    ),
    "a storage that is cut": states(tensor(call("torch.storage", "_load_from_bytes", raw(legacy(data=b"abc"))))),
    "a storage without keys": states(tensor(call("torch.storage", "_load_from_bytes", raw(legacy(keys=b"].",))))),
    "keys that are no list": states(tensor(call("torch.storage", "_load_from_bytes", raw(legacy(keys=b"N."))))),
    "keys of no storage": states(tensor(call("torch.storage", "_load_from_bytes", raw(legacy(keys=b"(]]l."))))),
    "a zip of another size": zipped(states(tensor(stored(count=2**31 - 1)))),
    "a zip of a missing storage": zipped(states(tensor(stored(key="../../etc/passwd")))),
    "a zip that is compressed": zipped(states(tensor(stored(count=2**22))), zipfile.ZIP_DEFLATED, bytes(2**24)),
    "a zip with code": zipped(states(call("os", "system", text("exit")))),
    "a zip with two pickles": zipped(states(tensor(stored()))).replace(b"archive/data/0", b"a/data.pkl\0\0\0\0"),
    "a zip that is cut": zipped(states(tensor(stored())))[:-30],
    "a zip of nothing": b"PK\x03\x04" + b"PK\x01\x02" * 20_000,
    "a persistent id of a list": zipped(b"]Q."),
    "a persistent id of code": zipped(group(text("module"), name("torch", "FloatStorage"), b"NNN") + b"Q."),
    "a persistent id without a file": states(stored()),
    "a persistent id in text": b"Pstorage\n.",
    # of functions
    "a call of a dictionary": states(b"}" + group() + b"R"),
    "a call without a tuple": states(NDARRAY + b"]R"),
    "a call of a call": states(RECONSTRUCT + group() + b"R"),
    "eval": states(call("builtins", "eval", text("1"))),
    "eval by another name": states(text("builtins") + text("eval") + b"\x93" + group(text("1")) + b"R"),
    "a path of names": states(text("numpy") + text("ndarray.__class__.__subclasses__") + b"\x93" + group() + b"R"),
    "a name of numbers": states(number(1) + number(2) + b"\x93"),
    "a name with a line": states(text("numpy\nos") + text("ndarray") + b"\x93"),
    "a name of a megabyte": states(text("a" * 2**20) + text("b") + b"\x93"),
    "an instance": states(b"(inumpy\nndarray\n"),
    "an object": states(b"(" + NDARRAY + b"o"),
    "a new object": states(NDARRAY + group() + b"\x81"),
    "a new object by keywords": states(NDARRAY + group() + b"}\x92"),
    "an extension": states(b"\x82\x01"),
    "a buffer beside the file": states(b"\x97"),
    "bytes by their number": states(call("builtins", "bytes", number(2**31 - 1))),
    "an encoding that runs code": states(call("_codecs", "encode", text("a"), text("unicode_escape"))),
    "an ordered dictionary of pairs": states(call("collections", "OrderedDict", b"(]]l")),
    # of keys
    "a key that is a deep tuple": b"\x80\x04}" + nested_tuples(MAX_OPCODES - 100) + b"Ns.",
    "a key that is a list": b"\x80\x04}]Ns.",
    "a key that is a call": b"\x80\x04}" + RECONSTRUCT + b"Ns.",
    "keys that are numbers": b"\x80\x04}" + number(5) + b"Ns.",
    "a set": states(b"\x8f"),
    "a frozen set": states(b"(\x91"),
    "an odd number of items": b"\x80\x04}(" + KEY + b"u.",
    "items of a list": b"\x80\x04]" + KEY + b"Ns.",
    "items appended to a dictionary": b"\x80\x04}Na.",
    # bombs
    "lines of marks": b"(" * 2**20,
    "lines of opcodes": b"N0" * 2**20,
    "a deep list": b"]" * 2**20 + b"a" * 2**20 + END,
    "a deep list of a value": states(b"]" * 20_000 + b"a" * 19_999),
    "a deep tuple": states(nested_tuples(MAX_OPCODES - 100)),
    "a long number": b"\x80\x04\x8b" + struct.pack("<i", 2**20) + b"\xff" * 2**20 + END,
    "a long number in text": b"L" + b"9" * 2**20 + b"L\n.",
    "a number of letters": b"Iabc\n.",
    "bytes without end": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"a.",
    "bytes of a negative length": b"\x80\x04\x8e" + struct.pack("<q", -1) + b"a.",
    "a byte array without end": b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"a.",
    "text without end": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"a.",
    "a memo far away": states(b"N" + b"r" + struct.pack("<I", 2**32 - 1)),
    "a memo below zero": states(b"Np-5\n"),
    "a memo that is not there": states(b"h\x05"),
    "a frame without end": b"\x80\x04\x95" + struct.pack("<Q", 2**63) + b"N",
    "text encoded again and again": b"\x80\x04}" + KEY + b"(" + name("_codecs", "encode") + b"q\x00" + text("a" * 2**16)
    + b"q\x01" + text("latin1") + b"q\x02" + b"(h\x00(h\x01h\x02tR" * 10_000 + b"ls.",
    "a storage read again and again": b"\x80\x04}" + KEY + b"(" + name("torch.storage", "_load_from_bytes") + b"q\x00"
    + raw(legacy(count=2**14, stored=2**14, data=bytes(2**16))) + b"\x85q\x01" + b"h\x00h\x01R" * 15_000 + b"ls.",
    "an array under many names": b"\x80\x04}(" + text("a") + array() + b"q\x05" + b"".join(text(f"k{i}") + b"h\x05" for i in range(100)) + b"u.",
    # of what is no pickle
    "nothing": b"",
    "a stop": b".",
    "no stop": b"\x80\x04}",
    "two values": b"}}.",
    "a group without an end": b"(}.",
    "a group without a begin": b"}t.",
    "a tuple of too few": b"N\x87.",
    "a protocol of tomorrow": b"\x80\xff}" + b"\xff.",
    "letters": b"all my work",
    "a stack that is popped": b"0.",
    "a value that is copied": b"}2.",
    "a file that holds itself": b"\x80\x04}q\x00" + KEY + b"h\x00s" + b".",
}  # fmt: skip


def fingerprint() -> list:
    """What a hostile file would change."""
    functions = [torch._utils._rebuild_tensor_v2, torch._utils._rebuild_parameter, torch.storage._load_from_bytes]
    core = np._core if hasattr(np, "_core") else np.core
    functions += [core.numeric._frombuffer]
    content = [
        (copy.copy(f.__defaults__), copy.copy(f.__kwdefaults__), dict(f.__dict__), f.__code__) for f in functions
    ]
    return content + [np.dtype("f4").str, np.dtype("O").hasobject, str(np.dtype("f4")), sorted(vars(np.ndarray))]


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_pickle_is_refused_at_once_and_changes_nothing(data):
    before, start = fingerprint(), time.perf_counter()
    with pytest.raises(ValueError, match=r"^a\.pickle (cannot be read safely: |has |holds )") as caught:
        unpickle_embeddings(data, "a.pickle")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert time.perf_counter() - start < 5
    assert fingerprint() == before


@pytest.mark.parametrize("title", ["text encoded again and again", "a storage read again and again", "lines of marks"])
def test_a_bomb_takes_a_few_times_its_own_size(title):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            unpickle_embeddings(HOSTILE[title])
        assert tracemalloc.get_traced_memory()[1] < 20 * len(HOSTILE[title]) + 2**24
    finally:
        tracemalloc.stop()


def test_a_machine_without_a_meaning_for_persistent_ids_and_files_refuses_them():
    with pytest.raises(ValueError, match="persistent id"):
        PickleMachine(io.BytesIO(b"NQ.")).run()
    with pytest.raises(ValueError, match="a nested file"):
        PickleMachine(io.BytesIO(call("torch.storage", "_load_from_bytes", raw(legacy())) + END)).run()


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_are_those_that_were_pickled(protocol):
    value = {
        "numbers": [0, 1, 255, 256, -1, 2**31, -(2**40), 2**200, 1.5, float("inf")],
        "text": ["", "a", "ü\n\\\0", "x" * 300],
        "bytes": [b"", b"\xff\x00", b"y" * 300],
        "others": [None, True, False, (), (1,), (1, 2, 3, 4), {}, []],
    }
    assert PickleMachine(io.BytesIO(pickle.dumps(value, protocol))).run() == value
