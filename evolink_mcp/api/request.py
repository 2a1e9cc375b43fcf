"""The arguments of a request to EvoLink, checked strictly. The answers are read in `task`.

The numbers of a model come from its record in `models`. The limits that all models share are here.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator
from pydantic.json_schema import SkipJsonSchema

from evolink_mcp.api import models, sizes, urls
from evolink_mcp.api.models import BACKGROUNDS, DEFAULT_MODEL, MODELS, OUTPUT_FORMATS, QUALITIES, TIERS, ImageModel
from evolink_mcp.api.size_grammar import advice
from evolink_mcp.pasted import undecorate
from evolink_mcp.sanitize import harmless

URL_MAX_CHARS = 8_192
CALLBACK_URL_MAX_CHARS = 2_048
PROMPT_MAX = max(model.prompt_max for model in MODELS.values())
REFERENCES_MAX = max(model.references_max for model in MODELS.values())
IMAGES_MAX = max(model.images_max for model in MODELS.values())
# EvoLink's own client accepts task IDs of up to 128 characters.
TASK_ID_PATTERN = r"^task-unified-[0-9A-Za-z_-]{1,115}$"

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
_LOCAL_SCHEMES = ("file", "data", "evolink", "sandbox")
# Words that models write for "no value".
_NO_VALUES = frozenset(["null", "undefined", "none", "nil", "n/a", "nan"])
_SECOND_URL = re.compile(r"[,;|\s]https?://", re.IGNORECASE)

# The choices come from the records, so a type checker sees only strings.
if TYPE_CHECKING:
    ModelName = TierName = QualityName = BackgroundName = OutputFormatName = str
else:
    ModelName = Literal[tuple(MODELS)]
    TierName = Literal[TIERS]
    QualityName = Literal[QUALITIES]
    BackgroundName = Literal[BACKGROUNDS]
    OutputFormatName = Literal[OUTPUT_FORMATS]


_INVISIBLE_CATEGORIES = frozenset({"Cc", "Cf", "Me", "Mn", "Zl", "Zp", "Zs"})
# Unicode counts these blank characters as letters and symbols.
_INVISIBLE_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"
# Some clients wrap the arguments of a call in an object with one of these names.
_WRAPPER_NAMES = ("arguments", "input")


def _is_invisible(char: str) -> bool:
    return unicodedata.category(char) in _INVISIBLE_CATEGORIES or char in _INVISIBLE_LETTERS


def checked_prompt(text: str) -> str:
    """Return the prompt unchanged. It must have a visible character and no NUL."""
    if "\0" in text:
        raise ValueError("contains a NUL character, which EvoLink cannot store")
    if all(map(_is_invisible, text)):
        raise ValueError("must say something: it has only white space or invisible characters")
    return text


def ignore_case(*words: str) -> BeforeValidator:
    """Accept one of `words` in any case and with blanks around it. The type checks every other value."""
    known = {word.lower(): word for word in words}

    def normalize(value: Any) -> Any:
        return known.get(value.strip().lower(), value) if isinstance(value, str) else value

    return BeforeValidator(normalize)


def _whole(value: Any) -> Any:
    """Convert 3.0 to 3: JSON Schema counts it as an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def list_of(value: Any) -> Any:
    """Convert a JSON list in a string (some MCP hosts send that) to a list, and a single string to a list of one."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return [value]


def _image_source(text: str) -> str:
    """Check a reference: a public http(s) URL, a path, or one of the local schemes."""
    text = text.strip()
    if not text:
        raise ValueError("is empty: give a URL or the path of a picture")
    if "\0" in text:
        raise ValueError("contains a NUL character")
    bare = undecorate(text)
    if is_remote(bare):
        text = bare
    if bare.lower() in _NO_VALUES:
        raise ValueError("names no picture: leave the argument out")
    if _SECOND_URL.search(text):
        raise ValueError("holds two addresses: give a list, with each of them as a string of its own")
    scheme = _SCHEME.match(text)
    if scheme is None or scheme[1].lower() in _LOCAL_SCHEMES:
        return text
    if scheme[1].lower() not in ("http", "https"):
        raise ValueError(f"cannot be a {harmless(scheme[1], 20)}: address; use https://, a path or file://")
    return _real_url(text, schemes=("http", "https"), max_length=URL_MAX_CHARS)


def _real_url(text: str, *, schemes: tuple[str, ...] = ("https",), max_length: int) -> str:
    """Return `text` unchanged if it is a public URL and no placeholder."""
    try:
        urls.check_public_url(text, schemes=schemes, max_length=max_length)
        urls.check_no_placeholder(text)
    except ValueError as error:
        raise ValueError(f"{error} Leave the argument out if you have no real public URL.") from error
    return text


def is_remote(source: str) -> bool:
    """Return whether EvoLink can fetch `source` itself: an http(s) URL."""
    # A data: URI may have megabytes, so only its start is converted.
    return source[:8].lower().startswith(("http://", "https://"))


def is_file(source: str) -> bool:
    """Return whether `source` names a file of this machine, by its path or a file: URI."""
    return bool(source) and not is_remote(source) and not source[:8].lower().startswith(("data:", "evolink:"))


def size_argument(value: Any) -> Any:
    """Convert an object such as {"width": 1024, "height": 768} to text, so that the refusal can name the size."""
    # One character above the limit, so that a cut text is still refused.
    return json.dumps(value)[: sizes.TEXT_MAX_CHARS + 1] if isinstance(value, dict) else value


def checked_size(text: str) -> str:
    """Return the size to send. A description in words is refused with the value to use."""
    if (hint := advice(text)) is not None:
        raise sizes.IllegalSize(f"EvoLink does not take this as a size: {hint}")
    refusal: sizes.IllegalSize | None = None
    for model in MODELS.values():
        try:
            return sizes.normalize(text, model.limits)
        except sizes.IllegalSize as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def _size_description(model: ImageModel) -> str:
    limits = model.limits
    return (
        f"auto, a ratio ({' '.join(limits.ratios)}) or WxH: edges multiples of {limits.edge_step}, {limits.edge_min} to "
        f"{limits.edge_max}; {limits.pixels_min} to {limits.pixels_max} pixels; at most {limits.aspect_max}:1."
    )


def _quality_description(model: ImageModel) -> str:
    """Return the sentence about costs: each other quality with its price relative to the default quality."""
    ratios = [
        f"{name} about {model.cost_ratio(name):.2g}x" for name in model.qualities if name != model.default_quality
    ]
    return f"Cost: {', '.join(ratios)} of {model.default_quality}."


Prompt = Annotated[
    str,
    Field(min_length=1, max_length=PROMPT_MAX, description="Picture to draw, or change to the reference images."),
    AfterValidator(checked_prompt),
]
PictureSource = Annotated[str, Strict(), AfterValidator(_image_source)]
ImageUrls = Annotated[
    list[PictureSource],
    BeforeValidator(list_of),
    Field(
        max_length=REFERENCES_MAX,
        description="Reference images: public URLs, absolute paths, file: or data: URIs, or "
        "evolink://images/{task_id}/{index}. .jpeg .jpg .png .webp, 50 MB each.",
    ),
]
SizeText = Annotated[
    str,
    BeforeValidator(size_argument),
    AfterValidator(checked_size),
    Field(
        description=_size_description(DEFAULT_MODEL),
        json_schema_extra={
            "pattern": r"^(auto|\d{1,2}:\d{1,2}|[1-9]\d{1,3}[xX×][1-9]\d{1,3})?$",
            "examples": ["16:9", "2048x1152"],
        },
    ),
]
Resolution = Annotated[
    TierName,
    ignore_case(*TIERS),
    Field(description="Tier of a ratio. No effect otherwise."),
]
Quality = Annotated[QualityName, ignore_case(*QUALITIES), Field(description=_quality_description(DEFAULT_MODEL))]
# Must be the last annotation, so that the type before it publishes its own limits.
WHOLE = BeforeValidator(_whole)
Count = Annotated[
    int,
    # Otherwise pydantic converts true to 1 and "3" to 3.
    Strict(),
    Field(ge=1, le=IMAGES_MAX, description="Number of images, each billed."),
    WHOLE,
]
CallbackUrl = Annotated[
    str,
    AfterValidator(lambda url: _real_url(url, max_length=CALLBACK_URL_MAX_CHARS)),
    Field(
        max_length=CALLBACK_URL_MAX_CHARS,
        description="Public https URL that receives the finished task.",
        json_schema_extra={"pattern": "^(https://.*)?$"},
    ),
]
Model = Annotated[ModelName, ignore_case(*MODELS), Field(description="Image model.")]
MaskUrl = Annotated[
    PictureSource,
    Field(description="PNG in the pixel size of the first reference. Transparent parts are redrawn."),
]
Background = Annotated[
    BackgroundName,
    ignore_case(*BACKGROUNDS),
    Field(description=f"Default {DEFAULT_MODEL.defaults['background']}. transparent needs png or webp."),
]
OutputFormat = Annotated[
    OutputFormatName,
    ignore_case(*OUTPUT_FORMATS),
    Field(description=f"File type. Default {DEFAULT_MODEL.defaults['output_format']}."),
]
# A task ID, or any other text that names an earlier image. `KnownImages` reads it.
KnownTask = Annotated[
    str,
    Strict(),
    Field(
        max_length=URL_MAX_CHARS,
        description="Task ID, or the picture's URI, URL, path or Markdown, or last.",
    ),
]
# The value of an absent argument; the published schema does not mention it.
OrNull = SkipJsonSchema[None]


class Arguments(BaseModel):
    """The arguments of a caller. Unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


def unwrapped(model: type[Arguments], arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the arguments without a wrapper: `{"arguments": {...}}` or `{"input": {...}}` with nothing beside it."""
    if len(arguments) == 1:
        ((name, value),) = arguments.items()
        if name in _WRAPPER_NAMES and name not in model.model_fields and isinstance(value, dict):
            return cast("dict[str, Any]", value)
    return arguments


def empty_names(model: type[Arguments], arguments: Mapping[str, Any]) -> list[str]:
    """Return the optional arguments with an empty value: "", [], {} or null. 0 and false are values.

    Strict function calling makes every argument required, so models fill in empty values.
    """
    optional = [name for name, field in model.model_fields.items() if not field.is_required()]
    return [name for name in optional if name in arguments and _is_empty(arguments[name])]


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


class GenerationRequest(Arguments):
    """The body of `POST /v1/images/generations`, as EvoLink's page describes it."""

    prompt: Prompt
    image_urls: ImageUrls | OrNull = None
    size: SizeText = "auto"
    resolution: Resolution = TIERS[0]
    quality: Quality = DEFAULT_MODEL.default_quality
    n: Count = 1
    callback_url: CallbackUrl | OrNull = None
    model: Model = DEFAULT_MODEL.name
    mask_url: MaskUrl | OrNull = None
    background: Background | OrNull = None
    output_format: OutputFormat | OrNull = None

    @property
    def image_model(self) -> ImageModel:
        """The record of the model."""
        return models.model_named(self.model)

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.mask_url is not None and not self.image_urls:
            raise ValueError("mask_url needs image_urls: EvoLink ignores a mask without a picture to edit")
        if self.background == "transparent" and self.output_format == "jpeg":
            raise ValueError("background 'transparent' needs output_format 'png' or 'webp': jpeg has no transparency")
        return self

    @model_validator(mode="after")
    def _fits_the_model(self) -> Self:
        """Check the limits of the chosen model. The schema allows the values of all models."""
        model = self.image_model
        choices = {
            "quality": (self.quality, tuple(model.qualities)),
            "resolution": (self.resolution, tuple(model.limits.tiers)),
            "background": (self.background, (None, *model.backgrounds)),
            "output_format": (self.output_format, (None, *model.output_formats)),
        }
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise ValueError(f"{model.name} has no {name} '{value}': give {' or '.join(filter(None, allowed))}")
        counts = {
            "n": (self.n, model.images_max),
            "image_urls": (len(self.image_urls or ()), model.references_max),
            "prompt": (len(self.prompt), model.prompt_max),
        }
        for name, (count, maximum) in counts.items():
            if count > maximum:
                raise ValueError(f"{name} is above the limit of {model.name}: {maximum:,}")
        sizes.normalize(self.size, model.limits)
        return self

    def body(self) -> dict[str, Any]:
        """Return the caller's arguments unchanged, and `model`. `resolution` is absent if it has no effect."""
        body = {name: getattr(self, name) for name in GenerationRequest.model_fields if name in self.model_fields_set}
        if not sizes.takes_resolution(self.size, self.image_model.limits):
            body.pop("resolution", None)
        return {"model": self.model, **body}
