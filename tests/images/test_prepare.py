"""An uploaded image is upright and has no metadata. An image that already is both stays unchanged."""

from __future__ import annotations

import io

import pytest
from drawings import SECRET, change_image, drawing, image_with_metadata, noise, with_orientation
from PIL import Image, ImageCms

from evolink_mcp.images.prepare import check_reference, normalize
from evolink_mcp.images.unusable import UnusableImage

KINDS = pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def pixels(picture: bytes) -> tuple[tuple[int, int], bytes]:
    with Image.open(io.BytesIO(picture)) as image:
        return image.size, image.convert("RGBA").tobytes()


@KINDS
def test_texts_and_exif_are_left_out_and_every_pixel_stays(kind: str) -> None:
    picture = image_with_metadata(kind)
    normalized = normalize(picture)
    assert SECRET.encode() in picture
    assert SECRET.encode() not in normalized
    assert pixels(normalized) == pixels(picture)


@KINDS
def test_bytes_after_the_image_are_removed(kind: str) -> None:
    picture = noise((64, 48), kind)
    assert normalize(picture + b"a second picture, or a program") == picture


@KINDS
def test_an_image_without_metadata_is_sent_byte_for_byte(kind: str) -> None:
    picture = noise((64, 48), kind)
    assert normalize(picture) == picture


@KINDS
def test_colours_keep_their_profile(kind: str) -> None:
    normalized = [
        normalize(drawing(kind=kind, icc_profile=PROFILE)),
        normalize(with_orientation(drawing(kind=kind), 6)),
    ]
    with Image.open(io.BytesIO(normalized[0])) as image:
        assert image.info["icc_profile"] == PROFILE


@KINDS
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_with_an_orientation_is_sent_upright(kind: str, orientation: int) -> None:
    """The image is red above, blue below and lighter at the left. A camera can store it in eight orientations."""
    upright_image = Image.new("RGB", (48, 64), (200, 0, 0))
    upright_image.paste((0, 0, 200), (0, 32, 48, 64))
    upright_image.paste((250, 120, 120), (0, 0, 24, 32))
    orientations = {
        1: lambda image: image,
        2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
        4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
        6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
        7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
        8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
    }[orientation](upright_image)
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    orientations.save(out, kind, exif=exif.tobytes())
    facts = check_reference(out.getvalue(), is_mask=False)
    assert (facts.width, facts.height, facts.is_upright) == (48, 64, orientation == 1)
    with Image.open(io.BytesIO(normalize(out.getvalue()))) as normalized:
        assert (normalized.size, dict(normalized.getexif())) == ((48, 64), {})
        for spot in ((10, 10), (40, 10), (10, 50)):
            channel_pairs = zip(normalized.convert("RGB").getpixel(spot), upright_image.getpixel(spot), strict=True)
            assert all(abs(first - second) < 30 for first, second in channel_pairs)


def test_a_rotated_photo_above_the_memory_limit_is_halved() -> None:
    limit = 64 * 48 // 2
    with Image.open(
        io.BytesIO(normalize(with_orientation(drawing(kind="JPEG"), 6), rotated_max_pixels=limit))
    ) as normalized:
        assert normalized.size == (24, 32)
    with pytest.raises(UnusableImage, match="save it upright"):
        check_reference(with_orientation(drawing(), 6), is_mask=False, rotated_max_pixels=limit)


def test_a_mask_above_the_memory_limit_is_refused() -> None:
    with pytest.raises(UnusableImage, match="at most 50 megapixels"):
        check_reference(drawing((1001, 1000), mode="RGBA"), is_mask=True, mask_max_pixels=1_000_000)


@pytest.mark.parametrize(
    ("mask", "share"),
    [
        pytest.param(drawing(mode="RGBA"), 1.0, id="all of it"),
        pytest.param(
            change_image(drawing(mode="RGBA"), lambda i: i.paste((0, 0, 0, 255), (0, 0, 32, 48))), 0.5, id="half"
        ),
        pytest.param(change_image(drawing(mode="RGBA"), lambda i: i.putalpha(255)), 0.0, id="none"),
        pytest.param(drawing(mode="LA"), 1.0, id="grey, of which all is nearly invisible"),
        pytest.param(drawing(), None, id="no alpha"),
    ],
)
def test_the_transparent_share_of_a_mask_is_measured(mask: bytes, share: float | None) -> None:
    alpha = check_reference(mask, is_mask=True).alpha
    assert (None if alpha is None else alpha.transparent_share) == share


@pytest.mark.parametrize("data", [b"", b"II*\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"\0" * 40])
def test_broken_exif_rotates_nothing(data: bytes) -> None:
    picture = drawing(exif=data)
    assert check_reference(picture, is_mask=False).is_upright
    assert data not in normalize(picture) or len(data) == 0


def test_an_invalid_orientation_rotates_nothing() -> None:
    assert check_reference(with_orientation(drawing(kind="JPEG"), 9), is_mask=False).is_upright
