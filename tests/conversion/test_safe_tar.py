"""Tar files of others: whole members, or one line that names the one that is not."""

import gzip
import io
import os
import tarfile

import pytest

from diffusers_imagen.conversion.safe_tar import read_members


LIMITS = {".txt": 1000, ".pickle": 5000}


def member(name: str, **fields) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def header(name: str, **fields) -> bytes:
    return member(name, **fields).tobuf(fields.pop("format", tarfile.GNU_FORMAT))


def archive(*parts: bytes) -> bytes:
    return b"".join(parts) + bytes(1024)


def block(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def of(name: str, data: bytes = b"abc") -> bytes:
    return header(name, size=len(data)) + block(data)


def negative(name: str, kind: bytes = b"0") -> bytes:
    """A header of a negative size, at which Python's tarfile of 2025 went round for ever."""
    data = bytearray(header(name, type=kind))
    data[124:136] = b"\xff" * 10 + (2**16 - 1024).to_bytes(2, "big")
    data[148:156] = b" " * 8
    data[148:156] = f"{sum(data):06o}\0 ".encode()
    return bytes(data)


GOOD = of("0.txt")
LONG = "folder/" * 30 + "name.txt"
HOSTILE = {
    "an absolute name": (archive(GOOD, of("/etc/0.txt")), "'/etc/0.txt', a name that points outside the folder"),
    "a name that leads up": (archive(GOOD, of("a/../../0.txt")), "'a/../../0.txt', a name that points outside"),
    "a folder that leads up": (archive(GOOD, header("..", type=tarfile.DIRTYPE)), "'..', a name that points outside"),
    "a symbolic link": (archive(GOOD, header("1.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd")), "'1.txt', which is"),
    "a hard link": (archive(GOOD, header("1.txt", type=tarfile.LNKTYPE, linkname="0.txt")), "'1.txt', which is not a regular"),
    "a device": (archive(GOOD, header("1.txt", type=tarfile.CHRTYPE)), "'1.txt', which is not a regular file"),
    "a pipe": (archive(GOOD, header("1.txt", type=tarfile.FIFOTYPE)), "'1.txt', which is not a regular file"),
    "a sparse file": (archive(GOOD, header("1.txt", type=tarfile.GNUTYPE_SPARSE)), "'1.txt', which is not a regular file"),
    "a huge size": (archive(GOOD, header("1.txt", size=2**60)), "'1.txt' of 1152921504606846976 bytes, beyond the end"),
    "a size beyond the end": (archive(GOOD, header("1.jpg", size=5000)), "'1.jpg' of 5000 bytes, beyond the end"),
    "a size beyond the limit": (archive(GOOD, of("1.txt", bytes(1001))), "'1.txt' of 1001 bytes, more than 1000"),
    "a negative size": (archive(GOOD, negative("1.txt")), "'1.txt' of -1024 bytes"),
    "a negative size of a long name": (archive(GOOD, negative("1.txt", tarfile.GNUTYPE_LONGNAME)), "a header has more"),
    "a negative size in a header's extension": (
        archive(GOOD, member("1.txt", pax_headers={"size": "-512"}).tobuf(tarfile.PAX_FORMAT)),
        "'1.txt' of -512 bytes",
    ),
    "an extension of a megabyte": (
        archive(GOOD, member("1.txt", pax_headers={"comment": "a" * 2**20}).tobuf(tarfile.PAX_FORMAT)),
        "a header has more than 16384 bytes",
    ),
    "a name of a megabyte": (archive(GOOD, of("a" * 2**20)), "a header has more than 16384 bytes"),
    "a damaged header": (archive(GOOD, b"all my work" + bytes(501), of("1.txt")), "is cut or damaged at byte 1024"),
    "a cut header": (GOOD + of("1.txt")[:100], "is cut or damaged at byte 1024"),
    "a cut between members": (GOOD, "is cut or damaged at byte 1024"),
    "a cut within a member": (GOOD + of("1.txt")[:514], "'1.txt' of 3 bytes, beyond the end"),
    "nothing": (b"", "cannot be read as a tar file: empty file"),
    "letters": (b"all my work" * 100, "cannot be read as a tar file"),
    "a damaged gzip": (gzip.compress(archive(GOOD))[:-20], "'.*tar'"),
    "a flipped byte of a gzip": (gzip.compress(archive(GOOD), mtime=0)[:30] + b"\xff" * 8, "cannot be read as a tar file"),
    "a gzip bomb": (
        gzip.compress(archive(GOOD, header("1.jpg", size=2**30))),
        "'1.jpg' of 1073741824 bytes, more than 50 times its compressed size",
    ),
    "another compression": (b"BZh91AY&SY" + bytes(600), "cannot be read as a tar file"),
}  # fmt: skip


@pytest.mark.parametrize("data, message", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_sound_tar_file_is_refused_by_name(tmp_path, data, message):
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        list(read_members(path, LIMITS))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert os.listdir(tmp_path) == ["a.tar"]


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(ValueError, match="a.tar' is not a file"):
        list(read_members(tmp_path / "a.tar", LIMITS))


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_member_is_read_in_order(tmp_path, pack, form):
    contents = {"0.txt": b"", "./a/0.PICKLE": bytes(512), "a/0.jpg": bytes(700), "é.txt": b"x" * 513, "ü/b.txt": b"y"}
    if form != tarfile.USTAR_FORMAT:
        contents[LONG] = b"z"
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        tar.addfile(member("a", type=tarfile.DIRTYPE))
        for name, data in contents.items():
            tar.addfile(member(name, size=len(data), mtime=1.5), io.BytesIO(data))
    (tmp_path / "a.tar").write_bytes(pack(file.getvalue()))
    found = {str(name): data for name, data in read_members(tmp_path / "a.tar", LIMITS)}
    expected = {name.removeprefix("./"): data for name, data in contents.items() if not name.endswith("jpg")}
    assert found == expected and list(found) == list(expected)
