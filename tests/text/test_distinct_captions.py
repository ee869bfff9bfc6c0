"""Distinct captions are those that a set has, in the order of their lengths, without their text in memory."""

import random
import tracemalloc

import numpy as np
import pyarrow
import pytest
from datasets import Dataset

from diffusers_imagen.text import distinct_captions
from diffusers_imagen.text.distinct_captions import DistinctCaptions, caption_digest
from diffusers_imagen.training.data.captions import index_captions, iterate_captions


WORDS = ["a", "", "\0", "b", "é", "\uffff", "\U0001f600", "a photo of a house", " "]


def texts_of(captions: DistinctCaptions) -> list[str]:
    return captions[0 : len(captions)]


def make_texts(count: int) -> list[str]:
    """Texts of which many have the same length, begin alike for several prefixes, or are the same."""
    draw = random.Random(0)
    texts = ["".join(draw.choices(WORDS, k=draw.randrange(4))) for _ in range(count)]
    return texts + ["the same beginning of all, which is long: " + text for text in texts]


@pytest.mark.parametrize("most_text", [1, 500, 2**26])
@pytest.mark.parametrize("least_merged", [1, 2**20])
def test_captions_are_distinct_and_sorted(monkeypatch, most_text, least_merged):
    monkeypatch.setattr(distinct_captions, "MOST_TEXT", most_text)
    monkeypatch.setattr(distinct_captions, "LEAST_MERGED", least_merged)
    monkeypatch.setattr(distinct_captions, "INDEXED_AT_ONCE", 7)
    monkeypatch.setattr(distinct_captions, "READ_AT_ONCE", 3)
    texts = make_texts(400)
    expected = sorted(set(texts), key=lambda text: (len(text), text))
    captions = DistinctCaptions.of(texts)
    assert len(captions) == len(expected) < len(texts)
    captions = captions.by_length()
    assert texts_of(captions) == expected and captions[3:5] == expected[3:5]

    known = np.array([caption_digest(text) for text in (*expected[::2], "another")], "S16")
    assert texts_of(captions.without(known).by_length()) == expected[1::2]


def test_the_empty_text_is_added_once():
    for texts in ([], ["b", "a"], ["b", "", "a"]):
        captions = DistinctCaptions.of(texts).with_empty().by_length()
        assert texts_of(captions) == ["", *sorted(set(texts) - {""})]
    assert texts_of(DistinctCaptions.of([]).by_length()) == []


def test_captions_of_several_splits_and_columns_are_read_where_they_are(caplog):
    first = Dataset.from_dict({"text": ["c", None, "aa", "c"], "tags": [["x", "y"], ["z"], [], None]})
    second = Dataset.from_dict({"text": ["bb", "c"], "tags": [["x, y"], ["é", "ü"]]})
    columns = ["text", "tags"]
    captions = index_captions([first, second], columns).by_length()
    assert texts_of(captions) == ["", "c", "z", "aa", "bb", "x, y", "é, ü"]
    assert {text for data in (first, second) for text in iterate_captions(data, columns)} == set(texts_of(captions))
    assert "2 of 8 captions cannot be used" in caplog.text


def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch):
    """10 MB of captions, of which half have one length and begin alike."""
    monkeypatch.setattr(distinct_captions, "MOST_TEXT", 2**20)
    count, characters = 6000, 2000
    schema = pyarrow.schema({"text": pyarrow.string()})
    draw = random.Random(0)
    with open(tmp_path / "a.arrow", "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
        for start in range(0, count, 500):
            lengths = [characters if i % 2 else draw.randrange(characters) for i in range(start, start + 500)]
            texts = [("x" * 10 + f"{i} " + "word " * 400)[: length + 20] for i, length in enumerate(lengths, start)]
            writer.write_table(pyarrow.table({"text": texts}, schema))
    rows = Dataset.from_file(str(tmp_path / "a.arrow"))

    tracemalloc.start()
    captions = index_captions([rows], ["text"]).by_length()
    indexed = tracemalloc.get_traced_memory()[1]
    read = sum(len(text) for start in range(0, count, 100) for text in captions[start : start + 100])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(captions) == count and read > 8 * 2**20
    assert indexed < 6 * 2**20 and peak < 6 * 2**20
    lengths = captions.entries["length"]
    assert (np.diff(lengths) >= 0).all() and captions[count - 3 : count - 2] < captions[count - 2 : count - 1]


def test_reading_some_captions_is_a_lookup_in_the_table(monkeypatch):
    """To select columns takes time that grows with the rows: for every batch that made a cache of millions take days."""
    captions = index_captions([Dataset.from_dict({"text": ["aa", "b"], "n": [1, 2]})], ["text"]).by_length()
    monkeypatch.delattr(Dataset, "select_columns")
    assert texts_of(captions) == ["b", "aa"]
