"""Rows that lack a caption: passed over, named and counted, in one way in every mode."""

import logging

import pytest
from data_files import READERS, lines, picture, read, refusal, write
from datasets import Dataset

from diffusers_imagen.training.data.captions import iterate_captions


NUMBERED = {f"{i}.png": picture(i) for i in range(4)}
ROWS = [{"file_name": f"{i}.png", "text": f"n {i}"} for i in range(4)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_captions_that_are_missing_are_counted(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers_imagen"), "propagate", True)
    rows = Dataset.from_dict({"text": ["a", None, "b", None], "tags": [["x"], ["y"], None, ["z", "w"]]})
    with caplog.at_level(logging.WARNING):
        assert list(iterate_captions(rows, ["text", "tags"])) == ["a", "b", "x", "y", "z, w"]
    assert "3 of 8 captions cannot be used, and their rows are skipped; `caption_column` 'text', row 1" in caplog.text
    with pytest.raises(ValueError, match="None of the 2 captions can be used; `caption_column` 'text', row 0: "):
        list(iterate_captions(Dataset.from_dict({"text": [None, None]}), ["text"]))


@pytest.mark.parametrize("reader", READERS)
def test_a_row_is_used_with_all_its_captions_or_not_at_all(tmp_path, encode, reader):
    rows = [{**row, "tags": ["a"] if i != 2 else None} for i, row in enumerate(ROWS)]
    folder = write(tmp_path / "d", NUMBERED | {"metadata.jsonl": lines(rows)})
    drawn, skipped = read(folder, reader, encode, caption_column=["text", "tags"])
    assert drawn == {0, 1, 3} and list(skipped) == ["2.png"]


@pytest.mark.parametrize("row", [{"text": None}, {"text": 7}, {}], ids=["null", "a number", "none"])
def test_a_row_without_a_caption_is_skipped_by_name(tmp_path, encode, row):
    folder = write(tmp_path / "d", NUMBERED | {"metadata.jsonl": lines([*ROWS[:3], {"file_name": "3.png", **row}])})
    for reader in READERS:
        drawn, skipped = read(folder, reader, encode)
        assert drawn == {0, 1, 2} and list(skipped) == ["3.png"]
        assert skipped["3.png"] == f"the caption is {row.get('text')}, but should be text or a list of words"


@pytest.mark.parametrize("reader", READERS)
def test_a_set_without_a_caption_is_refused(tmp_path, encode, reader):
    rows = [{"file_name": f"{i}.png", "text": None} for i in range(4)]
    message = refusal(write(tmp_path / "d", NUMBERED | {"metadata.jsonl": lines(rows)}), reader, encode)
    assert message.startswith("`caption_column` 'text' has null, but should have text or lists of words")
