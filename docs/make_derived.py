"""Draw docs/derived.png: one simulated picture and files that derive_image makes from it, in one scale.

Usage: `python docs/make_derived.py`.
"""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from evolink_mcp.api.targets import parse_target
from evolink_mcp.images.derive import DerivePlan, Output, derive
from evolink_mcp.images.inspect import ImageFacts
from evolink_mcp.simulator.paintings import paint

SOURCE = (2048, 2048)
FOCUS = (0.64, 0.7)
SCALE = 0.145
MARGIN = 22
CAPTION_HEIGHT = 18
# Rows of targets. None is the source.
ROWS: tuple[tuple[str | None, ...], ...] = (
    (None, "instagram-story", "instagram-portrait", "pinterest"),
    ("og", "youtube-thumbnail", "instagram-square", "apple-touch-icon", "favicon"),
    ("twitter-header", "linkedin-banner"),
)


def main() -> None:
    """Draw the sheet."""
    source = paint("a fox in an autumn forest", 0, SOURCE)
    names = [name for row in ROWS for name in row if name is not None]
    sizes = [parse_target(name).size for name in names]
    outputs = tuple(Output(((size.width, size.height),), "image/png") for size in sizes)
    plan = DerivePlan(outputs, focus=FOCUS)
    files = [part[1] for part in derive(source, plan) if not isinstance(part, ImageFacts)]
    images = dict(zip(names, map(_opened, files), strict=True))
    rows = [[_tile(name or "saved picture", images.get(name or "") or _opened(source)) for name in row] for row in ROWS]
    width = max(sum(tile.width + MARGIN for tile in row) for row in rows) + MARGIN
    height = sum(max(tile.height for tile in row) + MARGIN for row in rows) + MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    top = MARGIN
    for row in rows:
        left = MARGIN
        for tile in row:
            sheet.paste(tile, (left, top))
            left += tile.width + MARGIN
        top += max(tile.height for tile in row) + MARGIN
    sheet.save(Path(__file__).with_name("derived.png"), optimize=True)


def _opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def _tile(name: str, image: Image.Image) -> Image.Image:
    """Return the image in the scale of the sheet, with its name and pixels below."""
    small = image.resize((max(16, round(image.width * SCALE)), max(16, round(image.height * SCALE))))
    caption = f"{name} {image.width}x{image.height}"
    font = ImageFont.load_default(11)
    width = max(small.width, round(font.getlength(caption)))
    tile = Image.new("RGB", (width, small.height + CAPTION_HEIGHT), "white")
    tile.paste(small, (0, 0))
    ImageDraw.Draw(tile).text((0, small.height + 3), caption, fill="black", font=font)
    return tile


if __name__ == "__main__":
    main()
