"""Read photographs and label maps from any tool; write label maps that any tool reads."""

from __future__ import annotations

import io
import logging
import struct
import threading
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from PIL import Image, features

from moduseg.datasets.deep_colours import has_deep_colours, read_deep_colours
from moduseg.datasets.png import read_plain_png
from moduseg.errors import DataError
from moduseg.masks.palette import voc_palette

log = logging.getLogger("moduseg")
HEIF_SUFFIXES = (".heic", ".heif")
"""Endings of what telephones write; read where pillow-heif is installed."""
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff",
    # Asked for by name, since an older Pillow warns of a feature that it does not know.
    *((".avif",) if "avif" in features.modules and features.check("avif") else ()),
    *(HEIF_SUFFIXES if find_spec("pillow_heif") else ()),
)  # fmt: skip
"""Endings, in lower case, of the photographs that can be read here."""
MAX_PIXELS = 80_000_000
"""Larger pictures are refused after reading their header; decoded, they would fill the memory."""

_MAX_DARK = 16383
"""Pictures of 16 bits with no value above this, the end of 14 bits, have lost most of their range."""
_DARK_FOLDERS: set[Path] = set()
_LOCK = threading.Lock()
_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
DAMAGE = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, NotImplementedError,
    RuntimeError, struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip
"""What Pillow's decoders raise on damaged files."""


ImageRange = tuple[int, int] | Literal["auto"] | None
"""Values of 16-bit pictures that become black and white; `auto` is 0 and the end of the fewest bits that hold one."""


def check_image_range(image_range: tuple[int, ...] | str | None) -> ImageRange:
    """Return a range of 16-bit values as `read_image` takes it.

    Raises:
        ValueError: neither `None`, `auto` nor two ascending values of 0..65535.
    """
    if image_range is None or image_range == "auto":
        return image_range  # type: ignore[return-value]
    if isinstance(image_range, str) or len(image_range) != 2 or not 0 <= image_range[0] < image_range[1] <= 65535:
        shown = image_range if isinstance(image_range, str) else list(image_range)
        raise ValueError(
            f"image_range: got {shown}, expected auto or two ascending values from 0 to 65535; 12-bit cameras have "
            "[0,4095]"
        )
    return image_range[0], image_range[1]


def read_image(path: Path, image_range: ImageRange = None) -> np.ndarray:
    """Read a photograph as the models want it, whatever its file holds.

    Grey, 1-bit, indexed and CMYK pictures become RGB; grey and colours of 16 bits are divided by 257; transparency is
    composited on black, the colour of the models' padding; the EXIF orientation is applied; an animation gives its
    first frame.

    Args:
        path: the file.
        image_range: values of 16-bit pictures that become black and white, the same ones for all channels; 0 and 65535
            if omitted, which makes pictures of fewer bits dark and is said once for each folder.

    Returns:
        `[H, W, 3]` uint8, RGB.

    Raises:
        DataError: the file is absent, empty, truncated, no image, of float or 32-bit pixels, or over `MAX_PIXELS`.
    """
    path = Path(path)
    with _open(path) as picture:
        return np.ascontiguousarray(_turn_upright(_to_rgb(picture, path, image_range), picture))


def find_dark_range(path: Path) -> tuple[int, int] | None:
    """Return the lowest and highest value of a 16-bit picture that uses at most 14 of its bits; `None` for others.

    Raises:
        DataError: the file cannot be read.
    """
    path = Path(path)
    with _open(path, decode=False) as picture:
        is_deep = has_deep_colours(picture, path)
        if not picture.mode.startswith("I") and not is_deep:
            return None
    with _open(path) as picture:
        values = read_deep_colours(picture, path)[:, :, :3] if is_deep else np.asarray(picture)
    low, high = int(values.min()), int(values.max())
    return (low, high) if low >= 0 and high <= _MAX_DARK else None


def read_size(path: Path) -> tuple[int, int]:
    """Read the `(height, width)` of `read_image(path)` from the header.

    Raises:
        DataError: the file is absent, empty, no image, or over `MAX_PIXELS`.
    """
    with _open(path, decode=False) as picture:
        width, height = picture.size
        if picture.format == "TIFF":
            # Some versions of Pillow report the size of an undecoded TIFF upright, others as stored.
            width, height = picture.tag_v2[256], picture.tag_v2[257]  # type: ignore[attr-defined]
        return (width, height) if _read_orientation(picture) >= 5 else (height, width)


def read_label_png(path: Path, content: bytes | None = None) -> np.ndarray:
    """Read the class ids of a label map: indexed or grey, or a colour picture in the colours of the VOC palette.

    Args:
        path: the file; with `content`, its name for messages.
        content: bytes of the file, if they were read already, such as from an archive.

    Returns:
        `[H, W]` uint8, ids as stored (255 where ignored).

    Raises:
        DataError: the file cannot be read, is a JPEG, holds ids over 255, or colours that the palette does not have.
    """
    plain = read_plain_png(Path(path), MAX_PIXELS, content)
    if plain is not None:
        return plain
    with _open(path, content=content) as picture:
        if picture.format in ("JPEG", "MPO"):
            raise DataError(
                f"{path}: got a JPEG, whose compression changes ids at the edges of objects, expected a PNG; export "
                "the label map as PNG"
            )
        if picture.mode in ("RGB", "RGBA"):
            return _ids_of_colours(np.asarray(picture.convert("RGB")), path)
        ids = _read_ids(picture, path, content)
    if ids.size and int(ids.max()) > 255:
        raise DataError(f"{path}: got label id {int(ids.max())}, expected ids 0..255; store an 8-bit indexed PNG")
    return ids.astype(np.uint8)


def label_png_kind(path: Path) -> Literal["voc", "indexed", "grey", "colour"]:
    """Return how a label map is stored: indexed with the VOC palette, with another palette, grey, or in colours.

    Raises:
        DataError: the file is absent, empty, or no image.
    """
    with _open(path, decode=False) as picture:
        if picture.mode == "P":
            try:
                palette = np.array(picture.getpalette() or [], dtype=np.uint8)
            except DAMAGE as error:
                raise DataError(
                    f"{path}: its palette is unreadable ({_one_line(error)}), expected a whole indexed PNG; store it "
                    "again"
                ) from error
            is_voc = len(palette) >= 3 and np.array_equal(palette, voc_palette().ravel()[: len(palette)])
            return "voc" if is_voc else "indexed"
        return "colour" if picture.mode in ("RGB", "RGBA", "CMYK", "YCbCr") else "grey"


def read_index_png(path: Path) -> np.ndarray:
    """Read the object ids of an instance map: indexed, 8-bit or 16-bit grey.

    Returns:
        `[H, W]` int32, ids as stored.

    Raises:
        DataError: the file cannot be read, or is a colour picture.
    """
    with _open(path) as picture:
        return _read_ids(picture, path).astype(np.int32)


def write_label_png(array: np.ndarray) -> bytes:
    """Encode a label map as an indexed PNG with the VOC palette; equal arrays give equal bytes.

    Args:
        array: `[H, W]` of integers in 0..255.

    Raises:
        ValueError: another shape or type, or values out of range.
    """
    if array.ndim != 2 or array.dtype.kind not in "iub":
        raise ValueError(f"label map: got {array.shape} {array.dtype}, expected [H, W] of integers")
    if array.size and (int(array.min()) < 0 or int(array.max()) > 255):
        raise ValueError(f"label map: got ids {int(array.min())}..{int(array.max())}, expected 0..255")
    picture = Image.fromarray(array.astype(np.uint8))
    picture.putpalette(voc_palette().tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=False, compress_level=6)
    return buffer.getvalue()


def write_grey_png(array: np.ndarray) -> bytes:
    """Encode `[H, W]` uint8 as a grey PNG of 8 bits; equal arrays give equal bytes.

    Raises:
        ValueError: another shape or type.
    """
    if array.ndim != 2 or array.dtype != np.uint8:
        raise ValueError(f"picture: got {array.shape} {array.dtype}, expected [H, W] uint8")
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", optimize=False, compress_level=6)
    return buffer.getvalue()


def write_rgb_png(array: np.ndarray, compress_level: int = 6) -> bytes:
    """Encode `[H, W, 3]` uint8 as PNG; equal arrays give equal bytes.

    Args:
        array: the picture, at least one pixel.
        compress_level: 0 (none) to 9 (slowest).

    Raises:
        ValueError: another shape or type.
    """
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or array.size == 0:
        raise ValueError(f"picture: got {array.shape} {array.dtype}, expected [H, W, 3] uint8 with pixels")
    # OpenCV takes two thirds of Pillow's time and releases the interpreter lock.
    options = [cv2.IMWRITE_PNG_COMPRESSION, compress_level]
    if hasattr(cv2, "IMWRITE_PNG_FILTER"):  # OpenCV from 2025 on; trying all filters takes twice the time
        options += [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP]
    encoded, data = cv2.imencode(".png", cv2.cvtColor(array, cv2.COLOR_RGB2BGR), options)
    if not encoded:
        raise ValueError(f"picture: {array.shape} cannot be encoded as PNG")
    return bytes(data)


def _open(path: Path, decode: bool = True, content: bytes | None = None) -> Image.Image:
    path = Path(path)
    try:
        if (path.stat().st_size if content is None else len(content)) == 0:
            raise DataError(f"{path}: got an empty file (0 bytes), expected an image; fetch it again or leave it out")
        if path.suffix.lower() in HEIF_SUFFIXES and path.suffix.lower() in IMAGE_SUFFIXES:
            from pillow_heif import register_heif_opener

            register_heif_opener()
        picture = Image.open(path if content is None else io.BytesIO(content))
        if picture.width * picture.height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{picture.width} x {picture.height} pixels")
        if decode:
            picture.load()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file, expected an image; put it there or take its id off the list") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"{path}: got a picture too large to decode ({error}), expected at most {MAX_PIXELS} pixels; "
            "make it smaller"
        ) from error
    except DAMAGE as error:
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else f"damaged: {_one_line(error)}"
        raise DataError(
            f"{path}: unreadable as an image ({reason}), expected a whole {', '.join(s[1:] for s in IMAGE_SUFFIXES)} "
            "file; fetch it again or leave it out"
        ) from error
    return picture


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _scale_to_bytes(values: np.ndarray, path: Path, image_range: ImageRange) -> np.ndarray:
    """Return values of 16 bits in 8 bits."""
    highest = int(values.max())
    if image_range is None:
        if highest <= _MAX_DARK:
            _warn_of_dark_folder(path.parent, path.name, highest)
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if image_range == "auto":
        image_range = 0, _find_end(highest)
    low, high = image_range
    scaled = (np.clip(values.astype(np.int64), low, high) - low) * 510 + (high - low)
    return (scaled // (2 * (high - low))).astype(np.uint8)


def _warn_of_dark_folder(folder: Path, name: str, highest: int) -> None:
    """Say once for each folder that its 16-bit pictures become dark."""
    with _LOCK:  # stages read images in several threads
        is_new = folder not in _DARK_FOLDERS
        _DARK_FOLDERS.add(folder)
    if is_new:
        log.warning(
            "%s: 16-bit pictures that use a small part of their range, such as %s (up to %d of 65535), become nearly "
            "black; set dataset.image_range=[0,%d], or auto",
            folder,
            name,
            highest,
            _find_end(highest),
        )


def _find_end(highest: int) -> int:
    """Return the largest value of the fewest bits, of 8, 10, 12, 14 and 16, that hold a value."""
    return next(end for end in (255, 1023, 4095, 16383, 65535) if highest <= end)


def _to_rgb(picture: Image.Image, path: Path, image_range: ImageRange) -> np.ndarray:
    try:
        if picture.mode.startswith("I"):
            grey = np.asarray(picture)
            if int(grey.min()) < 0 or int(grey.max()) > 65535:
                raise DataError(f"{path}: got {picture.mode} pixels over 16 bits; convert it to 8-bit RGB")
            return np.repeat(_scale_to_bytes(grey, path, image_range)[:, :, None], 3, axis=2)
        if has_deep_colours(picture, path):
            colours = read_deep_colours(picture, path)
            rgb = _scale_to_bytes(colours[:, :, :3], path, image_range)
            if colours.shape[2] == 3:
                return rgb
            opacity = _scale_to_bytes(colours[:, :, 3:], path, (0, 65535))
            return _composite_on_black(Image.fromarray(np.concatenate([rgb, opacity], axis=2)))
        if picture.mode == "F":
            raise DataError(f"{path}: got float pixels, whose range is unknown; convert it to 8-bit RGB")
        if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
            return _composite_on_black(picture.convert("RGBA"))
        return np.asarray(picture.convert("RGB"))
    except DAMAGE as error:
        raise DataError(
            f"{path}: {picture.mode} pixels cannot become RGB ({_one_line(error)}); convert it to 8-bit RGB"
        ) from error


def _composite_on_black(rgba: Image.Image) -> np.ndarray:
    """Return a picture with transparency as `[H, W, 3]` uint8 on black."""
    return np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba))[:, :, :3]


def _read_orientation(picture: Image.Image) -> int:
    try:
        value = picture.getexif().get(_ORIENTATION_TAG, 1)
    except DAMAGE:
        return 1  # a picture with a damaged EXIF block is still usable
    return value if isinstance(value, int) and value in _TRANSPOSE else 1


def _turn_upright(array: np.ndarray, picture: Image.Image) -> np.ndarray:
    # Decoded TIFFs are upright already, and Pillow then reports orientation 1.
    orientation = _read_orientation(picture)
    return np.asarray(Image.fromarray(array).transpose(_TRANSPOSE[orientation])) if orientation > 1 else array


def _read_ids(picture: Image.Image, path: Path, content: bytes | None = None) -> np.ndarray:
    mode = picture.mode
    if mode not in ("P", "PA", "L", "LA", "1", "I") and not mode.startswith("I;16"):
        raise DataError(f"{path}: got {mode} pixels, expected an indexed or grey PNG; store ids, not colours")
    array = np.asarray(picture.getchannel(0) if mode in ("PA", "LA") else picture)
    if array.size and array.dtype.kind == "i" and int(array.min()) < 0:
        raise DataError(f"{path}: got id {int(array.min())}, expected ids >= 0")
    if mode == "L" and picture.format == "PNG":
        # Pillow stretches 2-bit and 4-bit grey to 0..255, which would turn id 1 into 85 or 17.
        with Path(path).open("rb") if content is None else io.BytesIO(content) as file:
            depth = file.read(25)[24]
        array = array // {2: 85, 4: 17}.get(depth, 1)
    return array


def _ids_of_colours(colours: np.ndarray, path: Path) -> np.ndarray:
    palette = voc_palette().astype(np.int64)
    label_of = {int(code): label for label, code in enumerate(palette @ np.array([65536, 256, 1]))}
    codes, inverse = np.unique(colours.astype(np.int64) @ np.array([65536, 256, 1]), return_inverse=True)
    unknown = [int(code) for code in codes if int(code) not in label_of]
    if unknown:
        first = tuple(unknown[0].to_bytes(3, "big"))
        raise DataError(
            f"{path}: got a colour picture with {len(unknown)} colours outside the VOC palette (first {first}), "
            "expected class ids; store an indexed or 8-bit grey PNG"
        )
    ids = np.array([label_of[int(code)] for code in codes], dtype=np.uint8)
    return ids[inverse].reshape(colours.shape[:2])
