"""What may be asked of EvoLink, strictly; what comes back is read in `task`.

Every limit of EvoLink's page "POST /v1/images/generations" stands here once, next to its type.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, Self, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator
from pydantic.json_schema import SkipJsonSchema

from evolink_mcp.api import sizes, urls
from evolink_mcp.api.size_grammar import advice
from evolink_mcp.sanitize import harmless

MODEL = "gpt-image-2"
PROMPT_MAX = 32_000
REFERENCES_MAX = 16
URL_MAX = 8_192
CALLBACK_URL_MAX = 2_048
IMAGES_MAX = 10
TASK_ID_PATTERN = r"^task-unified-[0-9A-Za-z_-]{1,115}$"

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
_LOCAL_SCHEMES = ("file", "data", "evolink")
_SECOND_URL = re.compile(r"[,;|\s]https?://", re.IGNORECASE)


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must say something: only white space was given")
    return text


def fold(*words: str) -> BeforeValidator:
    """Take one of `words` in any case and with blanks around it; leave everything else to the type."""
    known = {word.lower(): word for word in words}

    def fold(value: Any) -> Any:
        return known.get(value.strip().lower(), value) if isinstance(value, str) else value

    return BeforeValidator(fold)


def _whole(value: Any) -> Any:
    """3.0 is 3: JSON Schema counts it as an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _list_in_a_string(value: Any) -> Any:
    """A list written as a JSON string is the list (some hosts send it so); one bare string is a list of one."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return [value]


def _picture_source(text: str) -> str:
    """A public http(s) URL, or something local that `references` turns into one: never another scheme."""
    text = text.strip()
    if not text:
        raise ValueError("is empty: give a URL or the path of a picture")
    if "\0" in text:
        raise ValueError("contains a NUL character")
    if _SECOND_URL.search(text):
        raise ValueError("holds two addresses: give a list, with each of them as a string of its own")
    scheme = _SCHEME.match(text)
    if scheme is None or scheme[1].lower() in _LOCAL_SCHEMES:
        return text
    if scheme[1].lower() not in ("http", "https"):
        raise ValueError(f"cannot be a {harmless(scheme[1], 20)}: address; use https://, a path or file://")
    return urls.check_public_url(text, schemes=("http", "https"), max_length=URL_MAX)


def is_remote(source: str) -> bool:
    """Whether EvoLink can fetch `source` by itself: an http(s) URL."""
    return source[:8].lower().startswith(("http://", "https://"))


def is_file(source: str) -> bool:
    """Whether `source` names a file of this machine, by its path or a file: URI."""
    return bool(source) and not is_remote(source) and not source[:8].lower().startswith(("data:", "evolink:"))


Prompt = Annotated[
    str,
    Field(min_length=1, max_length=PROMPT_MAX, description="What to draw, or how to edit the reference images."),
    AfterValidator(_not_blank),
]
PictureSource = Annotated[str, Strict(), AfterValidator(_picture_source)]
ImageUrls = Annotated[
    list[PictureSource],
    BeforeValidator(_list_in_a_string),
    Field(
        min_length=1,
        max_length=REFERENCES_MAX,
        description="Reference images to edit or combine: public URLs, absolute paths, file: or data: URIs, or "
        "evolink://images/{task_id}/{index} of an earlier result. .jpeg .jpg .png .webp, 50 MB each.",
    ),
]


def _size(text: str) -> str:
    """The size to send; what people say instead is refused with the very value to use."""
    if (told := advice(text)) is not None:
        raise sizes.IllegalSize(f"EvoLink does not take this as a size: {told}")
    return sizes.normalize(text)


SizeText = Annotated[
    str,
    AfterValidator(_size),
    Field(
        description="auto, a ratio (" + " ".join(sizes.RATIOS) + ") or WxH in pixels: edges multiples of "
        f"{sizes.EDGE_STEP} from {sizes.MIN_EDGE} to {sizes.MAX_EDGE}, {sizes.MIN_PIXELS} to {sizes.MAX_PIXELS} "
        f"pixels, at most {sizes.MAX_ASPECT}:1.",
        json_schema_extra={
            "pattern": "^(" + "|".join(("auto", *sizes.RATIOS)) + r"|[1-9]\d{1,3}[xX×][1-9]\d{1,3})$",
            "examples": ["16:9", "2048x1152"],
        },
    ),
]
Resolution = Annotated[
    Literal["1K", "2K", "4K"],
    fold(*sizes.TIERS),
    Field(description="Tier for a ratio; ignored with auto or WxH."),
]
Quality = Annotated[
    Literal["low", "medium", "high"],
    fold("low", "medium", "high"),
    Field(description="Drives cost: low about 0.11x, high about 4x of medium."),
]
# Stands last, so that the type before it publishes its own limits.
WHOLE = BeforeValidator(_whole)
Count = Annotated[
    int,
    Strict(),
    Field(ge=1, le=IMAGES_MAX, description="How many images; each is billed. More than 1 may bring fewer."),
    WHOLE,
]
CallbackUrl = Annotated[
    str,
    AfterValidator(lambda url: urls.check_public_url(url, max_length=CALLBACK_URL_MAX)),
    Field(
        max_length=CALLBACK_URL_MAX,
        description="Public https address that EvoLink posts the finished task to.",
        json_schema_extra={"pattern": "^https://"},
    ),
]
Model = Annotated[Literal["gpt-image-2"], fold(MODEL), Field(description="The image model.")]
MaskUrl = Annotated[
    PictureSource,
    Field(
        description="PNG with alpha, same pixel size as the first reference: transparent is redrawn. Needs image_urls."
    ),
]
Background = Annotated[
    Literal["opaque", "transparent"],
    fold("opaque", "transparent"),
    Field(description="transparent needs output_format png or webp."),
]
OutputFormat = Annotated[
    Literal["png", "jpeg", "webp"],
    fold("png", "jpeg", "webp"),
    Field(description="File type; EvoLink's default is png."),
]
TaskId = Annotated[
    str,
    BeforeValidator(lambda value: value.strip() if isinstance(value, str) else value),
    Field(pattern=TASK_ID_PATTERN, description="Task id, as returned by generate_image."),
]
# Null is accepted and means the default; the published schema does not mention it.
OrNull = SkipJsonSchema[None]


class Arguments(BaseModel):
    """What a caller said: unknown names are refused, and null means the default."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        said: dict[str, Any] = {}
        for name, value in cast("dict[str, Any]", data).items():
            field = cls.model_fields.get(name)
            if value is None and field is not None and not field.is_required():
                if field.default is not None:
                    said[name] = field.default
                continue
            said[name] = value
        return said


class GenerationRequest(Arguments):
    """`POST /v1/images/generations` as the page describes it; `body()` is what goes out."""

    prompt: Prompt
    image_urls: ImageUrls | OrNull = None
    size: SizeText = "auto"
    resolution: Resolution = "1K"
    quality: Quality = "medium"
    n: Count = 1
    callback_url: CallbackUrl | OrNull = None
    model: Model = "gpt-image-2"
    mask_url: MaskUrl | OrNull = None
    background: Background | OrNull = None
    output_format: OutputFormat | OrNull = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.mask_url is not None and not self.image_urls:
            raise ValueError("mask_url needs image_urls: EvoLink ignores a mask without a picture to edit")
        if self.background == "transparent" and self.output_format == "jpeg":
            raise ValueError("background 'transparent' needs output_format 'png' or 'webp': jpeg has no transparency")
        return self

    def body(self) -> dict[str, Any]:
        """What the caller said, unchanged, and `model`; `resolution` only where it has an effect."""
        said = {name: getattr(self, name) for name in GenerationRequest.model_fields if name in self.model_fields_set}
        if not sizes.takes_resolution(self.size):
            said.pop("resolution", None)
        return {"model": self.model, **said}
