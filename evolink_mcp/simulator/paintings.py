"""Draw pictures from a prompt: flat poster landscapes of the exact size. The same words give the same picture.

Words of the prompt choose the light, the land and the figure in it; a hash of it chooses the rest. Import
this only where a picture is drawn: Pillow comes with it. Points are complex numbers: x + y·i, y downwards.
"""

# Pillow's types name numpy's, which is not installed.
# pyright: reportUnknownMemberType=false

import cmath
import hashlib
import io
import math
import random
import re
from collections.abc import Callable, Iterable, Sequence

from PIL import Image, ImageDraw

Colour = tuple[int, ...]
WORKING_PIXELS = 5_500_000  # larger pictures are drawn at this size and enlarged
SNOW = (255, 252, 246)

# Words that ask for it: the sky from top to horizon / sun or moon, far land, near land.
LIGHTS = {
    "sunset dusk golden cat kitten 日落 夕阳": "271a55 6b2c70 c94a6e f98a5f ffcf87/fff0bd b4527c 22113a",
    "dawn sunrise morning dream calm lighthouse 日出": "5f83c4 9fb2de e9c3d6 ffe0c2/fff5dc a29dc6 2f3263",
    "day noon summer sunny blue beach 白天": "2f8fd3 7cc4ec cdeef2 fff2d2/fffbe6 86bfc4 16505a",
    "night moon star starry space neon city 夜 月 星": "050923 0e1a49 24407f 5878ab/fdf5d6 33507f 060b20",
    "forest wood misty mist fog jungle pine green 森林": "7fb8ae b9dcc0 f0f0c6/fffbe0 8ab79a 0d2f2b",
    "autumn fall fox leaf orange 秋": "4f79a6 b9b3a6 f2c684 fadfa6/fff4cf cf9158 3b1b1c",
    "snow winter ice snowy christmas arctic 雪 冬": "6f9bcb b3d1e8 f0f4f4/fffdf0 b6cde2 38587f",
    "desert dune sand camel canyon 沙漠": "2a6a8c 79b2b0 f4d6a2 fab66f/fff3cf dc9060 572034",
    "blossom spring sakura cherry flower pink 春 花": "83b2e3 cfc6ee f8d0de fff0e4/fffaf0 c9a3cc 45264f",
}
LANDS = (
    "sea ocean beach island lake water boat ship sail wave coast river lighthouse harbour 海 湖 岛 船",
    "city town street skyline building tower tokyo paris london york neon 城",
    "forest wood jungle pine bear deer owl fox 森林",
    "mountain peak alp snow climb volcano valley eagle fuji 山 峰",
    "hill field meadow desert dune garden farm balloon",
)
PAINTS = "coal 0c0616 ink 24121a trunk 4a2a26 brick 7a3b35 wine a52c35 red d8453e rust d2622f gold f2b33d"
TONES = dict(re.findall(r"(\w+) (\w+)", f"{PAINTS} lit ffd97d milk fff1dc"))
# Words that ask for it: height in short edges of the picture, then piece by piece a form, a tone and its
# points, in heights of the figure from its foot.
FIGURES = {
    "cat kitten kitty 猫": """.34|line:.085 coal .2,-.05 .42,-.03 .55,-.14 .58,-.32 .5,-.44 .42,-.4
    curve coal -.25,0 -.3,-.16 -.24,-.36 -.13,-.58 .13,-.58 .24,-.36 .3,-.16 .25,0 0,.03
    curve coal -.22,-.72 -.15,-.59 0,-.56 .15,-.59 .22,-.72 .15,-.85 0,-.87 -.15,-.85
    plate coal -.205,-.74 -.2,-1 -.04,-.84|plate coal .205,-.74 .2,-1 .04,-.84""",
    "fox vixen 狐": """.34|curve rust .05,-.02 .32,.03 .58,-.08 .7,-.3 .66,-.55 .52,-.42 .44,-.26 .2,-.26
    curve milk .7,-.3 .705,-.46 .66,-.6 .57,-.5 .53,-.4 .6,-.42
    curve rust -.2,0 -.25,-.16 -.19,-.38 -.11,-.56 .11,-.56 .2,-.38 .26,-.16 .22,0 0,.03
    curve milk 0,-.5 .11,-.4 .06,-.2 0,-.1 -.06,-.2 -.11,-.4|plate brick -.23,-.7 -.22,-1.02 -.03,-.8
    plate brick .23,-.7 .22,-1.02 .03,-.8
    curve rust -.3,-.62 -.17,-.55 0,-.46 .17,-.55 .3,-.62 .2,-.8 0,-.85 -.2,-.8
    plate milk -.29,-.62 -.12,-.66 0,-.47 -.16,-.54|plate milk .29,-.62 .12,-.66 0,-.47 .16,-.54
    line:.022 ink -.16,-.67 -.115,-.695 -.07,-.67|line:.022 ink .16,-.67 .115,-.695 .07,-.67
    curve ink -.04,-.5 0,-.52 .04,-.5 0,-.45""",
    "boat ship sail 船": """.32|plate milk .03,-.22 .03,-.86 .42,-.22
    plate milk -.03,-.22 -.03,-1 -.5,-.22|curve brick -.56,-.16 0,-.13 .56,-.17 .42,.01 0,.05 -.4,.01
    plate ink -.01,-.14 -.01,-1 .01,-1 .01,-.14""",
    "lighthouse beacon 灯塔": """.56|plate milk -.13,0 -.075,-.76 .075,-.76 .13,0
    plate wine -.075,-.88 0,-1 .075,-.88|plate red -.118,-.16 -.106,-.32 .106,-.32 .118,-.16
    plate red -.094,-.48 -.084,-.62 .084,-.62 .094,-.48|plate ink -.1,-.76 -.1,-.79 .1,-.79 .1,-.76
    plate lit -.05,-.79 -.05,-.88 .05,-.88 .05,-.79""",
    "balloon airship 气球": """.34
    curve red 0,-1 -.3,-.9 -.38,-.66 -.24,-.42 0,-.26 .24,-.42 .38,-.66 .3,-.9
    curve gold 0,-1 -.2,-.86 -.24,-.64 -.14,-.4 0,-.26 .14,-.4 .24,-.64 .2,-.86
    curve milk 0,-1 -.08,-.84 -.09,-.62 -.05,-.4 0,-.26 .05,-.4 .09,-.62 .08,-.84
    plate trunk -.07,-.31 -.05,-.12 -.04,-.12 -.05,-.31|plate trunk .07,-.31 .05,-.12 .04,-.12 .05,-.31
    plate brick -.07,-.13 -.055,0 .055,0 .07,-.13""",
    "cabin house hut cottage farm 屋": """.2|plate brick .2,-.6 .2,-.98 .31,-.98 .31,-.5
    plate trunk -.42,.05 -.42,-.45 .42,-.45 .42,.05|plate wine -.56,-.4 0,-.88 .56,-.4
    plate lit -.3,-.13 -.3,-.32 -.1,-.32 -.1,-.13|plate lit .1,.05 .1,-.32 .28,-.32 .28,.05""",
    "tree oak leaf autumn blossom sakura cherry 树": """.46|plate trunk -.05,.02 -.03,-.7 .03,-.7 .06,.02""",
}


def rgb(text: str) -> Colour:
    """A colour from six hex digits."""
    return tuple(bytes.fromhex(text))


def mix(start: Colour, end: Colour, share: float) -> Colour:
    """The colour at `share` of the way from `start` to `end`."""
    return tuple(round(a + (b - a) * share) for a, b in zip(start, end, strict=True))


def smooth(points: Sequence[complex], *, closed: bool = True) -> list[complex]:
    """A line through every point (Catmull-Rom)."""
    ring = [points[-1], *points, *points[:2]] if closed else [points[0], *points, points[-1]]
    return [
        b + t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a))) / 2
        for a, b, c, d in zip(ring, ring[1:], ring[2:], ring[3:], strict=False)
        for t in (k / 30 for k in range(31))
    ]


def chosen_by_prompt(entries: Iterable[str], prompt: str) -> str:
    """The entry that most words of the prompt ask for; empty if none."""
    lowered = prompt.lower()
    words = {form for word in re.findall(r"\w+", lowered) for form in (word, word.removesuffix("s"))}

    def score(entry: str) -> int:
        return sum(word in words or (not word.isascii() and word in lowered) for word in entry.split())

    return max(["", *entries], key=score)


class Scene:
    """A landscape while it is drawn; `unit` is its short edge in pixels."""

    def __init__(self, prompt: str, size: tuple[int, int], rng: random.Random) -> None:
        (self.width, self.height), self.unit, self.rng = size, min(size), rng
        self.image = Image.new("RGB", size)
        self.pen = ImageDraw.Draw(self.image, "RGBA")
        light = chosen_by_prompt(LIGHTS, prompt) or rng.choice(list(LIGHTS)[:3])
        sky, land = ([rgb(c) for c in part.split()] for part in LIGHTS[light].split("/"))
        self.sky, (self.sun, self.far, self.near), self.dark = sky, land, light.startswith("night")
        self.leaf = rgb({"autumn": "e0702f", "blossom": "f59cb5"}.get(light.split()[0], "4f8f5b"))
        self.land = (chosen_by_prompt(LANDS, prompt) or rng.choice(LANDS)).split()[0]
        guest = "boat" if self.land == "sea" else rng.choice(["balloon", "cabin", "tree", "cat"])
        figure = chosen_by_prompt(FIGURES, prompt) or chosen_by_prompt(FIGURES, guest)
        self.name, self.pieces = figure.split()[0], re.split(r"[|\n]", FIGURES[figure])
        self.horizon = self.height * rng.uniform(0.58, 0.64)
        self.sun_x = self.width * rng.choice([rng.uniform(0.26, 0.4), rng.uniform(0.6, 0.74)])

    def disc(self, at: complex, r: float, fill: Colour, alpha: int = 255) -> None:
        """A circle around `at` with radius `r`."""
        self.pen.ellipse((at.real - r, at.imag - r, at.real + r, at.imag + r), fill=(*fill, alpha))

    def plate(self, points: Sequence[complex], fill: Colour) -> None:
        """A filled polygon."""
        self.pen.polygon([(p.real, p.imag) for p in points], fill=fill)

    def bar(self, at: complex, length: float, thick: float, fill: Colour, alpha: int) -> None:
        """A line with round ends, `length` wide around `at`."""
        box = (at.real - length / 2, at.imag - thick / 2, at.real + length / 2, at.imag + thick / 2)
        self.pen.rounded_rectangle(box, thick / 2, fill=(*fill, alpha))

    def fade(self, top: float, colours: Sequence[Colour], outline: Sequence[complex] = ()) -> None:
        """Colours from top to the foot of the picture, within the outline if there is one."""
        size = (self.width, max(1, self.height - round(top)))
        column, mask = Image.new("RGB", (1, len(colours))), Image.new("L", size, 0 if outline else 255)
        column.putdata(colours)
        if outline:
            ImageDraw.Draw(mask).polygon([(p.real, p.imag - round(top)) for p in outline], fill=255)
        column = column.resize((1, size[1]), Image.Resampling.BILINEAR)
        self.image.paste(column.resize(size, Image.Resampling.NEAREST), (0, round(top)), mask)

    def ridge(self, base: float, swell: float) -> Callable[[float], float]:
        """A rolling line of hills: y at x."""
        rng, unit, tune = self.rng, self.unit, ((0.62, 1.4), (0.26, 3.3), (0.1, 7))
        waves = [(swell * unit * a, b * rng.uniform(0.8, 1.2) / unit, 6.3 * rng.random()) for a, b in tune]
        return lambda x: base - sum(high * math.sin(often * x + shift) for high, often, shift in waves)

    def hills(self, line: Callable[[float], float], top: Colour, foot: Colour) -> None:
        """The land below a line of hills."""
        crest = [complex(x, line(x)) for x in range(0, self.width + 8, 6)]
        outline = [*crest, complex(self.width + 8, self.height), complex(0, self.height)]
        self.fade(min(p.imag for p in crest), [top, foot, foot], outline)

    def heavens(self) -> None:
        """Sky, stars, and sun or moon."""
        rng, unit = self.rng, self.unit
        self.fade(0, [*self.sky, *[self.sky[-1]] * (len(self.sky) // 2)])
        for _ in range(round(170 * self.width * self.height / unit**2) if self.dark else 0):
            star = complex(rng.uniform(0, self.width), self.horizon * rng.random() ** 1.3)
            self.disc(star, unit * rng.choice([6, 8, 10, 18]) / 9000, SNOW, rng.randint(90, 255))
        sun = complex(self.sun_x, self.horizon * (rng.uniform(0.56, 0.7) - (0.3 if self.dark else 0)))
        r, reach, shine = unit * rng.uniform(0.075, 0.105), round(0.9 * unit), 90 if self.dark else 215
        halo = Image.radial_gradient("L").point([round(shine * max(0, 1 - v / 180) ** 2) for v in range(256)])
        halo = halo.resize((2 * reach, 2 * reach), Image.Resampling.BICUBIC)
        self.image.paste(self.sun, (round(sun.real) - reach, round(sun.imag) - reach), halo)
        self.disc(sun, r, self.sun)
        for crater in (-0.3 - 0.25j, 0.35 + 0.1j, -0.1 + 0.45j) if self.dark else ():
            self.disc(sun + crater * r, r * rng.uniform(0.1, 0.2), mix(self.sun, self.sky[1], 0.25))
        foam, alpha = mix(self.sun, self.sky[-2], 0.35), 34 if self.dark else 92
        for _ in range(rng.randint(4, 6)):
            cloud = complex(rng.uniform(0, self.width), self.horizon * rng.uniform(0.12, 0.78))
            for k in range(rng.randint(2, 4)):
                at = cloud + unit * complex(rng.uniform(-0.16, 0.16), k * 0.016)
                self.bar(at, unit * rng.uniform(0.14, 0.42), unit * 0.017, foam, alpha)

    def pines(self, line: Callable[[float], float], size: float, fill: Colour, gap: float) -> None:
        """A row of pines along a line."""
        x = -self.rng.random() * gap
        while x < self.width + size:
            high = size * self.rng.uniform(0.55, 1.1)
            for k in range(5):
                low, wide = complex(x, line(x) + high * (0.08 - k * 0.185)), high * 0.2 * (1 - k * 0.17)
                self.plate([low - wide, low + wide, low - high * 0.34j], fill)
            x += gap * self.rng.uniform(0.35, 1.3)

    def peaks(self, base: float, size: float, fill: Colour) -> None:
        """Mountains with snow."""
        count = round(3 * self.width / self.unit) + 1
        for k in range(count):
            high = size * self.rng.uniform(0.65, 1.0)
            top = complex((k + self.rng.uniform(0.1, 0.9)) * self.width / count, base - high)
            lit = -1 if self.sun_x < top.real else 1
            for side, share, snow in ((-lit, 0.0, 0.5), (lit, 0.24, 0.88)):
                bend = [top + high * complex(0.05 * (-1) ** j, j * 0.3) for j in range(1, 5)]
                self.plate([top, *bend, top + high * complex(side * 1.5, 1.5)], mix(fill, self.sun, share))
                cap = [(0.34, 0.34), (0.2, 0.26), (0.14, 0.36), (0.05, 0.28), (0, 0.4)]
                self.plate([top, *(top + high * complex(side * u, v) for u, v in cap)], mix(fill, SNOW, snow))

    def skyline(self, base: float, size: float, fill: Colour, lit: float) -> None:
        """A row of houses; `lit` of their windows have light."""
        rng, x = self.rng, -0.05 * self.unit
        while x < self.width:
            wide, top = self.unit * rng.uniform(0.06, 0.12), base - size * rng.uniform(0.3, 1.0)
            self.pen.rectangle((x, top, x + wide, self.height), fill=fill)
            roof, step = complex(x, top + 1), wide / 5
            self.plate([roof, roof + wide * rng.choice([0.5 - 0.5j, 0.5, 0.9 - 0.3j]), roof + wide], fill)
            for y in (top + row * step * 1.25 for row in range(1, round((base - top) / step / 1.25))):
                for window_x in (x + step * (k + 0.68) for k in range(4) if rng.random() < lit):
                    lamp = rgb(rng.choice(["ffd97d", "ffebb4", "fab25c"]))
                    self.pen.rectangle((window_x, y, window_x + step * 0.62, y + step * 0.72), fill=lamp)
            x += wide * rng.uniform(0.95, 1.12)

    def water(self, top: float) -> None:
        """The sea below `top`, with waves and the sun's reflection."""
        rng, unit, depth, deep = self.rng, self.unit, self.height - top, mix(self.near, self.sky[1], 0.42)
        shallow, foam = mix(self.sky[-1], self.far, 0.45), mix(self.sun, self.far, 0.3)
        self.fade(top, [shallow, mix(self.far, deep, 0.62), deep])
        for share in (rng.random() ** 1.2 for _ in range(round(60 * self.width / unit))):
            at = complex(rng.uniform(0, self.width), top + depth * share)
            self.bar(at, unit * (0.03 + 0.14 * share), unit * (0.002 + 0.004 * share), foam, 70)
        for share in ((k / 46) ** 1.3 for k in range(46)):
            wide = unit * (0.05 + 0.3 * share) * rng.uniform(0.35, 1.0)
            at = complex(self.sun_x + rng.uniform(-0.4, 0.4) * wide, top + depth * share + unit * 0.006)
            self.bar(at, wide, unit * (0.003 + 0.008 * share), self.sun, round(210 - 150 * share))

    def draw(self) -> None:
        """The whole picture, back to front."""
        rng, unit, y, wet = self.rng, self.unit, self.horizon, self.land in ("sea", "city")
        self.heavens()
        haze = mix(self.far, self.sky[-1], 0.45)
        self.hills(self.ridge(y - 0.02 * unit, 0.07), haze, mix(haze, self.sky[-1], 0.5))
        if self.land == "mountain":
            self.peaks(y + 0.04 * unit, 0.36 * unit, haze)
            self.peaks(y + 0.12 * unit, 0.28 * unit, self.far)
        elif self.land == "city":
            self.skyline(y, 0.42 * unit, mix(haze, self.near, 0.2), 0.14)
            self.skyline(y + 0.06 * unit, 0.32 * unit, mix(self.far, self.near, 0.6), 0.34)
        if wet:
            self.water(y + (0.07 * unit if self.land == "city" else 0))
        for wing in (unit * rng.uniform(0.01, 0.02) for _ in range(rng.randint(3, 7))):
            at = complex(self.width * rng.uniform(0.1, 0.9), y * rng.uniform(0.2, 0.6))
            v = smooth([at + wing * p for p in (-1, -0.5 - 0.42j, 0, 0.5 - 0.42j, 1)], closed=False)
            self.pen.line([(p.real, p.imag) for p in v], haze if self.dark else self.near, int(wing / 6) + 1)
        for k in range(0 if wet else 3):
            tone = mix(self.far, self.near, (k + 1) / 4)
            line = self.ridge(y + (self.height - y) * (0.08 + 0.2 * k), 0.07)
            if gap := {"forest": 0.045, "mountain": 0.2}.get(self.land, 0) * unit:
                self.pines(line, unit * (0.1 + 0.07 * k), tone, gap)
            self.hills(line, tone, mix(tone, self.sky[-1], 0.42 - 0.1 * k))
        shore = -0.04 if wet and self.name in ("balloon", "boat") else 0.14
        near = self.ridge(self.height - unit * shore, 0.06)
        self.hills(near, mix(self.near, self.far, 0.12), black := mix(self.near, (0, 0, 0), 0.3))
        if self.land == "forest":
            self.pines(near, unit * 0.5, black, self.width * 0.42)
        self.place(near)

    def place(self, ground: Callable[[float], float]) -> None:
        """The figure: on the ground, on the water or in the air, as it should be."""
        rng, unit, size = self.rng, self.unit, self.unit * float(self.pieces[0])
        x = self.width * (0.3 if self.sun_x > self.width / 2 else 0.7)
        if self.name in ("cat", "fox"):  # before the sun
            x = self.sun_x - 0.08 * unit
        at = complex(x, ground(x) + 0.012 * unit)
        if self.name == "boat":
            at = complex(x, (self.horizon + self.height) / 2)
            for k in range(9):
                wave = at + size * complex(rng.uniform(-0.05, 0.05), k * 0.045)
                self.bar(wave, size * (1 - k * 0.08), size * 0.022, self.near, 130 - k * 14)
        if self.name == "balloon":
            at = complex(x, self.horizon * 0.78)
            self.stand(complex(x + rng.choice([-0.33, 0.25]) * unit, self.horizon * 0.42), size * 0.36)
            self.stand(complex(x + rng.choice([-0.2, 0.24]) * unit, self.horizon * 0.93), size * 0.22)
        for k in range(7 if self.name == "cabin" else 0):
            smoke = at + size * complex(0.26 + 0.05 * k + 0.01 * k * k, -1.05 - 0.17 * k)
            self.disc(smoke, size * (0.05 + 0.016 * k), self.sun, 120 - 15 * k)
        self.stand(at, size)
        for k in range(90 if self.name == "tree" else 0):
            out = cmath.rect(rng.random() ** 0.6, 6.3 * rng.random())
            tone = mix(self.leaf, self.near if k < 60 else self.sun, abs(k - 62) / 130)
            self.disc(at + size * (out * 0.31 - 0.78j), size * rng.uniform(0.05, 0.1), tone)

    def stand(self, at: complex, size: float) -> None:
        """The prompt's figure, its foot at `at`."""
        for piece in self.pieces[1:]:
            form, tone, *spots = piece.split()
            points = [at + size * complex(*map(float, spot.split(","))) for spot in spots]
            fill = mix(rgb(TONES[tone]), self.near, 0.22 if self.dark and tone != "lit" else 0.06)
            for p in smooth(points, closed=False) if form.startswith("line") else ():
                self.disc(p, size * float(form[5:]) / 2, fill)
            if form in ("plate", "curve"):
                self.plate(smooth(points) if form == "curve" else points, fill)


def paint(prompt: str, index: int, size: tuple[int, int], kind: str = "png", clear: bool = False) -> bytes:
    """One picture as PNG, JPEG or WebP bytes; with `clear` it is a round sticker on a transparent ground."""
    # hash() of a text differs in each process.
    rng = random.Random(hashlib.sha256(f"{index}\n{prompt}".encode("utf-8", "surrogatepass")).digest())
    scale = min(2.0, math.sqrt(WORKING_PIXELS / (size[0] * size[1])))
    scene = Scene(prompt, (max(1, round(size[0] * scale)), max(1, round(size[1] * scale))), rng)
    scene.draw()
    picture = scene.image.resize(size, Image.Resampling.LANCZOS)
    if clear:
        r, x, y = min(scene.image.size) * 0.48, scene.image.width / 2, scene.image.height / 2
        sticker = Image.new("L", scene.image.size)
        ImageDraw.Draw(sticker).ellipse((x - r, y - r, x + r, y + r), fill=255)
        picture.putalpha(sticker.resize(size, Image.Resampling.LANCZOS))
    out = io.BytesIO()
    picture.save(out, kind.upper(), compress_level=3, quality=88, method=2)
    return out.getvalue()
