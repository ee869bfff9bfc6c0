"""Data sets from files of every kind, at hand and as streams."""

import io
import json
import random
import tarfile
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, Value
from PIL import Image as PILImage

from diffusers_imagen.training import TrainingConfig
from diffusers_imagen.training.checkpoints import Checkpoints, seal
from diffusers_imagen.training.data import DataConfig, make_train_batches, make_validation_batches
from diffusers_imagen.training.data.pieces import pack, unpack
from diffusers_imagen.training.data.sources import open_rows
from diffusers_imagen.training.data.streaming import ShardReader


NUM_ROWS = 24


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def png(i: int) -> bytes:
    file = io.BytesIO()
    PILImage.new("RGB", (8, 8), (10 * i, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_tars(folder: Path, num_shards: int, bad: tuple[int, ...] = ()) -> str:
    folder.mkdir()
    for shard in range(num_shards):
        with tarfile.open(folder / f"train-{shard:03d}.tar", "w") as tar:
            for i in range(shard, NUM_ROWS, num_shards):
                for name, data in (
                    (f"{i:04d}.png", b"bad" if i in bad else png(i)),
                    (f"{i:04d}.txt", f"n {i}".encode()),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return str(folder)


def write_parquet(folder: Path) -> str:
    folder.mkdir()
    features = Features({"picture": Image(), "label": Value("string"), "number": Value("int64")})
    rows = {
        "picture": [{"bytes": png(i), "path": None} for i in range(NUM_ROWS)],
        "label": [f"n {i}" for i in range(NUM_ROWS)],
        "number": list(range(NUM_ROWS)),
    }
    data = Dataset.from_dict(rows, features=features)
    for name, part in (("train", range(16)), ("test", range(16, NUM_ROWS))):
        data.select(part).to_parquet(folder / f"{name}.parquet")
    return str(folder)


def config_of(folder: str, **kwargs) -> TrainingConfig:
    return TrainingConfig(
        **{"train_data_dir": folder, "preset": "emoji_base_64", "resolution": 8, "train_batch_size": 4} | kwargs
    )


def numbers(batch) -> list[int]:
    return (((batch.images[:, 0, 0, 0] + 1) * 12.75).round()).int().tolist()


def check_captions(batch, decode) -> None:
    assert decode(batch.text, batch.text_mask) == [f"n {i}" for i in numbers(batch)]


TAR = {"image_column": "png", "caption_column": ["txt"]}


def test_parquet_with_splits_by_name(tmp_path, encode, decode):
    config = config_of(write_parquet(tmp_path / "d"), caption_column=["label"], validation_split="test")
    stream = make_train_batches(config, encode)  # the only column with images is found
    batches = [next(stream) for _ in range(4)]
    assert sorted(i for batch in batches for i in numbers(batch)) == list(range(16))
    for batch in batches:
        check_captions(batch, decode)
    held_out = [i for batch in make_validation_batches(config, encode) for i in numbers(batch)]
    assert sorted(held_out) == list(range(16, 24))
    few = make_train_batches(replace(config, max_train_samples=3))
    assert len({i for _ in range(4) for i in numbers(next(few))}) == 3
    with pytest.raises(ValueError, match=r"There is no split 'trian'; the data set has \['test', 'train'\]"):
        open_rows(config, "trian")
    with pytest.raises(
        ValueError, match="`caption_column` 'number' has int64, but should have text or lists of words"
    ):
        open_rows(replace(config, caption_column=["number"]), "train")


def test_a_data_set_that_datasets_wrote(tmp_path, encode, decode):
    rows = {"image": [png(i) for i in range(6)], "text": [f"n {i}" for i in range(6)]}
    DatasetDict(train=Dataset.from_dict(rows)).save_to_disk(tmp_path / "saved")
    batch = next(make_train_batches(config_of(None, dataset_name=str(tmp_path / "saved")), encode))
    check_captions(batch, decode)


def test_folders_of_images_by_split(tmp_path):
    for split, count in (("train", 5), ("validation", 2)):
        (tmp_path / "d" / split).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "d" / split / f"{i}.png").write_bytes(png(i))
    config = config_of(str(tmp_path / "d"), validation_split="validation", train_batch_size=5)
    assert sorted(numbers(next(make_train_batches(config)))) == list(range(5))
    assert {i for batch in make_validation_batches(config) for i in numbers(batch)} == {0, 1}


def test_an_empty_data_set_is_refused(tmp_path, encode):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "metadata.jsonl").write_text("")
    with pytest.raises(ValueError, match="`train_data_dir` is .*, whose metadata file is empty"):
        make_train_batches(config_of(str(tmp_path / "d")), encode)
    with pytest.raises(ValueError, match="There is no data: set `train_data_dir` or `dataset_name`"):
        make_train_batches(config_of(None), encode)
    with pytest.raises(ValueError, match="`train_data_dir` is '/nowhere', which is not a folder"):
        make_train_batches(config_of("/nowhere"), encode)


@pytest.mark.parametrize("streaming", [True, False])
def test_tar_shards(tmp_path, encode, decode, streaming):
    config = config_of(write_tars(tmp_path / "d", 4, bad=(5,)), streaming=streaming, **TAR)
    stream = make_train_batches(config, encode)
    batches = [next(stream) for _ in range(6)]
    for batch in batches:
        check_captions(batch, decode)
    drawn = [i for batch in batches for i in numbers(batch)]
    assert 5 not in drawn and any("0005.png" in name for name in stream.skipped)
    assert len(set(drawn)) >= 21
    assert drawn != sorted(drawn)


STREAMS = {"one reader": (4, 1, 0), "workers": (4, 1, 2), "processes": (4, 2, 2), "too few shards": (1, 2, 2)}


@pytest.mark.parametrize("shards, processes, workers", STREAMS.values(), ids=STREAMS)
def test_readers_of_a_stream_share_its_rows(tmp_path, shards, processes, workers):
    folder = write_tars(tmp_path / "d", shards)
    config = config_of(
        folder, streaming=True, dataloader_num_workers=workers, train_batch_size=3, shuffle_buffer_size=5, **TAR
    )
    streams = [make_train_batches(config, None, process, processes) for process in range(processes)]
    drawn = [i for stream in streams for _ in range(8 // processes) for i in numbers(next(stream))]
    assert Counter(drawn) == Counter(range(NUM_ROWS))  # an epoch: each reader has a like share
    drawn += [i for stream in streams for _ in range(8 // processes) for i in numbers(next(stream))]
    assert Counter(drawn) == Counter(2 * list(range(NUM_ROWS)))
    assert drawn[:NUM_ROWS] != drawn[NUM_ROWS:]


@pytest.mark.parametrize("shards, processes, workers", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("after", [1, 4])
def test_a_stream_is_resumed_exactly(tmp_path, shards, processes, workers, after):
    folder = write_tars(tmp_path / "d", shards, bad=(7,))
    config = config_of(
        folder,
        streaming=True,
        dataloader_num_workers=workers,
        train_batch_size=3,
        shuffle_buffer_size=4,
        random_flip=True,
        **TAR,
    )
    process = processes - 1
    stream = make_train_batches(config, None, process, processes)
    straight = [next(stream).images for _ in range(after + 5)]
    stream = make_train_batches(config, None, process, processes)
    for _ in range(after):
        next(stream)
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = make_train_batches(config, None, process, processes)
    resumed.load_state_dict(state)
    for expected in straight[after:]:
        assert torch.equal(next(resumed).images, expected)
    with pytest.raises(ValueError, match="The stream was saved with .*'train_batch_size': 3.*, but this run has"):
        make_train_batches(replace(config, train_batch_size=2), None, process, processes).load_state_dict(state)


def test_streamed_rows_are_chosen_by_column_and_counted(tmp_path, encode, decode):
    (tmp_path / "d").mkdir()
    rows = []
    for i in range(6):
        (tmp_path / "d" / f"{i}.png").write_bytes(png(i))
        rows.append({"file_name": f"{i}.png", "text": f"n {i}", "split": "train" if i % 2 else "test"})
    (tmp_path / "d" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = config_of(str(tmp_path / "d"), streaming=True, train_batch_size=3)
    batch = next(make_train_batches(config, encode))
    check_captions(batch, decode)
    assert sorted(numbers(batch)) == [1, 3, 5]
    few = make_train_batches(replace(config, max_train_samples=2), encode)
    assert {i for _ in range(2) for i in numbers(next(few))} == {1, 3}
    with pytest.raises(ValueError, match="The stream has no row"):
        next(make_train_batches(replace(config, train_split="trian"), encode))


def test_validation_of_a_stream_is_the_same_each_time(tmp_path):
    config = config_of(write_tars(tmp_path / "d", 2), streaming=True, validation_split="train", **TAR)
    batches = make_validation_batches(config, num_images=8)
    first, second = ([numbers(batch) for batch in batches] for _ in range(2))
    assert first == second and len(first) == 2


def rows_until_a_cut(shards: list[int]):
    """As of a shard on the Hub that was cut in an image."""
    for shard in shards:
        for i in range(6):
            yield {"png": png(i), "txt": "a"}
        if shard == 1:
            raise tarfile.ReadError("unexpected end of data")


def test_a_shard_that_ends_in_the_middle_of_a_run_is_named():
    data = IterableDataset.from_generator(rows_until_a_cut, gen_kwargs={"shards": [0, 1]})
    reader = ShardReader(data, seed=0, reader=0, num_readers=1, block_size=4)
    with pytest.raises(
        ValueError, match="Shard 1 of the stream cannot be read further after 1 blocks of 4 rows: .*unexpected"
    ):
        list(islice(reader, 100))


def test_random_places_show_all_of_an_image(tmp_path):
    (tmp_path / "d").mkdir()
    ramp = np.broadcast_to(np.arange(32, dtype=np.uint8)[None, :, None] * 8, (8, 32, 3))
    PILImage.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "d" / "a.png")
    (tmp_path / "d" / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "split": "train"}))
    config = config_of(str(tmp_path / "d"), center_crop=False, train_batch_size=200)
    left = (next(make_train_batches(config)).images[:, 0, 0, 0] + 1) * 127.5 / 8
    assert left.min() < 1 and left.max() > 23
    config = replace(config, center_crop=True, train_batch_size=2)
    assert ((next(make_train_batches(config)).images[:, 0, 0, 0] + 1) * 127.5 / 8).round().tolist() == [12, 12]


@pytest.mark.parametrize("streaming", [False, True])
def test_one_caption_for_all_images(imagefolder, tmp_path, streaming):
    """Of a folder with captions, and of one that has only images."""
    bare = tmp_path / "bare"
    bare.mkdir()
    PILImage.new("RGB", (8, 8)).save(bare / "0.png")
    for folder, count in ((imagefolder, 6), (str(bare), 1)):
        config = DataConfig(train_data_dir=folder, caption="a dog", streaming=streaming)
        assert [row["text"] for row in open_rows(config, "train").data] == ["a dog"] * count
    with pytest.raises(ValueError, match="`caption` and `caption_column` .'tags'. are both given"):
        DataConfig(train_data_dir=imagefolder, caption="a dog", caption_column=["tags"])


def epochs_of(streams: list, steps: int) -> list[tuple[int, int]]:
    """The epoch and the number of each row that the processes draw, one at a time and in turn."""
    drawn = []
    for _ in range(steps):
        for stream in streams:
            before = list(stream.places)
            (number,) = numbers(next(stream))
            (worker,) = [i for i, place in enumerate(stream.places) if place is not before[i]]
            drawn.append((stream.places[worker]["epoch"], number))
    return drawn


CHANGES = {
    "more": (4, (1, 2, 5), (2, 3, 4), (3, 1, 3)),
    "fewer": (4, (2, 2, 3), (1, 1, 9), (1, 3, 2)),
    "one shard": (1, (1, 1, 5), (2, 0, 4), (3, 0, 1)),
}


@pytest.mark.parametrize("shards, runs", [(shards, runs) for shards, *runs in CHANGES.values()], ids=CHANGES)
def test_other_readers_read_what_is_left_of_each_epoch(tmp_path, shards, runs):
    """Runs of (processes, workers, steps), each of which goes on where the one before stopped."""
    folder = write_tars(tmp_path / "d", shards)
    config = config_of(folder, streaming=True, train_batch_size=1, shuffle_buffer_size=4, **TAR)
    drawn: list[tuple[int, int]] = []
    states: list[dict] = []
    for processes, workers, steps in (*runs, (2, 0, 2 * NUM_ROWS)):
        own = replace(config, dataloader_num_workers=workers)
        streams = [make_train_batches(own, None, process, processes) for process in range(processes)]
        for stream in streams if states else []:
            stream.load_state_dicts(states)
            assert stream.images_seen == len(drawn)
        drawn += epochs_of(streams, steps)
        states = json.loads(json.dumps([stream.state_dict() for stream in streams]))
    whole = min(epoch for epoch, _ in drawn[-2:])  # earlier ones have been read by all
    assert whole >= 1 and Counter(drawn).most_common(1)[0][1] == 1
    for epoch in range(whole):
        assert sorted(row for own, row in drawn if own == epoch) == list(range(NUM_ROWS))


def counted(shards: list[int], rows: int):
    for shard in shards:
        for row in range(rows):
            yield {"number": shard * rows + row}


@pytest.mark.parametrize("seed", range(40))
def test_every_row_is_read_once_per_epoch_by_whatever_readers(seed):
    """Up to five changes of the number of readers, each after numbers of rows that differ between readers."""
    draw = random.Random(seed)
    shards, rows, block_size = draw.randint(1, 5), draw.randint(5, 12), draw.randint(1, 6)
    data = IterableDataset.from_generator(counted, gen_kwargs={"shards": list(range(shards)), "rows": rows})
    remaining: dict[int, list] = {}
    drawn = []

    def read(reader: ShardReader, count: int) -> None:
        drawn.extend((reader.state["epoch"], row["number"]) for row in islice(reader, count))

    for _ in range(draw.randint(2, 5)):
        count = draw.randint(1, 5)
        readers = [ShardReader(data, 0, i, count, block_size, remaining) for i in range(count)]
        for reader in readers:
            read(reader, draw.randint(0, rows))
        epochs = [reader.state["epoch"] for reader in readers]
        begun = range(min(epochs), max([*epochs, *remaining]) + 1)
        left = {epoch: [piece for reader in readers for piece in reader.left(epoch)] for epoch in begun}
        remaining = unpack(json.loads(json.dumps(pack(left))))
    last = max((epoch for epoch, _ in drawn), default=0)
    read(ShardReader(data, 0, 0, 1, block_size, remaining), (last + 1) * shards * rows - len(drawn))
    assert Counter(drawn) == Counter((epoch, row) for epoch in range(last + 1) for row in range(shards * rows))


def test_a_reader_is_resumed_after_every_row():
    """Also several times within a block, at its end, and at the end of an epoch of one block."""
    data = IterableDataset.from_generator(counted, gen_kwargs={"shards": [0, 1], "rows": 7})
    for block_size in (3, 7, 100):
        for number in (0, 1):
            straight = [row["number"] for row in islice(ShardReader(data, 0, number, 2, block_size), 20)]
            resumed, state = [], None
            for _ in range(20):
                reader = ShardReader(data, 0, number, 2, block_size)
                reader.state = state or reader.state
                resumed.append(next(iter(reader))["number"])
                state = json.loads(json.dumps(reader.state))
            assert resumed == straight


def test_checkpoints_give_a_stream_the_positions_of_all_processes(tmp_path):
    folder = write_tars(tmp_path / "d", 4)
    config = config_of(folder, streaming=True, train_batch_size=1, output_dir=str(tmp_path / "out"), **TAR)

    def make(processes: int) -> list[Checkpoints]:
        accelerators = (SimpleNamespace(process_index=i, is_main_process=i == 0) for i in range(processes))
        made = [Checkpoints(accelerator, config, {}) for accelerator in accelerators]
        for process, checkpoints in enumerate(made):
            checkpoints.own["data"] = make_train_batches(config, None, process, processes)
        return made

    (tmp_path / "c").mkdir()
    first = make(3)
    drawn = epochs_of([checkpoints.own["data"] for checkpoints in first], 2)
    for checkpoints in first:
        checkpoints._write(tmp_path / "c")
    seal(tmp_path / "c", {})
    second = make(2)
    for checkpoints in second:
        checkpoints.load(tmp_path / "c")
    drawn += epochs_of([checkpoints.own["data"] for checkpoints in second], NUM_ROWS)
    assert sorted(row for epoch, row in drawn if epoch == 0) == list(range(NUM_ROWS))


def test_positions_of_a_stream_that_do_not_fit_are_refused(tmp_path):
    config = config_of(write_tars(tmp_path / "d", 4), streaming=True, train_batch_size=2, shuffle_buffer_size=4, **TAR)
    states = [make_train_batches(config, None, process, 2).state_dict() for process in range(2)]
    with pytest.raises(ValueError, match="a stream of 2 processes has 1 positions"):
        make_train_batches(config).load_state_dicts(states[:1])
    with pytest.raises(ValueError, match="`shuffle_buffer_size` is 5, but should be 4"):
        make_train_batches(replace(config, shuffle_buffer_size=5)).load_state_dicts(states)
