"""Derived files have the exact size, type and length, keep the colour profile, and name everything that they lose."""

from __future__ import annotations

import io
from typing import Any

import pytest
from drawings import change_image, drawing, noise, with_orientation
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from evolink_mcp.images.decode_process import Decoder
from evolink_mcp.images.decode_protocol import pack_derived, unpack_derived
from evolink_mcp.images.derive import DerivedImage, DerivePlan, Output, derive
from evolink_mcp.images.inspect import ImageFacts
from evolink_mcp.images.metadata import Origin, with_origin
from evolink_mcp.images.structure import parts_of
from evolink_mcp.images.unusable import Reason, UnusableImage

in_time = pytest.mark.usefixtures("in_time")
KINDS = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP", "image/x-icon": "ICO"}
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
ORIGIN = Origin("a fox & a <hen> 狐", "task-unified-1-abc", "gpt-image-2")


def derive_one(content: bytes, size: tuple[int, int], mime_type: str = "image/png", **plan: Any) -> Image.Image:
    """Return the only derived image, decoded."""
    _, file = files(content, DerivePlan((Output((size,), mime_type),), **plan))[0]
    with Image.open(io.BytesIO(file)) as image:
        image.load()
        assert image.format == KINDS[mime_type]
        return image


def files(content: bytes, plan: DerivePlan) -> list[tuple[DerivedImage, bytes]]:
    return [part for part in derive(content, plan) if not isinstance(part, ImageFacts)]


def thirds(kind: str = "PNG") -> bytes:
    """Return an image of 300×100 pixels: a red, a green and a blue square."""
    image = Image.new("RGB", (300, 100))
    for index, colour in enumerate((RED, GREEN, BLUE)):
        image.paste(colour, (100 * index, 0, 100 * index + 100, 100))
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def is_near(pixel: Any, colour: tuple[int, ...]) -> bool:
    return all(abs(a - b) <= 12 for a, b in zip(pixel, colour, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    source=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    size=st.tuples(st.integers(1, 120), st.integers(1, 120)),
    fit=st.sampled_from(["cover", "contain", "pad"]),
    focus=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    mime_type=st.sampled_from(["image/png", "image/jpeg", "image/webp"]),
    mode=st.sampled_from(["RGB", "RGBA", "L", "LA", "P", "1"]),
    trim=st.booleans(),
)
def test_every_size_is_pixel_exact_except_that_contain_may_be_smaller_in_one_edge(
    source: Any, size: Any, fit: Any, focus: Any, mime_type: str, mode: str, trim: bool
) -> None:
    content = io.BytesIO()
    Image.new("RGBA", source, (10, 200, 90, 100)).convert(mode).save(content, "PNG")
    image = derive_one(content.getvalue(), size, mime_type, fit=fit, focus=focus, trim=trim)
    if fit == "contain":
        assert image.width <= size[0]
        assert image.height <= size[1]
        assert image.width == size[0] or image.height == size[1]
    else:
        assert image.size == size


@pytest.mark.parametrize(
    ("focus", "colour"), [((0, 0.5), RED), ((0.5, 0.5), GREEN), ((1, 0.5), BLUE), ((0.7, 0.1), BLUE), ((0.2, 1), RED)]
)
def test_cover_keeps_the_part_at_the_focus(focus: Any, colour: tuple[int, ...]) -> None:
    image = derive_one(thirds(), (50, 50), focus=focus)
    assert is_near(image.getpixel((25, 25)), colour)


def test_cover_of_the_same_shape_keeps_the_whole_picture() -> None:
    image = derive_one(thirds(), (150, 50))
    assert [is_near(image.getpixel((x, 25)), colour) for x, colour in ((10, RED), (75, GREEN), (140, BLUE))] == [
        True
    ] * 3


def test_pad_keeps_the_whole_picture_and_fills_the_rest_with_the_background() -> None:
    image = derive_one(thirds(), (300, 300), fit="pad", background=(1, 2, 3, 255))
    assert image.mode == "RGB"
    assert image.getpixel((150, 50)) == (1, 2, 3)
    assert image.getpixel((50, 150)) == RED
    assert image.getpixel((250, 150)) == BLUE


@pytest.mark.parametrize(("focus", "rows"), [((0.5, 0), (0, 99)), ((0.5, 1), (200, 299))])
def test_pad_puts_the_picture_at_the_focus(focus: Any, rows: tuple[int, int]) -> None:
    image = derive_one(thirds(), (300, 300), fit="pad", focus=focus, background=(9, 9, 9, 255))
    assert [image.getpixel((10, row)) for row in rows] == [RED, RED]
    assert image.getpixel((10, 150)) == (9, 9, 9)


def test_pad_without_a_background_is_transparent_where_the_type_allows_it_and_else_white() -> None:
    assert derive_one(thirds(), (300, 300), fit="pad").getpixel((150, 10)) == (0, 0, 0, 0)
    assert derive_one(thirds(), (300, 300), "image/webp", fit="pad").getpixel((150, 10))[3] == 0  # type: ignore[index]
    assert is_near(derive_one(thirds(), (300, 300), "image/jpeg", fit="pad").getpixel((150, 10)), (255, 255, 255))


def test_transparent_pixels_stay_transparent_and_do_not_darken_their_neighbours() -> None:
    content = io.BytesIO()
    image = Image.new("RGBA", (200, 100), (0, 0, 0, 0))
    image.paste((255, 255, 255, 255), (100, 0, 200, 100))
    image.save(content, "PNG")
    small = derive_one(content.getvalue(), (20, 10))
    assert small.getpixel((2, 5))[3] == 0  # type: ignore[index]
    visible = [small.getpixel((x, 5)) for x in range(20)]
    assert all(min(pixel[:3]) >= 250 for pixel in visible if pixel[3] > 8)  # type: ignore[index]


def test_jpeg_fills_transparent_pixels_and_reports_it() -> None:
    content = drawing(mode="RGBA")
    (facts, file), *_ = files(content, DerivePlan((Output(((32, 24),), "image/jpeg"),)))
    assert facts.has_lost_alpha
    with Image.open(io.BytesIO(file)) as image:
        assert is_near(image.getpixel((5, 5)), (255, 255, 255))


def test_an_opaque_alpha_channel_is_no_transparency() -> None:
    content = change_image(drawing(mode="RGBA"), lambda image: image.putalpha(255))
    (facts, _), *_ = files(content, DerivePlan((Output(((32, 24),), "image/jpeg"),)))
    assert not facts.has_lost_alpha


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_the_result_is_upright(kind: str, orientation: int) -> None:
    with Image.open(io.BytesIO(with_orientation(thirds(kind), orientation))) as rotated_image:
        from PIL import ImageOps

        expected = ImageOps.exif_transpose(rotated_image).convert("RGB").resize((30, 30))
    image = derive_one(with_orientation(thirds(kind), orientation), (30, 30), fit="cover")
    full_size = derive_one(with_orientation(thirds(kind), orientation), (300, 300), fit="contain")
    assert full_size.size == ((300, 100) if orientation < 5 else (100, 300))
    assert is_near(full_size.resize((30, 30)).convert("RGB").getpixel((2, 2)), expected.getpixel((2, 2)))  # type: ignore[arg-type]
    assert is_near(image.convert("RGB").getpixel((15, 15)), GREEN)


@pytest.mark.parametrize("source", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("mime_type", ["image/png", "image/jpeg", "image/webp"])
def test_the_colour_profile_is_kept_byte_for_byte(source: str, mime_type: str) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = derive_one(drawing(kind=source, icc_profile=profile), (20, 20), mime_type)
    assert image.info["icc_profile"] == profile


def test_the_profile_of_a_cmyk_file_is_left_out_and_reported() -> None:
    out = io.BytesIO()
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[16:20] = b"CMYK"
    Image.new("CMYK", (40, 40), (10, 20, 30, 40)).save(out, "JPEG", icc_profile=bytes(profile))
    (facts, file), *_ = files(out.getvalue(), DerivePlan((Output(((20, 20),), "image/png"),)))
    assert facts.has_lost_profile
    with Image.open(io.BytesIO(file)) as image:
        assert image.mode == "RGB"
        assert "icc_profile" not in image.info


def test_a_16_bit_picture_keeps_its_shades() -> None:
    out = io.BytesIO()
    Image.new("I;16", (40, 40), 0x8000).save(out, "PNG")
    assert derive_one(out.getvalue(), (20, 20)).getpixel((5, 5)) in (127, 128)


def test_trim_removes_borders_of_one_colour() -> None:
    image = Image.new("RGB", (100, 80), (250, 250, 250))
    image.paste(RED, (30, 20, 50, 60))
    out = io.BytesIO()
    image.save(out, "PNG")
    facts, *_ = derive(out.getvalue(), DerivePlan((Output(((20, 40),), "image/png"),), trim=True))
    assert isinstance(facts, ImageFacts)
    assert (facts.width, facts.height) == (20, 40)
    assert derive_one(out.getvalue(), (20, 40), trim=True).getcolors() == [(800, RED)]


def test_trim_removes_transparent_borders_of_any_colour() -> None:
    image = Image.new("RGBA", (100, 80), (0, 0, 0, 0))
    image.paste((200, 0, 0, 0), (0, 0, 100, 10))
    image.paste((9, 9, 9, 255), (40, 40, 50, 60))
    out = io.BytesIO()
    image.save(out, "PNG")
    facts, *_ = derive(out.getvalue(), DerivePlan((Output(((20, 40),), "image/png"),), trim=True))
    assert isinstance(facts, ImageFacts)
    assert (facts.width, facts.height) == (10, 20)


def test_trim_leaves_a_picture_of_one_colour_whole() -> None:
    assert derive_one(drawing(), (64, 48), trim=True).size == (64, 48)


def test_an_icon_holds_each_size() -> None:
    plan = DerivePlan((Output(((16, 16), (32, 32), (48, 48)), "image/x-icon"),))
    (facts, file), *_ = files(thirds(), plan)
    assert (facts.width, facts.height) == (48, 48)
    with Image.open(io.BytesIO(file)) as icon:
        assert icon.info["sizes"] == {(16, 16), (32, 32), (48, 48)}
        for size in ((16, 16), (32, 32), (48, 48)):
            icon.size = size
            assert icon.convert("RGB").getpixel((size[0] // 2, size[1] // 2)) == GREEN


@pytest.mark.parametrize("mime_type", ["image/jpeg", "image/webp"])
def test_max_bytes_lowers_the_quality_until_the_file_fits(mime_type: str) -> None:
    content = noise((300, 200))
    (unlimited_facts, unlimited_file), *_ = files(content, DerivePlan((Output(((300, 200),), mime_type),)))
    limit = len(unlimited_file) // 2
    (facts, file), *_ = files(content, DerivePlan((Output(((300, 200),), mime_type),), max_bytes=limit))
    assert len(file) <= limit
    assert 10 <= facts.quality < unlimited_facts.quality
    (_, better_file), *_ = files(content, DerivePlan((Output(((300, 200),), mime_type),), quality=facts.quality + 1))
    assert len(better_file) > limit, "the highest quality that fits"


@pytest.mark.parametrize("mime_type", ["image/jpeg", "image/webp", "image/png", "image/x-icon"])
def test_max_bytes_below_every_possible_file_is_refused_with_the_smallest_length(mime_type: str) -> None:
    content = noise((200, 200))
    (facts, file), *_ = files(content, DerivePlan((Output(((200, 200),), mime_type),), max_bytes=100))
    assert (facts.reason, file) == (Reason.ABOVE_MAX_BYTES, b"")
    reachable = facts.smallest_bytes
    (facts, file), *_ = files(content, DerivePlan((Output(((200, 200),), mime_type),), max_bytes=reachable))
    assert facts.reason is None
    assert len(file) == reachable


@pytest.mark.parametrize(
    ("size", "fit", "is_enlarged"),
    [
        ((300, 100), "cover", False),
        ((301, 100), "cover", True),
        ((100, 101), "cover", True),
        ((900, 100), "pad", False),
        ((900, 300), "pad", True),
        ((200, 200), "contain", False),
    ],
)
def test_an_enlargement_is_reported(size: Any, fit: Any, is_enlarged: bool) -> None:
    (facts, _), *_ = files(thirds(), DerivePlan((Output((size,), "image/png"),), fit=fit))
    assert facts.is_enlarged is is_enlarged


def test_a_large_jpeg_is_decoded_smaller_without_a_visible_difference() -> None:
    content = thirds("JPEG")
    with Image.open(io.BytesIO(content)) as image:
        out = io.BytesIO()
        image.resize((3000, 1000)).save(out, "JPEG", quality=95)
    small = derive_one(out.getvalue(), (90, 30), "image/png")
    assert [is_near(small.getpixel((x, 15)), colour) for x, colour in ((5, RED), (45, GREEN), (85, BLUE))] == [True] * 3


def test_a_damaged_picture_is_refused() -> None:
    content = noise((64, 64))
    middle = len(content) // 2
    with pytest.raises(UnusableImage):
        files(content[:middle] + bytes(200) + content[middle + 200 :], DerivePlan((Output(((8, 8),), "image/png"),)))


# --- the origin in the file ---


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("lossless", [True, False])
def test_the_origin_is_added_without_a_change_of_any_pixel(kind: str, mode: str, lossless: bool) -> None:
    options = {"lossless": lossless, "quality": 90} if kind == "WEBP" else {}
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile_option in ({}, {"icc_profile": profile}):
        content = drawing(kind=kind, mode="RGB" if kind == "JPEG" else mode, **options, **profile_option)
        mime_type = f"image/{kind.lower()}"
        file = with_origin(content, mime_type, parts_of(content, mime_type), ORIGIN)
        assert file is not None
        with Image.open(io.BytesIO(content)) as before, Image.open(io.BytesIO(file)) as after:
            assert before.convert("RGBA").tobytes() == after.convert("RGBA").tobytes()
            assert before.info.get("icc_profile") == after.info.get("icc_profile")
            text = str(after.text) if kind == "PNG" else after.info["xmp"].decode()  # type: ignore[attr-defined]
        assert "task-unified-1-abc" in text
        assert "gpt-image-2" in text
        assert ("a fox & a <hen> 狐" if kind == "PNG" else "a fox &amp; a &lt;hen&gt; 狐") in text


def test_the_xmp_of_a_long_prompt_fits_a_segment_and_stays_valid() -> None:
    from xml.etree import ElementTree

    content = drawing(kind="JPEG")
    origin = Origin("<&\N{FOX FACE}\x00\ud800" * 9_000, "task-unified-1-abc", "gpt-image-2")
    file = with_origin(content, "image/jpeg", parts_of(content, "image/jpeg"), origin)
    assert file is not None
    with Image.open(io.BytesIO(file)) as image:
        image.load()
        ElementTree.fromstring(image.info["xmp"].decode().removeprefix("\ufeff"))


def test_a_file_with_content_credentials_or_xmp_stays_as_it_is() -> None:
    png = drawing()
    ihdr_end = 8 + 25
    credential = b"\0\0\0\4caBX" + b"jumb" + b"\0\0\0\0"
    signed_images = {
        "image/png": png[:ihdr_end] + credential + png[ihdr_end:],
        "image/jpeg": drawing(kind="JPEG")[:2] + b"\xff\xeb\0\x0aJP\0\1data" + drawing(kind="JPEG")[2:],
    }
    webp = drawing(kind="WEBP")
    body = webp[12:] + b"C2PA\4\0\0\0jumb"
    signed_images["image/webp"] = b"RIFF" + (len(body) + 4).to_bytes(4, "little") + b"WEBP" + body
    for mime_type, content in signed_images.items():
        assert with_origin(content, mime_type, parts_of(content, mime_type), ORIGIN) is None
    for kind in ("JPEG", "WEBP"):
        content = drawing(kind=kind, xmp=b"<x/>")
        assert with_origin(content, f"image/{kind.lower()}", parts_of(content, f"image/{kind.lower()}"), ORIGIN) is None


@pytest.mark.parametrize("mime_type", ["image/png", "image/jpeg", "image/webp"])
def test_a_derived_file_has_its_origin(mime_type: str) -> None:
    image = derive_one(drawing(), (20, 20), mime_type, origin=ORIGIN)
    text = str(image.text) if mime_type == "image/png" else image.info["xmp"].decode()  # type: ignore[attr-defined]
    assert "task-unified-1-abc" in text


# --- the decoder process ---

OUTPUT = Output(((40, 30),), "image/png")
GOOD = DerivedImage("image/png", 40, 30)


@pytest.mark.parametrize(
    ("image", "length", "plan"),
    [
        pytest.param(DerivedImage("image/png", 41, 30), 9, {}, id="a larger size"),
        pytest.param(DerivedImage("image/png", 39, 30), 9, {}, id="a smaller size"),
        pytest.param(DerivedImage("image/png", 40, 31), 9, {"fit": "contain"}, id="larger than contain allows"),
        pytest.param(DerivedImage("image/png", 0, 30), 9, {"fit": "contain"}, id="no width"),
        pytest.param(DerivedImage("image/webp", 40, 30), 9, {}, id="another type"),
        pytest.param(GOOD, 0, {}, id="no content"),
        pytest.param(GOOD, 101, {"max_bytes": 100}, id="above max_bytes"),
        pytest.param(GOOD, 1 << 40, {}, id="above every limit"),
        pytest.param(DerivedImage("image/png", reason=Reason.TOO_MUCH_MEMORY), 9, {}, id="content of a refusal"),
        pytest.param(DerivedImage("image/png", 40, 30, quality=101), 9, {}, id="quality above 100"),
    ],
)
def test_a_record_that_does_not_fit_its_output_is_refused(image: DerivedImage, length: int, plan: Any) -> None:
    derive_plan = DerivePlan((OUTPUT,), **plan)
    assert unpack_derived(pack_derived(GOOD, 9), OUTPUT, derive_plan) == (GOOD, 9)
    with pytest.raises(UnusableImage) as error:
        unpack_derived(pack_derived(image, length), OUTPUT, derive_plan)
    assert error.value.reason is Reason.DECODER_FAILED


@pytest.mark.parametrize("record", [b"", b"EVD1", b"XXXX" + bytes(28), b"EVD1" + b"\xff" * 28])
def test_a_broken_record_is_refused(record: bytes) -> None:
    with pytest.raises(UnusableImage):
        unpack_derived(record, OUTPUT, DerivePlan((OUTPUT,)))


@in_time
@pytest.mark.anyio
async def test_the_process_makes_all_types_from_one_source(decoder: Decoder) -> None:
    outputs = tuple(Output(((40, 30),), mime_type) for mime_type in KINDS)
    target = io.BytesIO()
    facts, images, lengths = await decoder.derive(io.BytesIO(thirds("JPEG")), DerivePlan(outputs), target)
    assert (facts.width, facts.height, facts.mime_type) == (300, 100, "image/jpeg")
    assert [image.mime_type for image in images] == list(KINDS)
    assert sum(lengths) == len(target.getvalue())
    position = 0
    for mime_type, length in zip(KINDS, lengths, strict=True):
        with Image.open(io.BytesIO(target.getvalue()[position : position + length])) as image:
            assert (image.format, image.size) == (KINDS[mime_type], (40, 30))
        position += length


@in_time
@pytest.mark.anyio
async def test_a_file_that_cannot_be_short_enough_does_not_stop_the_others(decoder: Decoder) -> None:
    outputs = (Output(((200, 200),), "image/png"), Output(((10, 10),), "image/png"))
    target = io.BytesIO()
    _, images, lengths = await decoder.derive(
        io.BytesIO(noise((200, 200))), DerivePlan(outputs, max_bytes=2_000), target
    )
    assert [image.reason for image in images] == [Reason.ABOVE_MAX_BYTES, None]
    assert lengths == [0, len(target.getvalue())]


@in_time
@pytest.mark.anyio
async def test_the_process_refuses_a_file_that_is_no_image_and_answers_the_next_one(decoder: Decoder) -> None:
    plan = DerivePlan((Output(((8, 8),), "image/png"),))
    with pytest.raises(UnusableImage, match="not a PNG"):
        await decoder.derive(io.BytesIO(b"a letter"), plan, io.BytesIO())
    _, images, _ = await decoder.derive(io.BytesIO(drawing()), plan, io.BytesIO())
    assert (images[0].width, images[0].height) == (8, 8)
