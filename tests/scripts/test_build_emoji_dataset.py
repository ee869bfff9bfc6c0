import importlib.util
import json
import sys
from pathlib import Path

import pytest
from PIL import Image


ROOT = Path(__file__).parents[2]
ROWS = json.loads((ROOT / "tests" / "fixtures" / "emoji_rows.json").read_text(encoding="utf-8"))
ROW_IDS = [f"{row['style']}_{row['code_point']}" for row in ROWS]
SQUARE = '<rect x="2" y="2" width="28" height="28" fill="{}"/>'


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


builder = load_script("build_emoji_dataset")


def write_json(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def cache_dir(tmp_path):
    """The sources as `fetch_package` leaves them, with an apple, a symbol, and a writer in two tones that look alike."""
    cache_dir = tmp_path / "cache"
    names = cache_dir / f"{builder.NAMES.slug}-{builder.NAMES.version}"
    groups = [{"order": 0, "message": "objects"}, {"order": 1, "message": "symbols"}]
    write_json(names / "en" / "messages.json", {"groups": groups})
    apple = {"label": "red apple", "hexcode": "1F34E", "group": 0, "tags": ["fruit"]}
    writer = {"label": "writer", "hexcode": "270D-FE0F", "group": 0}
    writer["skins"] = [{"label": "writer: dark skin tone", "hexcode": "270D-1F3FF", "group": 0, "tone": 5}]
    write_json(names / "en" / "data.json", [apple, writer, {"label": "star", "hexcode": "2B50", "group": 1}])
    (names / "LICENSE").write_text("licence of the names")

    for style in builder.STYLES.values():
        folder = cache_dir / f"{style.package.slug}-{style.package.version}"
        write_json(folder / "package.json", {"name": style.package.name, "version": "1", "license": "MIT"})
        if not style.is_vector:
            (folder / "assets").mkdir()
            Image.new("RGBA", (256, 256), "red").save(folder / "assets" / "1f34e.webp")
            continue
        icons = {"red-apple": {"body": SQUARE.format("red")}, "star": {"body": SQUARE.format("yellow")}}
        icons |= {"writer": {"body": SQUARE.format("blue")}, "writer-dark-skin-tone": {"body": SQUARE.format("blue")}}
        characters = {"1f34e": "red-apple", "2b50": "star", "270d": "writer", "270d-1f3ff": "writer-dark-skin-tone"}
        write_json(folder / "icons.json", {"width": 32, "height": 32, "icons": icons})
        write_json(folder / "chars.json", {} if style.name == "blob" else characters)
        write_json(folder / "info.json", {"name": style.name, "license": {"title": "A licence", "spdx": "MIT"}})
    return cache_dir


def build(cache_dir, output_dir, *arguments):
    builder.main([f"--output_dir={output_dir}", f"--cache_dir={cache_dir}", "--num_workers=1", *arguments])
    return [json.loads(line) for line in (output_dir / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def test_fixture_covers_all_splits_and_styles():
    assert {row["style"] for row in ROWS} == set(builder.STYLES)
    assert {row["split"] for row in ROWS} == {"train", "test_concept", "test_tone", "test_style"}


@pytest.mark.parametrize("row", ROWS, ids=ROW_IDS)
def test_caption(row):
    assert builder.make_caption(row["style"], row["concept"], row["tone"]) == row["caption"]


@pytest.mark.parametrize("row", ROWS, ids=ROW_IDS)
def test_split(row):
    assert builder.choose_split(row["concept"], row["tone"], row["style"], row["num_styles"]) == row["split"]


@pytest.mark.parametrize("row", [row for row in ROWS if row["style"] == "blob"], ids=lambda row: row["code_point"])
def test_label_slug(row):
    assert builder.label_slug(row["label"]) == row["icon_name"]


@pytest.mark.parametrize(
    ("code_point", "normalized"),
    [("1F9D1-200D-2708-FE0F", "1f9d1-200d-2708"), ("1f34e", "1f34e"), ("0023-FE0F-20E3", "0023-20e3")],
)
def test_normalize_code_point(code_point, normalized):
    assert builder.normalize_code_point(code_point) == normalized


def test_rows(cache_dir):
    """Symbols are left out, and of two equal pictures the first by code point is kept."""
    _, _, rows = builder.load_sources(cache_dir)
    code_points = {style: [row.code_point for row in rows if row.style == style] for style in builder.STYLES}
    assert code_points.pop("3d") == ["1f34e"]
    assert all(found == ["1f34e", "270d"] for found in code_points.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--styles", "cubist"], "'cubist' (choose from"),
        (["--styles"], "expected at least one argument"),
        (["--resolution", "128"], "128 is too small"),
        (["--resolution", "512"], "3d exists at 256 px only"),
        (["--resolution", "512", "--styles", "flat", "3d"], "the vector styles are: flat line noto blob twemoji"),
        (["--num_workers", "0"], "0 is too small"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        builder.parse_args(["--output_dir", "unused", *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_npm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="npm is needed to download emojibase-data@17.0.0"):
        builder.fetch_package(builder.NAMES, tmp_path / "cache")


def test_pixel_style(cache_dir, tmp_path):
    (row,) = build(cache_dir, tmp_path / "emoji", "--styles", "3d")
    assert row["text"] == "a 3d render of a red apple"
    with Image.open(tmp_path / "emoji" / row["file_name"]) as image:
        assert (image.size, image.mode) == ((256, 256), "RGBA")
    licences = tmp_path / "emoji" / "LICENSES"
    assert (licences / "emojibase-data.txt").read_text() == "licence of the names"
    assert "Microsoft" in (licences / "NOTICE.txt").read_text()
    assert "SPDX: MIT" in (licences / "lobehub-fluent-emoji-3d.txt").read_text()


def test_vector_styles_resume_and_rescale(cache_dir, tmp_path):
    pytest.importorskip("resvg_py")
    output_dir = tmp_path / "emoji"
    rows = build(cache_dir, output_dir, "--styles", "flat", "line")
    assert [row["style"] for row in rows] == ["flat", "flat", "line", "line"]
    assert [(row["label"], row["weight"]) for row in rows[:2]] == [("red apple", 30), ("writer", 1)]
    images = [output_dir / row["file_name"] for row in rows]
    with Image.open(images[0]) as image:
        assert image.getchannel("A").point(lambda alpha: 255 * (alpha > 127)).getbbox() == (23, 23, 233, 233)

    images[0].unlink()
    times = [image.stat().st_mtime_ns for image in images[1:]]
    build(cache_dir, output_dir, "--styles", "flat", "line")
    assert images[0].exists()
    assert [image.stat().st_mtime_ns for image in images[1:]] == times

    build(cache_dir, output_dir, "--styles", "flat", "line", "--resolution", "320")
    with Image.open(images[1]) as image:
        assert image.size == (320, 320)
    with pytest.raises(SystemExit, match="does not belong to the chosen styles"):
        build(cache_dir, output_dir, "--styles", "flat")


def test_opens_as_image_folder(cache_dir, tmp_path):
    pytest.importorskip("resvg_py")
    datasets = pytest.importorskip("datasets")
    rows = build(cache_dir, tmp_path / "emoji", "--styles", "3d", "flat")
    dataset = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "emoji"), cache_dir=str(tmp_path / "hf"), split="train"
    )
    assert sorted(dataset["text"]) == sorted(row["text"] for row in rows)
    assert dataset[0]["image"].size == (256, 256)
