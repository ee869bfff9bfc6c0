"""Image grids with captions."""

import textwrap

from PIL import Image, ImageDraw, ImageFont


CAPTION_SIZE = 14


def captioned_grid(
    rows: list[list[Image.Image]], captions: list[str], resolution: int = 256, margin: int = 8
) -> Image.Image:
    """Draw a grid of images, one captioned row each; images are upsampled to `resolution` with nearest neighbor."""
    font = ImageFont.load_default(CAPTION_SIZE)
    columns = max(len(row) for row in rows)
    width = columns * (resolution + margin) + margin
    lines = [textwrap.wrap(caption, width // (CAPTION_SIZE // 2)) for caption in captions]
    caption_height = (CAPTION_SIZE + 4) * max(map(len, lines))
    row_height = caption_height + resolution + 2 * margin

    grid = Image.new("RGB", (width, row_height * len(rows) + margin), "white")
    draw = ImageDraw.Draw(grid)
    for i, (row, text) in enumerate(zip(rows, lines)):
        top = margin + i * row_height
        draw.multiline_text((margin, top), "\n".join(text), fill="black", font=font)
        for j, image in enumerate(row):
            enlarged = image.convert("RGB").resize((resolution, resolution), Image.Resampling.NEAREST)
            grid.paste(enlarged, (margin + j * (resolution + margin), top + caption_height + margin))
    return grid
