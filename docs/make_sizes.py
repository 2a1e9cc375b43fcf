"""Draw docs/sizes.svg: each ratio as a shape, with the pixels of each tier in both of EvoLink's tables.

python docs/make_sizes.py    needs evolink_mcp on the import path
"""

from __future__ import annotations

from pathlib import Path

from evolink_mcp.api.models import DEFAULT_MODEL, TIERS
from evolink_mcp.api.sizes import RULES, resolve

COLUMNS, CELL_WIDTH, CELL_HEIGHT, SHAPE = 5, 228, 250, 110
MARGIN, HEAD = 24, 64
INK, QUIET, SHAPE_FILL, PAPER = "#1c1b19", "#6b675f", "#d9d2c4", "#f7f5f0"


def draw() -> str:
    """Return the complete image as SVG."""
    rows = -(-len(DEFAULT_MODEL.limits.ratios) // COLUMNS)
    width, height = 2 * MARGIN + COLUMNS * CELL_WIDTH, HEAD + rows * CELL_HEIGHT + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="system-ui, sans-serif" fill="{INK}">',
        f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
        f'<text x="{MARGIN}" y="38" font-size="20" font-weight="600">Ratios and tiers in pixels</text>',
        f'<text x="{width - MARGIN}" y="38" font-size="13" text-anchor="end" fill="{QUIET}">'
        f"in each line {RULES[0]}, then {RULES[1]} where it differs</text>",
    ]
    for number, ratio in enumerate(sorted(DEFAULT_MODEL.limits.ratios, key=_shape)):
        x = MARGIN + number % COLUMNS * CELL_WIDTH
        parts += _cell(ratio, x, HEAD + number // COLUMNS * CELL_HEIGHT)
    return "\n".join([*parts, "</svg>", ""])


def _shape(ratio: str) -> float:
    across, down = map(int, ratio.split(":"))
    return across / down


def _cell(ratio: str, x: int, top: int) -> list[str]:
    shape = _shape(ratio)
    width, height = (SHAPE, SHAPE / shape) if shape >= 1 else (SHAPE * shape, SHAPE)
    parts = [
        f'<rect x="{x + (SHAPE - width) / 2:.1f}" y="{top + (SHAPE - height) / 2:.1f}" width="{width:.1f}" '
        f'height="{height:.1f}" rx="3" fill="{SHAPE_FILL}"/>',
        f'<text x="{x + SHAPE / 2:.1f}" y="{top + SHAPE / 2 + 5:.1f}" font-size="15" font-weight="600" '
        f'text-anchor="middle">{ratio}</text>',
    ]
    for line, tier in enumerate(TIERS):
        sizes = dict.fromkeys(str(resolve(ratio, tier, rule).size).replace("x", "×") for rule in RULES)
        y = top + SHAPE + 28 + 22 * line
        parts.append(f'<text x="{x}" y="{y}" font-size="13" fill="{QUIET}">{tier}</text>')
        parts.append(f'<text x="{x + 28}" y="{y}" font-size="13">{" / ".join(sizes)}</text>')
    return parts


if __name__ == "__main__":
    Path(__file__).with_name("sizes.svg").write_text(draw(), encoding="utf-8")
