"""Folders of pictures and of tables: which files count, and what is said of those that cannot be read."""

import io
import os
from dataclasses import replace

import pytest
from data_files import READERS, lines, picture, read, refusal, tar, write
from datasets import Dataset
from text_sources import FunctionSource

from diffusers_imagen.training.data import DataConfig
from diffusers_imagen.training.data.image_folders import group_by_split, list_files
from diffusers_imagen.training.data.sources import open_rows
from diffusers_imagen.training.finetuning.class_images import missing_images


NAMES = ["train_red.png", "toy-train-1.png", "dog-dev.PNG", "test [1].png", "plain.png"]
PICTURES = {name: picture(i) for i, name in enumerate(NAMES)}
NUMBERED = {f"{i}.png": picture(i) for i in range(4)}
ROWS = [{"file_name": f"{i}.png", "text": f"n {i}"} for i in range(4)]
HIDDEN = {".plain.png": b"", "._plain.png": b"", "__MACOSX/._plain.png": b"", ".ipynb_checkpoints/plain.png": b""}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("reader", READERS)
def test_names_of_pictures_do_not_decide_on_splits_and_hidden_copies_do_not_count(tmp_path, encode, reader):
    folder = write(tmp_path / "d", PICTURES | HIDDEN | {"notes.csv": b"a,b", "config.json": b"{}"})
    drawn, skipped = read(folder, reader, encode, caption="a dog")
    assert drawn == set(range(5)) and not skipped
    assert len(missing_images(tmp_path / "d", 7)) == 2  # as DreamBooth counts the images of a class


@pytest.mark.parametrize("reader", READERS)
def test_captions_beside_pictures_are_read(tmp_path, encode, reader):
    texts = {f"{os.path.splitext(name)[0]}.txt": b"\xef\xbb\xbf a dog,\n sitting \n" for name in NAMES[:4]}
    folder = write(tmp_path / "d", PICTURES | texts | {"README.txt": b"\xff", ".plain.txt": b"\xff"})
    drawn, skipped = read(folder, reader, encode)
    assert drawn == {0, 1, 2, 3} and list(skipped) == ["plain.png"]
    write(tmp_path / "d", {"plain.caption": b"a cat"})
    assert read(folder, reader, encode) == (set(range(5)), {})
    (tmp_path / "d" / "plain.caption").rename(tmp_path / "d" / "plain.TXT")
    assert read(folder, reader, encode) == (set(range(5)), {})
    write(tmp_path / "d", {"plain.caption": b"\xff"})
    assert "the caption '" in (message := refusal(folder, reader, encode)) and "plain.caption' cannot be" in message


@pytest.mark.parametrize("streaming", [False, True])
def test_many_captions_are_a_table_on_disk_that_changes_with_their_files(tmp_path, monkeypatch, streaming):
    texts = {"cats/0.txt": b"a\ncat", "dogs/2.caption": b"a dog"}
    folder = write(tmp_path / "d", {"cats/0.png": b"", "cats/1.png": b"", "dogs/2.png": b""} | texts)

    def rows():
        config = DataConfig(train_data_dir=folder, cache_dir=str(tmp_path / "tables"), streaming=streaming)
        return open_rows(replace(config, caption_column=["text", "label"]), "train").data

    in_memory = list(rows())
    assert in_memory == [
        {"file_name": "cats/0.png", "text": "a cat", "label": "cats"},
        {"file_name": "cats/1.png", "text": None, "label": "cats"},
        {"file_name": "dogs/2.png", "text": "a dog", "label": "dogs"},
    ]
    assert not (tmp_path / "tables").exists()
    monkeypatch.setattr("diffusers_imagen.training.data.sources.ROWS_IN_MEMORY", 2)
    assert list(rows()) == in_memory and list((tmp_path / "tables").rglob("*.arrow"))
    with monkeypatch.context() as patch:  # the second time, from the table
        patch.setattr("diffusers_imagen.training.data.image_folders.read_caption", None)
        assert list(rows()) == in_memory
    write(tmp_path / "d", {"dogs/2.caption": b"two dogs"})
    assert list(rows())[2]["text"] == "two dogs"
    write(tmp_path / "d", {"dogs/2.caption": b"\xff"})
    with pytest.raises(ValueError, match="the caption '.*dogs/2.caption' cannot be read: 'utf-8' codec"):
        rows()


def test_captions_are_one_line_and_labels_are_folders(tmp_path, encode):
    seen = []

    def listen(captions):
        seen.extend(captions)
        return encode(captions)

    write(
        tmp_path / "d",
        {"cats/a.png": picture(0), "cats/a.txt": b"one\r\n two\n", "dogs/a.png": picture(1), "dogs/a.txt": b"b"},
    )
    read(str(tmp_path / "d"), "memory", FunctionSource(listen, 1))
    assert set(seen) == {"one two", "b"}
    read(str(tmp_path / "d"), "memory", FunctionSource(listen, 1), caption_column=["label"])
    assert set(seen) == {"one two", "b", "cats", "dogs"}


def test_pictures_without_captions_are_refused_where_captions_are_needed(tmp_path, encode):
    message = refusal(write(tmp_path / "d", PICTURES), "memory", encode)
    assert message.startswith("The data set lacks the columns ['text']; it has ['file_name']: name a column")


def test_a_picture_whose_name_is_not_utf_8_is_named(tmp_path, encode):
    folder = write(tmp_path / "d", PICTURES)
    (tmp_path / "d" / os.fsdecode(b"\xff.png")).write_bytes(picture(0))
    assert r"the image b'\xff.png' has a name that is not UTF-8" in refusal(folder, "memory", encode, caption="a")


def test_a_caption_that_is_no_file_is_refused(tmp_path, encode):
    folder = write(tmp_path / "d", PICTURES)
    os.mkfifo(tmp_path / "d" / "plain.txt")
    assert "plain.txt' is a pipe" in refusal(folder, "memory", encode)


@pytest.mark.parametrize("reader", READERS)
def test_a_pipe_among_pictures_is_named(tmp_path, encode, reader):
    folder = write(tmp_path / "d", PICTURES)
    os.mkfifo(tmp_path / "d" / "z.png")
    drawn, skipped = read(folder, reader, encode, caption="x")
    assert drawn == set(range(5)) and list(skipped) == ["z.png"] and "not a regular file" in skipped["z.png"]


def test_folders_decide_on_splits():
    assert group_by_split(["a.png", "train.png"], False) == {"train": ["a.png", "train.png"]}
    files = ["Training/a.png", "cats/val_2017/b.png", "data-test/c.png"]
    assert group_by_split(files, False) == {s: [f] for s, f in zip(("train", "validation", "test"), files)}
    with pytest.raises(ValueError, match="such as 'train/a.png' of 'train', and 1 without a split, such as 'b.png'"):
        group_by_split(["b.png", "train/a.png"], False)
    files = ["data/own-00000-of-00002.tar", "data/own-00001-of-00002.tar", "data/test-00000-of-00001.tar"]
    assert group_by_split(files, True) == {"own": files[:2], "test": files[2:]}


def test_a_folder_that_holds_itself_is_read_once(tmp_path):
    write(tmp_path / "d", {"a/x.png": b"", "b/y.png": b""})
    os.symlink(tmp_path / "d", tmp_path / "d" / "a" / "again")
    os.symlink(tmp_path / "d" / "a", tmp_path / "d" / "linked")
    assert list_files(str(tmp_path / "d")) == ["a/x.png", "b/y.png", "linked/x.png"]


def test_pictures_beside_shards_are_refused(tmp_path, encode):
    folder = write(tmp_path / "d", PICTURES | {"a.tar": tar({})})
    assert "it has images, such as" in refusal(folder, "memory", encode, caption="x")


def test_tables_that_belong_to_no_split_are_refused(tmp_path, encode):
    folder = write(tmp_path / "d", {"train.jsonl": lines(ROWS), "more.jsonl": lines(ROWS)})
    assert "1 of its files belong to no split, such as 'more.jsonl'" in refusal(folder, "memory", encode)


# ---- metadata files


@pytest.mark.parametrize("reader", READERS)
def test_metadata_in_the_folders_of_splits(tmp_path, encode, reader):
    files = {
        f"train/{part}/{name}": data for part, name, data in (("a", "0.png", picture(0)), ("b", "0.png", picture(1)))
    }
    files |= {f"train/{part}/metadata.jsonl": lines(ROWS[:1]) for part in "ab"}
    files |= {"validation/2.png": picture(2), "validation/metadata.jsonl": lines(ROWS[2:3])}
    folder = write(tmp_path / "d", files)
    assert read(folder, reader, encode) == ({0, 1}, {})
    assert read(folder, reader, encode, train_split="validation") == ({2}, {})


BAD_ROWS = {
    "no caption": ({"file_name": "3.png", "text": None}, "3.png", "the caption is None"),
    "a number": ({"file_name": "3.png", "text": 7}, "3.png", "the caption is 7"),
    "no caption at all": ({"file_name": "3.png"}, "3.png", "the caption is None"),
    "no file": ({"text": "a"}, "row 3", "the cell is empty"),
    "a URL": ({"file_name": "http://127.0.0.1:9/a.png", "text": "a"}, "http://127.0.0.1:9/a.png", "is a URL"),
    "a bucket": ({"file_name": "s3://b/a.png", "text": "a"}, "s3://b/a.png", "is a URL"),
    "the Hub": ({"file_name": "hf://datasets/a/b/c.png", "text": "a"}, "hf://datasets/a/b/c.png", "is a URL"),
    "a file URL": ({"file_name": "file:///etc/hosts", "text": "a"}, "file:///etc/hosts", "is a URL"),
    "a folder above": ({"file_name": "../a.png", "text": "a"}, "../a.png", "is outside the data set's folder"),
    "another folder": ({"file_name": "/etc/hosts", "text": "a"}, "/etc/hosts", "is outside the data set's folder"),
}


@pytest.mark.parametrize("row, name, reason", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_row_that_cannot_be_used_is_skipped_by_name_in_every_mode(tmp_path, encode, monkeypatch, row, name, reason):
    monkeypatch.setattr("fsspec.open", lambda *args, **kwargs: pytest.fail("a file system was opened"))
    folder = write(tmp_path / "d", NUMBERED | {"metadata.jsonl": lines([*ROWS[:3], row])})
    for reader in READERS:
        drawn, skipped = read(folder, reader, encode)
        assert drawn == {0, 1, 2}
        ((found, why),) = skipped.items()
        assert (found == name or found == f"{name} of shard 0") and reason in why


BAD_TABLES = {
    "cut": ("metadata.jsonl", lines(ROWS)[:-4], "line 4 is not JSON: Unterminated string"),
    "broken": ("metadata.jsonl", lines(ROWS[:2]) + b'\n{"file_name":\n' + lines(ROWS), "line 3 is not JSON"),
    "zeros": ("metadata.jsonl", lines(ROWS[:2]) + b"\n" + bytes(9), "line 3 is not JSON"),
    "not UTF-8": ("metadata.jsonl", lines(ROWS[:2]) + b'\n{"text": "\xff"}', "line 3 is not in UTF-8"),
    "a number": ("metadata.jsonl", lines(ROWS[:2]) + b"\n\n3", "line 4 has a JSON int, but should have an object"),
    "deep": ("metadata.jsonl", lines(ROWS[:1]) + b"\n" + b'{"a":' * 10**5, "line 2 is JSON that is nested too deeply"),
    "no row": ("metadata.jsonl", b"\n", "whose metadata file is empty"),
    "a value too many": ("metadata.csv", b"file_name,text\n0.png,a\n1.png,a,b\n", "line 3 has 3 values"),
    "values too many": ("metadata.csv", b"file_name,text\n0.png,a,b\n1.png,a,b\n", "line 2 has 3 values"),
    "a quote": ("metadata.csv", b'file_name,text\n0.png,"a\n1.png,b\n', "line 3 is not CSV: unexpected end"),
    "a CSV not UTF-8": ("metadata.csv", b"file_name,text\n0.png,\xff\n", "line 2 is not in UTF-8"),
    "no rows": ("metadata.csv", b"file_name,text\n", "whose metadata file is empty"),
    "an empty CSV": ("metadata.csv", b"", "whose metadata file is empty"),
    "no Parquet": ("metadata.parquet", b"PAR1....PAR1", "metadata.parquet' is not a Parquet file, or incomplete"),
    "a cut shard": ("train.parquet", b"PAR1....", "train.parquet' is not a Parquet file, or incomplete"),
    "a broken table": ("data.jsonl", lines(ROWS)[:-4], "data.jsonl', line 4 is not JSON"),
}


@pytest.mark.parametrize("name, data, message", BAD_TABLES.values(), ids=BAD_TABLES)
def test_a_broken_table_is_named_with_its_line(tmp_path, encode, name, data, message):
    pictures = NUMBERED if name.startswith("metadata") else {}
    folder = write(tmp_path / "d", pictures | {name: data})
    for reader in ("memory", "stream"):
        found = refusal(folder, reader, encode)
        assert found.startswith(f"`train_data_dir` is '{folder}', wh") and message in found


@pytest.mark.parametrize("name", ["metadata.parquet", "train.parquet"])
def test_damage_inside_a_parquet_file_is_named(tmp_path, encode, name):
    parquet = io.BytesIO()
    Dataset.from_dict({"file_name": [f"{i}.png" for i in range(500)], "text": ["a"] * 500}).to_parquet(parquet)
    damaged = bytearray(parquet.getvalue())
    damaged[4:200] = bytes(196)
    folder = write(tmp_path / "d", {name: bytes(damaged)})
    assert f"'{folder}/{name}' " in refusal(folder, "memory", encode)


def test_metadata_that_is_no_file_is_refused(tmp_path, encode):
    folder = write(tmp_path / "d", NUMBERED)
    os.mkfifo(tmp_path / "d" / "metadata.jsonl")
    assert "metadata.jsonl' is a pipe" in refusal(folder, "memory", encode)


@pytest.mark.parametrize("reader", READERS)
def test_metadata_of_every_kind_is_read(tmp_path, encode, reader):
    parquet = io.BytesIO()
    Dataset.from_list(ROWS).to_parquet(parquet)
    csv = b"\xef\xbb\xbffile_name,text\n" + b"".join(b'%d.png,"n, %d"\n' % (i, i) for i in range(4))
    kinds = {"metadata.jsonl": lines(ROWS), "metadata.csv": csv, "metadata.parquet": parquet.getvalue()}
    for name, data in kinds.items():
        folder = write(tmp_path / f"{name} [1]", NUMBERED | {name: data})
        assert read(folder, reader, encode) == (set(range(4)), {})


def test_a_data_set_that_is_no_such_is_refused(tmp_path, encode):
    for files in ({"dataset_dict.json": b"[]"}, {"state.json": b"{}", "dataset_info.json": b"[]"}):
        folder = write(tmp_path / str(len(files)), files)
        with pytest.raises(ValueError, match="`dataset_name` is .*, which cannot be opened: "):
            open_rows(DataConfig(dataset_name=folder), "train")
