"""The pictures on the card of the shipped cascade."""

import json
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


@pytest.fixture
def parts(cascade, tmp_path):
    """Arguments of the script for a tiny cascade, which is a run of both stages, and a dataset of one row."""
    run, dataset = tmp_path / "run", tmp_path / "dataset"
    cascade.save_pretrained(run)
    config = {"styles": ["noto"], "train_split": "train", "crop_size": None, "resolution": 16, "p_mean": 0.0}
    config |= {"train_batch_size": 2, "gradient_accumulation_steps": 1}
    (run / "training.json").write_text(json.dumps({"step": 3, "loss": 0.5, "config": config}))
    (dataset / "LICENSES").mkdir(parents=True)
    for name in ("emojibase-data.txt", "iconify-json-noto.txt", "NOTICE.txt"):
        (dataset / "LICENSES" / name).write_text(f"noto: {name}")
    row = {"style": "noto", "split": "train", "text": "a noto emoji of a red apple"}
    (dataset / "metadata.jsonl").write_text(json.dumps(row))
    return ["--base", str(run), "--sr256", str(run), "--text_encoder", str(run), "--dataset", str(dataset)]


@pytest.mark.parametrize("options", [[], ["--limits", "LIMITS"]])
def test_the_card_of_a_draft_has_the_limits_that_are_given_and_no_pictures(
    script, parts, options, tmp_path, monkeypatch
):
    (tmp_path / "LIMITS").write_text("It draws apples only.\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script.sys, "argv", ["build", *parts, "--draft", "--output_dir", "built", *options])
    script.main()
    card = Path("built/README.md").read_text()
    limits = card.split("## Limits\n")[1].split("\n\n## Licences")[0]
    assert limits == ("It draws apples only." if options else script.LIMITS)
    assert "| base | 16 px | 3 | 2 | 6 | 0.0 | 0.5000 | not measured |" in card
    assert "widget" not in card and not Path("built/pictures").exists()


def test_limits_that_are_not_there_are_named_before_anything_is_built(script, parts, tmp_path, monkeypatch):
    monkeypatch.setattr(
        script.sys, "argv", ["build", *parts, "--output_dir", str(tmp_path / "built"), "--limits", "no"]
    )
    with pytest.raises(ValueError, match="`limits` is 'no'"):
        script.main()
    assert not (tmp_path / "built").exists()


def test_the_template_of_the_card_takes_them(script):
    names = ("parts", "vocab_size", "num_images", "styles", "example", "style_phrases", "training", "limits")
    values = {**dict.fromkeys(names, "x"), "vocab_size": 1, "num_images": 1}
    card = script.CARD.format(widget=script.describe_widget(), pictures=script.describe_pictures(), **values)
    assert script.show_pictures(card) == card
