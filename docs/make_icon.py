"""Draw icon.png: a sunset over the sea with rounded corners. Run this script to change the icon.

python docs/make_icon.py [FILE]
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter

EDGE = 512
FINE = 4  # draw in this scale, then reduce the image: this smooths the edges
SIDE = EDGE * FINE
HORIZON = 0.615
SUN = (0.5, 0.475, 0.215)  # centre and radius, as fractions of the edge

Colour = tuple[int, int, int]
SKY: list[tuple[float, Colour]] = [
    (0.00, (24, 20, 66)),
    (0.22, (66, 32, 122)),
    (0.42, (150, 48, 140)),
    (0.55, (236, 92, 112)),
    (0.64, (255, 158, 94)),
]
SEA: list[tuple[float, Colour]] = [
    (0.60, (168, 62, 128)),
    (0.72, (84, 34, 112)),
    (0.86, (34, 22, 78)),
    (1.00, (15, 14, 48)),
]
WARMTH = (1.0, 0.36, 0.42)
DISC: list[tuple[float, Colour]] = [(0.0, (255, 244, 196)), (0.55, (255, 212, 128)), (1.0, (255, 150, 98))]


def main(file: str = "icon.png") -> None:
    """Draw and save the icon."""
    picture = fade(SKY)
    glow(picture)
    disc(picture)
    sea = fade(SEA)
    reflection(sea)
    line = round(HORIZON * SIDE)
    picture.paste(sea.crop((0, line, SIDE, SIDE)), (0, line))
    ridge(picture)
    sparkle(picture, 0.775, 0.215, 0.098)
    sparkle(picture, 0.873, 0.327, 0.043)
    picture.putalpha(corners())
    picture.resize((EDGE, EDGE), Image.Resampling.LANCZOS).save(Path(file), optimize=True)


def fade(stops: list[tuple[float, Colour]]) -> Image.Image:
    """Return a vertical gradient through `stops`, pairs of height and colour."""
    column = Image.new("RGB", (1, SIDE))
    for y in range(SIDE):
        column.putpixel((0, y), between(stops, y / SIDE))
    return column.resize((SIDE, SIDE))


def between(stops: list[tuple[float, Colour]], at: float) -> Colour:
    """Return the colour at a height, interpolated smoothly between the neighbours."""
    below = [stop for stop in stops if stop[0] <= at] or stops[:1]
    above = [stop for stop in stops if stop[0] > at] or stops[-1:]
    (low, first), (high, second) = below[-1], above[0]
    part = 0.0 if high == low else (at - low) / (high - low)
    part = part * part * (3 - 2 * part)
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(first, second, strict=True))
    return red, green, blue


def glow(picture: Image.Image) -> None:
    """Draw the glow around the sun."""
    x, y, r = (part * SIDE for part in SUN)
    light = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(light).ellipse((x - r * 1.5, y - r * 1.5, x + r * 1.5, y + r * 1.5), fill=150)
    light = light.filter(ImageFilter.GaussianBlur(r * 0.55))
    warm = Image.merge("RGB", [light.point([round(value * part) for value in range(256)]) for part in WARMTH])
    picture.paste(ImageChops.screen(picture, warm))


def disc(picture: Image.Image) -> None:
    """Draw the sun."""
    x, y, r = (part * SIDE for part in SUN)
    mask = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(mask).ellipse((x - r, y - r, x + r, y + r), fill=255)
    shade = fade([(SUN[1] - SUN[2] + 2 * SUN[2] * at, colour) for at, colour in DISC])
    picture.paste(shade, mask=mask)


def reflection(sea: Image.Image) -> None:
    """Draw the reflection of the sun: bars that become narrower towards the bottom."""
    mask = Image.new("L", (SIDE, SIDE))
    draw = ImageDraw.Draw(mask)
    x, _, r = (part * SIDE for part in SUN)
    widths = (0.86, 1.02, 0.80, 0.60, 0.40, 0.20)
    for row, width in enumerate(widths):
        top = (HORIZON + 0.030 + 0.0575 * row) * SIDE
        half = r * width
        thick = SIDE * (0.0155 - 0.0007 * row)
        shift = r * 0.10 * math.sin(row * 2.1)
        draw.rounded_rectangle((x - half + shift, top, x + half + shift, top + 2 * thick), thick, fill=255 - 14 * row)
    shade = fade([(HORIZON, (255, 206, 132)), (0.80, (255, 138, 108)), (0.97, (214, 84, 132))])
    sea.paste(shade, mask=mask)


def ridge(picture: Image.Image) -> None:
    """Draw two islands on the horizon."""
    draw = ImageDraw.Draw(picture)
    line = HORIZON * SIDE
    for start, end, high, colour in ((-0.05, 0.33, 0.085, (74, 30, 104)), (0.76, 1.06, 0.060, (98, 36, 116))):
        steps = 240
        points = [(start * SIDE, line + 2)]
        for step in range(steps + 1):
            part = step / steps
            hill = math.sin(math.pi * part) ** 1.15 * (0.80 + 0.20 * math.sin(part * 7.3 + high * 40))
            points.append(((start + (end - start) * part) * SIDE, line - hill * high * SIDE))
        points.append((end * SIDE, line + 2))
        draw.polygon(points, fill=colour)


def sparkle(picture: Image.Image, x: float, y: float, radius: float) -> None:
    """Draw a star with four points."""
    mask = Image.new("L", (SIDE, SIDE))
    points = []
    for step in range(720):
        angle = math.tau * step / 720
        radius_here = radius / (abs(math.cos(angle)) ** 0.52 + abs(math.sin(angle)) ** 0.52) ** (1 / 0.52)
        points.append(((x + radius_here * math.cos(angle)) * SIDE, (y + radius_here * math.sin(angle)) * SIDE))
    ImageDraw.Draw(mask).polygon(points, fill=255)
    halo = mask.filter(ImageFilter.GaussianBlur(radius * SIDE * 0.16)).point(lambda value: value * 0.7)
    picture.paste(Image.new("RGB", picture.size, (255, 246, 226)), mask=ImageChops.lighter(mask, halo))


def corners() -> Image.Image:
    """Return a mask with rounded corners (a superellipse)."""
    mask = Image.new("L", (SIDE, SIDE))
    middle = SIDE / 2
    points = []
    for step in range(2880):
        angle = math.tau * step / 2880
        radius_here = middle / (abs(math.cos(angle)) ** 5 + abs(math.sin(angle)) ** 5) ** (1 / 5)
        points.append((middle + radius_here * math.cos(angle), middle + radius_here * math.sin(angle)))
    ImageDraw.Draw(mask).polygon(points, fill=255)
    return mask


if __name__ == "__main__":
    main(*sys.argv[1:2])
