"""Draws docs/sizes.svg: every ratio as a shape, and the pixels of each tier by both of EvoLink's tables.

python docs/make_sizes.py    run it where evolink_mcp can be imported
"""

from __future__ import annotations

from pathlib import Path

from evolink_mcp.api.models import DEFAULT_MODEL, TIERS
from evolink_mcp.api.sizes import RULES, resolve

COLUMNS, CELL_WIDTH, CELL_HEIGHT, SHAPE = 5, 228, 250, 110
MARGIN, HEAD = 24, 64
INK, QUIET, SHAPE_FILL, PAPER = "#1c1b19", "#6b675f", "#d9d2c4", "#f7f5f0"


def drawn() -> str:
    """The whole picture as SVG."""
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
        left = MARGIN + number % COLUMNS * CELL_WIDTH
        parts += _cell(ratio, left, HEAD + number // COLUMNS * CELL_HEIGHT)
    return "\n".join([*parts, "</svg>", ""])


def _shape(ratio: str) -> float:
    across, down = map(int, ratio.split(":"))
    return across / down


def _cell(ratio: str, left: int, top: int) -> list[str]:
    shape = _shape(ratio)
    width, height = (SHAPE, SHAPE / shape) if shape >= 1 else (SHAPE * shape, SHAPE)
    parts = [
        f'<rect x="{left + (SHAPE - width) / 2:.1f}" y="{top + (SHAPE - height) / 2:.1f}" width="{width:.1f}" '
        f'height="{height:.1f}" rx="3" fill="{SHAPE_FILL}"/>',
        f'<text x="{left + SHAPE / 2:.1f}" y="{top + SHAPE / 2 + 5:.1f}" font-size="15" font-weight="600" '
        f'text-anchor="middle">{ratio}</text>',
    ]
    for line, tier in enumerate(TIERS):
        told = dict.fromkeys(str(resolve(ratio, tier, rule).size).replace("x", "×") for rule in RULES)
        y = top + SHAPE + 28 + 22 * line
        parts.append(f'<text x="{left}" y="{y}" font-size="13" fill="{QUIET}">{tier}</text>')
        parts.append(f'<text x="{left + 28}" y="{y}" font-size="13">{" / ".join(told)}</text>')
    return parts


if __name__ == "__main__":
    Path(__file__).with_name("sizes.svg").write_text(drawn(), encoding="utf-8")
