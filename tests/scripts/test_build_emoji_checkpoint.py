"""The pictures on the card of the shipped cascade."""

from pathlib import Path

import pytest
import yaml
from PIL import Image
from script_modules import script_module


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    with script_module("build_emoji_checkpoint") as module:
        yield module


def test_the_card_shows_the_pictures_that_are_drawn(script, cascade, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "SHOWN", ("a red apple", "a blue face", "a tiger", "a red tiger"))
    cascade.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: apache-2.0\ntags:\n- emoji\n---\n\n# imagen-emoji\n\nSmall.\n")
    monkeypatch.setattr(script.sys, "argv", ["build", "--pictures_of", str(tmp_path)])
    script.main()
    first = card.read_text()
    _, header, body = first.split("---\n", 2)
    data = yaml.safe_load(header)
    assert data["license"] == "apache-2.0" and data["tags"] == ["emoji"]
    assert [entry["text"] for entry in data["widget"]] == list(script.SHOWN)
    for prompt, entry in zip(script.SHOWN, data["widget"]):
        picture = entry["output"]["url"]
        assert Image.open(tmp_path / picture).size == (32, 32) and f"![{prompt}]({picture})" in body
    assert body.startswith("\n# imagen-emoji\n\n") and body.endswith("\n\nSmall.\n")
    # a second time changes nothing
    assert script.show_pictures(first) == first


def test_a_checkpoint_that_is_built_needs_its_parts(script, monkeypatch):
    monkeypatch.setattr(script.sys, "argv", ["build", "--base", "a"])
    with pytest.raises(ValueError, match="`sr256` is not given"):
        script.parse_args()


def test_the_template_of_the_card_takes_them(script):
    names = ("parts", "vocab_size", "num_images", "styles", "example", "style_phrases", "training")
    values = {**dict.fromkeys(names, "x"), "vocab_size": 1, "num_images": 1}
    card = script.CARD.format(widget=script.describe_widget(), pictures=script.describe_pictures(), **values)
    assert script.show_pictures(card) == card
