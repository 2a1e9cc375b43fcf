"""The image models of EvoLink: one record per model holds its qualities, prices, sizes, limits and typical durations.

Source: EvoLink's page "POST /v1/images/generations" and its price page (https://evolink.ai/gpt-image-2). To add a model,
add a record to MODELS. To add a quality, add a line to `qualities`. Schemas, texts and prices come from the records.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Quality:
    """One quality: `tile_base` sets the output tokens, half of all images take less than `typical_s` seconds."""

    tile_base: int
    typical_s: float


@dataclass(frozen=True, slots=True)
class Tier:
    """One resolution tier for a ratio, by both size rules.

    pixel-budget: an image has `pixels` pixels. anchor-edge: its short or its long edge is fixed, in pixels.
    """

    pixels: int
    short_edge: int | None = None
    long_edge: int | None = None


# Functions with `lru_cache` take this record. With eq=True a dict in it would have no hash.
@dataclass(frozen=True, slots=True, eq=False)
class SizeLimits:
    """The legal sizes of a model. Edges and pixels are inclusive limits; the longer edge is ≤ `aspect_max` × the shorter."""

    ratios: tuple[str, ...]
    tiers: Mapping[str, Tier]
    edge_step: int
    edge_min: int
    edge_max: int
    pixels_min: int
    pixels_max: int
    aspect_max: int


@dataclass(frozen=True, slots=True)
class Rates:
    """Prices in units of 0.0001 credit per 1,000 tokens, without discounts."""

    image_output: int
    image_input: int
    text_input: int


@dataclass(frozen=True, slots=True, eq=False)
class ImageModel:
    """One image model. `defaults` are the values that EvoLink uses for fields that a request leaves out.

    The limits of a request: characters of the prompt, reference images, and images. Sizes are (width, height).
    `auto_price_size` is the size that EvoLink's price calculator assumes for `auto`. `auto_sizes` are the cheapest and
    the most expensive size that `auto` may choose.
    """

    name: str
    qualities: Mapping[str, Quality]
    limits: SizeLimits
    rates: Rates
    reference_tokens_max: int
    auto_price_size: tuple[int, int]
    auto_sizes: tuple[tuple[int, int], tuple[int, int]]
    prompt_max: int
    references_max: int
    images_max: int
    backgrounds: tuple[str, ...]
    output_formats: tuple[str, ...]
    defaults: Mapping[str, str | int]

    @property
    def default_quality(self) -> str:
        """The quality of a request that names none."""
        return str(self.defaults["quality"])

    def cost_ratio(self, quality: str) -> float:
        """Return the price of a quality relative to the default quality."""
        return self.qualities[quality].tile_base ** 2 / self.qualities[self.default_quality].tile_base ** 2


GPT_IMAGE_2 = ImageModel(
    name="gpt-image-2",
    # "Tile base" of the page's field `quality`, and the medians that EvoLink published.
    qualities={"low": Quality(16, 10.0), "medium": Quality(48, 48.0), "high": Quality(96, 126.0)},
    limits=SizeLimits(
        ratios=(
            *("1:1", "1:2", "2:1", "1:3", "3:1", "2:3", "3:2", "3:4"),
            *("4:3", "4:5", "5:4", "9:16", "16:9", "9:21", "21:9"),
        ),
        tiers={
            "1K": Tier(1024 * 1024, short_edge=1024),
            "2K": Tier(2048 * 2048, long_edge=2048),
            "4K": Tier(8_294_400, long_edge=3840),
        },
        edge_step=16,
        edge_min=16,
        edge_max=3840,
        pixels_min=655_360,
        pixels_max=8_294_400,
        aspect_max=3,
    ),
    # The price page, in credits: 1.836, 0.4896 and 0.306.
    rates=Rates(image_output=18_360, image_input=4_896, text_input=3_060),
    # OpenAI limits an image to 1,536 patches of 32 × 32 pixels.
    reference_tokens_max=1_536,
    auto_price_size=(2048, 2048),
    auto_sizes=((1408, 480), (2880, 2880)),
    prompt_max=32_000,
    references_max=16,
    images_max=10,
    backgrounds=("opaque", "transparent"),
    output_formats=("png", "jpeg", "webp"),
    defaults={"quality": "medium", "n": 1, "background": "opaque", "output_format": "png"},
)

MODELS: Mapping[str, ImageModel] = {model.name: model for model in (GPT_IMAGE_2,)}
DEFAULT_MODEL = GPT_IMAGE_2
# The choices of a schema that serves all models.
QUALITIES = tuple(dict.fromkeys(name for model in MODELS.values() for name in model.qualities))
TIERS = tuple(dict.fromkeys(name for model in MODELS.values() for name in model.limits.tiers))
BACKGROUNDS = tuple(dict.fromkeys(name for model in MODELS.values() for name in model.backgrounds))
OUTPUT_FORMATS = tuple(dict.fromkeys(name for model in MODELS.values() for name in model.output_formats))


def duration_group(model: object, quality: object) -> str:
    """Return the group of tasks with comparable durations: the quality, and the name of a model that is not the default."""
    record = model_named(model)
    name = str(quality or record.default_quality)
    return name if record is DEFAULT_MODEL else f"{record.name} {name}"


def model_named(name: object) -> ImageModel:
    """Return the record of a model. An unknown name, for example in an old entry, means the default model."""
    return MODELS.get(str(name), DEFAULT_MODEL)


# Median durations in seconds by `duration_group`.
TYPICAL_S = {
    duration_group(model.name, name): quality.typical_s
    for model in MODELS.values()
    for name, quality in model.qualities.items()
}
