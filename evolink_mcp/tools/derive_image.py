"""derive_image: files of exact size, type and length from an image. Free, offline."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from mcp.server.mcpserver import Context
from mcp.server.mcpserver.tools import Tool
from mcp_types import CallToolResult
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict

from evolink_mcp.api.request import IMAGES_MAX, WHOLE, Arguments, OrNull, ignore_case, list_of
from evolink_mcp.api.targets import MIME_TYPES, TARGETS_MAX, parse_gravity, parse_target
from evolink_mcp.images.derive import parse_colour
from evolink_mcp.studio.derive import Derived, DerivedSet, DeriveRequest
from evolink_mcp.studio.studio import Studio
from evolink_mcp.tools.adapter import WRITES_FILES, flat_tool, format_error_as, result
from evolink_mcp.tools.schemas import ErrorOut, undescribed
from evolink_mcp.tools.task_answer import markdown_of

CENTRE = "centre"
KIND_OF = {mime_type: name for name, mime_type in MIME_TYPES.items()}


def _checked(check: Any) -> AfterValidator:
    """Return a validator that keeps the text and refuses it if `check` does."""

    def validate(text: str) -> str:
        check(text)
        return text

    return AfterValidator(validate)


TargetText = Annotated[str, Strict(), _checked(parse_target)]


class DeriveImageArguments(Arguments):
    """The arguments of derive_image."""

    source: Annotated[
        str,
        Field(
            description="Task ID, URI, URL or path of a picture, or last.",
        ),
    ]
    targets: Annotated[
        list[TargetText],
        BeforeValidator(list_of),
        Field(
            min_length=1,
            max_length=TARGETS_MAX,
            description="Pixels (1200x628) or names: og, instagram-story, youtube-thumbnail, linkedin, favicon, "
            "app-icon, a4-300dpi.",
        ),
    ]
    index: (
        Annotated[int, Strict(), Field(ge=0, lt=IMAGES_MAX, description="Index in a task, from 0."), WHOLE] | OrNull
    ) = None
    fit: Annotated[
        Literal["cover", "contain", "pad"],
        ignore_case("cover", "contain", "pad"),
        Field(description="cover cuts, contain may be smaller, pad adds borders."),
    ] = "cover"
    gravity: (
        Annotated[
            str,
            _checked(parse_gravity),
            Field(description="Part to keep: centre, edge, corner (top-left) or point (0.3,0.7)."),
        ]
        | OrNull
    ) = None
    format: (
        Annotated[
            # Gemini refuses an empty string in an enum, so "source" is the member for the default.
            Literal["source", "png", "jpeg", "webp", "ico"],
            ignore_case("source", "png", "jpeg", "webp", "ico"),
            # pydantic runs validators before the type from the last to the first, so this one sees the caller's text.
            BeforeValidator(lambda value: "jpeg" if value in ("jpg", "JPG") else value),
            Field(description="Default: as the source, or usual for the target."),
        ]
        | OrNull
    ) = None
    quality: Annotated[int, Strict(), Field(ge=1, le=100, description="Of jpeg, webp. Default 90."), WHOLE] | OrNull = (
        None
    )
    max_bytes: Annotated[int, Strict(), Field(ge=1, description="Lower the quality until it fits."), WHOLE] | OrNull = (
        None
    )
    background: (
        Annotated[
            str,
            _checked(parse_colour),
            Field(description="Colour of borders and transparent parts."),
        ]
        | OrNull
    ) = None
    trim: Annotated[bool, Strict(), Field(description="Remove plain borders first.")] = False


class DerivedFileOut(BaseModel):
    """One target: the saved file, or `error`."""

    model_config = ConfigDict(json_schema_extra=undescribed)

    target: str
    path: str | None = None
    url: str | None = None
    width: int | None = None
    height: int | None = None
    bytes: int | None = None
    mime_type: str | None = None
    sha256: str | None = None
    markdown: str | None = None
    error: str | None = None


class DeriveOut(BaseModel):
    """The answer of derive_image."""

    source: str | None = None
    files: list[DerivedFileOut] = []
    error: ErrorOut | None = None
    notes: list[str] = []


def derive_image_tool(studio: Studio) -> Tool:
    """Return the tool."""

    async def derive_image(req: DeriveImageArguments, ctx: Context[Any, Any]) -> CallToolResult:
        """Make exact files from a picture: size, type, byte limit. For banners, icons, print. Free, offline, never
        overwrites."""
        source = await studio.deriver.find(req.source, req.index)
        out = _out(await studio.deriver.derive(source, request_of(req)), req)
        # Claude Code drops the structured content of an error, so one finished file makes a success.
        return result(_text(out), out, is_error=all(file.error for file in out.files))

    return flat_tool(
        derive_image,
        DeriveImageArguments,
        DeriveOut,
        format_error_as(DeriveOut),
        title="Derive image",
        annotations=WRITES_FILES,
    )


def request_of(req: DeriveImageArguments) -> DeriveRequest:
    """Return the files to make. A repeated target counts once."""
    targets = {target.name: target for target in map(parse_target, req.targets)}
    return DeriveRequest(
        tuple(targets.values()),
        req.fit,
        parse_gravity(req.gravity or CENTRE),
        MIME_TYPES.get(req.format or ""),
        req.quality,
        req.max_bytes,
        None if req.background is None else parse_colour(req.background),
        req.trim,
    )


def _out(derived: DerivedSet, req: DeriveImageArguments) -> DeriveOut:
    source = derived.source
    image = source.image
    # A caller on another machine must not see a path of the server. Its derived files have links.
    is_visible = all(result.file is None or result.file.path is not None for result in derived.results)
    out = DeriveOut(
        source=str(source.path) if is_visible else f"evolink://images/{source.task_id}/{image.index if image else 0}",
        files=[_file_out(result) for result in derived.results],
    )
    out.notes = list(dict.fromkeys(note for result in derived.results for note in _notes(result, derived, req)))
    return out


def _file_out(derived: Derived) -> DerivedFileOut:
    file = derived.file
    if file is None:
        return DerivedFileOut(target=derived.target.name, error=derived.error)
    place = file.path or derived.url
    return DerivedFileOut(
        target=file.target,
        path=file.path,
        url=derived.url,
        width=file.width,
        height=file.height,
        bytes=file.bytes,
        mime_type=file.mime_type,
        sha256=file.sha256,
        markdown=markdown_of(place, file.target) if place else None,
    )


def _notes(derived: Derived, whole: DerivedSet, req: DeriveImageArguments) -> list[str]:
    facts = derived.facts
    if facts is None:
        return []
    name = derived.target.name
    kind = KIND_OF[facts.mime_type]
    width, height = whole.size
    notes: list[str] = []
    if facts.is_enlarged:
        notes.append(f"{name} is larger than the source ({width}x{height}), so it is enlarged and less sharp.")
    if facts.has_lost_alpha:
        notes.append(f"{name}: the transparent parts are filled.")
    if facts.has_lost_profile:
        notes.append(f"{name}: it has no colour profile, because that of the source describes no RGB colours.")
    if req.max_bytes is not None and facts.quality and facts.quality < (req.quality or 90):
        notes.append(f"{name}: quality {facts.quality} fits max_bytes.")
    if req.quality is not None and not facts.quality:
        notes.append(f"quality has no effect with {kind}.")
    if req.trim and req.fit == "contain":
        notes.append(f"After trim the source has {width}x{height} pixels.")
    return notes


def _text(out: DeriveOut) -> str:
    made = [file for file in out.files if file.error is None]
    lines = [f"{len(made)} of {len(out.files)} files made from {out.source}. Free of charge."]
    for file in out.files:
        if file.error is not None:
            lines.append(f"{file.target}: {file.error}")
        else:
            place = file.path or file.url or "saved"
            lines.append(f"{file.target}: {file.width}x{file.height} {file.mime_type}, {file.bytes:,} bytes, {place}")
            lines.append(f"  {file.markdown or ''} sha256 {file.sha256}")
    lines += [f"Note: {note}" for note in out.notes]
    return "\n".join(lines)
