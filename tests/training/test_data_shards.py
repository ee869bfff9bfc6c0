"""Tar shards: every sample of a whole one, and a word about every other."""

import gzip
import lzma
import os
import re
import tarfile

import pytest
from data_files import READERS, picture, read, refusal, samples, tar, write

from diffusers_imagen.training.data import shards
from diffusers_imagen.training.data.shards import Shard, check_shards, examine


NUM_SAMPLES = 6
TEXT = {"caption_column": ["txt"]}
WHOLE = tar(samples(range(NUM_SAMPLES)))
END = 2 * NUM_SAMPLES * 1024  # of the last file; zeros follow


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def fault_of(tmp_path, data: bytes, name: str = "a.tar") -> str:
    path = os.path.join(write(tmp_path / "d", {name: data}), name)
    return examine(Shard.at(path)).fault or ""


def test_a_cut_is_noticed_wherever_it_is(tmp_path):
    """At every 64th byte, and around every header and file."""
    edges = [edge + step for edge in range(0, END + 1024, 512) for step in (-1, 0, 1)]
    for cut in sorted({*range(0, END + 512, 64), *edges} & set(range(END + 512))):
        fault = fault_of(tmp_path, WHOLE[:cut])
        whole = cut // 2048  # samples whose files all lie before the cut
        assert fault, f"a cut at byte {cut} was not noticed"
        assert f"({whole} samples can be read)" in fault or f"({max(0, whole - 1)} samples" in fault, (cut, fault)
    for cut in (END + 512, END + 513, END + 1024, len(WHOLE)):  # in the zeros at the end
        assert not fault_of(tmp_path, WHOLE[:cut])
    assert fault_of(tmp_path, WHOLE[: 3 * 2048]) == (
        f"is cut: it ends at byte {3 * 2048}, without the zeros that end a tar file (3 samples can be read)"
    )


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress], ids=["gzip", "xz"])
def test_a_cut_of_a_compressed_shard_is_noticed(tmp_path, compress):
    packed = compress(WHOLE)
    assert not fault_of(tmp_path, packed, "a.tar.gz")
    for cut in range(0, len(packed), 11):
        assert fault_of(tmp_path, packed[:cut], "a.tar.gz"), cut
    damaged = bytearray(packed)
    damaged[-6] ^= 1  # in the checksum
    assert fault_of(tmp_path, bytes(damaged), "a.tar.gz")


def test_a_flipped_byte_in_a_header_is_noticed(tmp_path):
    for byte in range(0, 512, 37):
        damaged = bytearray(WHOLE)
        damaged[4096 + byte] ^= 4
        fault = fault_of(tmp_path, bytes(damaged))
        if any(WHOLE[4096 + byte : 4097 + byte]):
            assert re.search("damaged header at byte 4096 .2 samples can be read", fault), (byte, fault)


def sparse() -> bytes:
    member = tarfile.TarInfo("a.png")
    member.size = 2**41
    return member.tobuf() + bytes(2048)


def long_name() -> bytes:
    member = tarfile.TarInfo("././@LongLink")
    member.size, member.type = 2**34, tarfile.GNUTYPE_LONGNAME
    return gzip.compress(member.tobuf(tarfile.GNU_FORMAT) + bytes(4096))


FAULTS = {
    "nothing": (b"", "is empty, 0 bytes"),
    "text": (b"no archive" * 100, "cannot be read: "),
    "two archives": (WHOLE + WHOLE, f"continues after the zeros that end a tar file, at byte {END} .6 samples"),
    "a file twice": (tar({"a.png": b"a"})[:1024] + tar({"a.png": b"a"}), "has 'a.png' twice"),
    "apart": (tar({"a.png": b"a", "b.png": b"b", "a.txt": b"a"}), "has files of the sample 'a' in two places"),
    "a file of any size": (sparse(), "has 'a.png' of 2199023255552 bytes"),
    "a name of any size": (long_name(), "declares more than the supported 1073741824 bytes"),
}


@pytest.mark.parametrize("data, message", FAULTS.values(), ids=FAULTS)
def test_what_is_wrong_with_a_shard_is_said(tmp_path, data, message):
    assert re.search(message, fault_of(tmp_path, data))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("cut", [2048, 2560, 3000], ids=["between samples", "in a header", "in an image"])
def test_a_cut_shard_is_refused_by_name_before_a_step(tmp_path, encode, reader, cut):
    folder = write(tmp_path / "d", {"a.tar": WHOLE[: cut + 2048], "b.tar": tar(samples(range(6, 9)))})
    message = refusal(folder, reader, encode, **TEXT)
    assert re.search(
        "`train_data_dir` is .*a.tar' .* 2 samples can be read.: write them again, or move them away",
        message.replace("(", " "),
    )


def test_all_cut_shards_are_counted(tmp_path):
    folder = write(tmp_path / "d", {f"{i}.tar": WHOLE[:2048] for i in range(5)})
    with pytest.raises(ValueError, match="0.tar' is cut.*; '.*2.tar' .*; and 2 more shards: write them again"):
        check_shards([Shard.at(f"{folder}/{i}.tar") for i in range(5)], 5)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("image_column", ["image", "jpg", "png"])
def test_pictures_of_every_kind_count(tmp_path, encode, reader, image_column):
    files = samples(range(9), ("png", "jpg", "webp"))
    folder = write(tmp_path / "d", {"a.tar": tar(files), "b.tar.gz": gzip.compress(tar(samples(range(9, 12))))})
    drawn, skipped = read(folder, reader, encode, image_column=image_column, **TEXT)
    assert drawn == set(range(12)) and not skipped


@pytest.mark.parametrize("reader", READERS)
def test_samples_that_cannot_be_used_are_named(tmp_path, encode, reader):
    files = samples(range(4)) | {"0001.txt": b"\xff", "0002.png": b"no image", "0007.txt": b"n 7"}
    files |= {"._0001.png": b"of macOS", "no-ending": b""}
    del files["0003.txt"]
    drawn, skipped = read(write(tmp_path / "d", {"a.tar": tar(files)}), reader, encode, **TEXT)
    assert drawn == {0}
    assert sorted(skipped) == ["a.tar/0001.png", "a.tar/0002.png", "a.tar/0003.png", "a.tar/0007"]
    assert skipped["a.tar/0003.png"].startswith("the caption is None") and skipped["a.tar/0007"] == "there is no image"


def test_which_of_several_pictures_is_meant_is_asked(tmp_path, encode):
    files = {"0.png": picture(1), "0.jpg": picture(2, "JPEG"), "0.mask.png": picture(3), "0.txt": b"n"}
    folder = write(tmp_path / "d", {"a.tar": tar(files)})
    message = refusal(folder, "memory", encode, **TEXT)
    assert "`image_column` is 'image', but samples have several images, ['jpg', 'png']: choose one" in message
    for column, number in (("png", 1), ("jpg", 2), ("mask.png", 3)):
        assert read(folder, "memory", encode, image_column=column, **TEXT)[0] == {number}
    folder = write(tmp_path / "masks", {"a.tar": tar({"0.mask.png": picture(3), "0.txt": b"n"})})
    assert "the samples have the files ['mask.png', 'txt']" in refusal(folder, "memory", encode, **TEXT)


def test_numbers_and_texts_are_columns(tmp_path):
    files = {
        "0.png": picture(0),
        "0.txt": b"a",
        "0.cls": b"7",
        "0.npy": b"x",
        "1.png": picture(1),
        "1.cls": b"no number",
    }
    place = Shard.at(os.path.join(write(tmp_path / "d", {"a.tar": tar(files)}), "a.tar"))
    features = shards.shard_features([examine(place)], "image")
    assert sorted(features) == ["cls", "image", "txt"]
    rows = list(shards.read_rows([place], ("png",), features))
    assert [(row["txt"], row["cls"]) for row in rows] == [("a", 7), (None, None)]


@pytest.mark.parametrize("reader", READERS)
def test_shards_without_a_sample(tmp_path, encode, reader):
    folder = write(tmp_path / "d", {"a.tar": tar({})})
    assert "its 1 tar shards have no samples" in refusal(folder, reader, encode, **TEXT)
    write(tmp_path / "d", {"b.tar": WHOLE})
    assert read(folder, reader, encode, **TEXT)[0] == set(range(NUM_SAMPLES))


def test_shards_of_splits(tmp_path, encode):
    folder = write(tmp_path / "d", {"train-0.tar": WHOLE, "set-val-0.tar": tar(samples(range(6, 8)))})
    assert read(folder, "stream", encode, **TEXT)[0] == set(range(6))
    assert read(folder, "stream", encode, train_split="validation", **TEXT)[0] == {6, 7}
    write(tmp_path / "d", {"more.tar": WHOLE})
    assert "1 without a split, such as 'more.tar'" in refusal(folder, "stream", encode, **TEXT)
