"""Convert a HEIC photo to JPEG or PNG with the optional package pillow-heif.

`convert` runs in a separate decoder process: the HEVC decoder needs a thread, which no other decoder process may start.
"""

from __future__ import annotations

import io
from importlib.util import find_spec
from typing import Any, cast

from evolink_mcp.images.unusable import Reason, UnusableImage

PACKAGE = "pillow_heif"
# pillow-heif needs 8 bytes for a pixel at once. The decoder has 300 MiB.
CONVERTED_MAX_PIXELS = 25_000_000
ZEROS_MIN_BYTES = 1024


def is_available() -> bool:
    """Return whether the extra `heic` is installed. It imports nothing."""
    return find_spec(PACKAGE) is not None


def load() -> None:
    """Import everything that `convert` needs, so that it opens no file."""
    import pillow_heif

    # One thread, so that one image cannot use several processors.
    pillow_heif.options.DECODE_THREADS = 1


def convert(content: bytes) -> bytes:
    """Return the first image of a HEIC file, upright and without metadata, as a JPEG, or as a PNG if it has alpha.

    Raises:
        UnusableImage: it is too large or cannot be decoded.
    """
    import pillow_heif
    from PIL import Image

    from evolink_mcp.images.prepare import SAVE_OPTIONS  # here, because the server imports this module at its start

    # An unfinished download ends with zeros. The decoder would paint them without an error.
    if not any(content[-ZEROS_MIN_BYTES:]):
        raise UnusableImage(Reason.INCOMPLETE)
    try:
        photo: Any = cast("Any", pillow_heif).open_heif(io.BytesIO(content), convert_hdr_to_8bit=True)
        if photo.size[0] * photo.size[1] > CONVERTED_MAX_PIXELS:
            raise UnusableImage(Reason.HEIC_TOO_LARGE)
        icc_profile = photo.info.get("icc_profile")
        image = photo.to_pillow()
    except UnusableImage:
        raise
    except MemoryError as error:
        raise UnusableImage(Reason.HEIC_TOO_LARGE) from error
    except (OSError, SyntaxError, EOFError, ValueError, IndexError, RuntimeError) as error:
        is_memory = "memory" in str(error).lower()  # libheif has no other sign of it
        raise UnusableImage(Reason.HEIC_TOO_LARGE if is_memory else Reason.DAMAGED) from error
    if image.mode == "I;16":  # grey with more than 8 bits: keep the high bytes
        image = Image.frombytes("L", image.size, image.tobytes()[1::2])
    image.info.clear()
    if image.mode not in ("RGB", "L", "RGBA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    out = io.BytesIO()
    mime_type = "image/png" if image.mode == "RGBA" else "image/jpeg"
    image.save(out, icc_profile=icc_profile, **SAVE_OPTIONS[mime_type])
    return out.getvalue()
