"""From a file to the network's input: decode, orient, resize, crop, normalise.

The same code validates, predicts and serves. The pixels are those of timm's evaluation transform
(`timm.data.transforms_factory.transforms_imagenet_eval`): sizes and offsets are rounded as
there, and both resize with Pillow. Two departures, both before resizing: the orientation of the
camera is applied, and transparent pixels are laid on white (timm drops alpha, which shows
whatever colour the editor left below). Colour profiles are ignored, as in timm.
"""

import functools
import io
import math
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from coat_deploy.errors import ImageError
from coat_deploy.image_structure import check_gif, check_jpeg, check_png, webp_size
from coat_deploy.runner import Array
from coat_deploy.spec import Interpolation, Preprocess, Size

MAX_RESIZED_PIXELS = 1 << 27
"""Most pixels that resizing may make on its way (512 MiB): a thin strip grows without bound."""

# The plugins are opened directly: `Image.open` would apply Pillow's process-wide limit on pixels
# (as a warning, then an error) instead of ours, and try formats beyond these.
_FORMATS: tuple[tuple[tuple[bytes, ...], type[ImageFile.ImageFile]], ...] = (
    ((b"\xff\xd8\xff",), JpegImagePlugin.JpegImageFile),
    ((b"\x89PNG\r\n\x1a\n",), PngImagePlugin.PngImageFile),
    ((b"RIFF",), WebPImagePlugin.WebPImageFile),
    ((b"GIF87a", b"GIF89a"), GifImagePlugin.GifImageFile),
    ((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), TiffImagePlugin.TiffImageFile),
    ((b"BM",), BmpImagePlugin.BmpImageFile),
)
_CHECKS = {
    JpegImagePlugin.JpegImageFile: check_jpeg,
    PngImagePlugin.PngImageFile: check_png,
    GifImagePlugin.GifImageFile: check_gif,
}
_FILTERS: dict[Interpolation, Image.Resampling] = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
}
_ORIENTATION = 274  # the EXIF tag; its values 2 to 8 are undone by:
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF tags
_WHITE = (255, 255, 255)


@dataclass(frozen=True)
class ImageLimits:
    """What is refused before any pixel is decoded, from the file's size and header.

    `min_side` keeps out spacers and tracking pixels, `max_aspect` (longer side by shorter)
    strips of which a centre crop would show next to nothing.
    """

    max_bytes: int = 64 << 20
    max_pixels: int = 64 << 20
    min_side: int = 4
    max_aspect: float = 100.0


DEFAULT_LIMITS = ImageLimits()


def decode(
    source: Path | bytes, name: str | None = None, limits: ImageLimits = DEFAULT_LIMITS
) -> Image.Image:
    """Return an image as upright 8-bit RGB; of several frames or pages the first.

    `source` is a file or its content: JPEG, PNG, WebP, BMP, GIF or TIFF, told by content, not
    by suffix. `name` stands for it in errors; a path names itself.
    Raises: ImageError for whatever is not a whole image within `limits`.
    """
    name = name or _name(source)
    data = source if isinstance(source, bytes) else _read(source, name, limits.max_bytes)
    if not data:
        raise ImageError(f"{name}: the file is empty (0 bytes). Fetch or save it again.")
    if len(data) > limits.max_bytes:
        raise _too_large(name, len(data), limits.max_bytes)
    plugin = _plugin(data, name)
    _check_structure(plugin, data, name, limits)
    try:
        with plugin(io.BytesIO(data)) as image:
            _check_header(image.size, name, limits)
            image.load()
            return _upright(image, to_rgb(image, name))
    except ImageError:
        raise
    # Some decoders hold Pillow's own limit as well, which only counts where ours was raised.
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as error:
        reason = str(error).rstrip(". ") or "out of memory"
        raise ImageError(f"{name}: too many pixels ({reason}). Scale it down.") from error
    # Decoders raise what they stumble over: OSError, SyntaxError, struct.error, OverflowError...
    except Exception as error:
        reason = str(error).rstrip(". ") or type(error).__name__
        raise ImageError(
            f"{name}: the {plugin.format} image is damaged, cut short or of an unknown kind "
            f"({reason}). Fetch or save it again."
        ) from error


def preprocess(image: Image.Image, how: Preprocess, name: str = "image") -> Array:
    """Return an image of any mode as the network's input, (3, H, W) float32, normalised.

    Raises: ImageError for a mode without a known range, or a strip too thin to resize.
    """
    pixels = np.asarray(resize_and_crop(to_rgb(image, name), how, name))  # (H, W, 3) uint8
    table = _normalised_values(how.mean, how.std)
    normalised = np.empty((3, *how.input_size), np.float32)
    for channel in range(3):
        # No uint8 is out of range: "clip" only spares the check and its buffer.
        np.take(table[channel], pixels[..., channel], out=normalised[channel], mode="clip")
    return normalised


def load(
    source: Path | bytes,
    how: Preprocess,
    limits: ImageLimits = DEFAULT_LIMITS,
    name: str | None = None,
) -> Array:
    """Decode and preprocess: a file or its content to (3, H, W) float32.

    Raises: ImageError, as `decode` and `preprocess`.
    """
    name = name or _name(source)
    return preprocess(decode(source, name, limits), how, name)


def normalise(
    pixels: npt.NDArray[np.uint8], mean: tuple[float, ...], std: tuple[float, ...]
) -> Array:
    """Return RGB pixels (..., 3, H, W) as the network's input, float32.

    In the order of torch's operations, so that the bits are the same on every machine.
    """
    red_green_blue = (-1, 1, 1)
    centre = np.asarray(mean, dtype=np.float32).reshape(red_green_blue)
    spread = np.asarray(std, dtype=np.float32).reshape(red_green_blue)
    return (pixels.astype(np.float32) / np.float32(255) - centre) / spread


def to_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """Return an image of any mode as 8-bit RGB, transparent parts on white.

    Of 16 bits the upper 8 are kept, for grey here as for colour in Pillow; Pillow's own
    conversion of grey would clip at 255 instead.
    Raises: ImageError for a mode without a known range.
    """
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    # Before Pillow 11, 16-bit grey PNGs came as 32-bit integers.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return _from_16_bits(image)
    if image.mode in ("I", "F", "LAB", "HSV"):
        raise ImageError(
            f"{name}: its samples have no known black and white (got Pillow's mode {image.mode}, "
            "expected 1 to 16 bits of grey, palette, RGB or CMYK). Save it as 8-bit RGB."
        )
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":  # premultiplied; Pillow converts it to nothing else
        image = image.convert("LA")
    image = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, _WHITE)
    canvas.paste(image, mask=image)
    return canvas


def resize_and_crop(image: Image.Image, how: Preprocess, name: str = "image") -> Image.Image:
    """Return an RGB image at `how.input_size`, by timm's geometry; `name` is for errors.

    Raises: ImageError when resizing would pass through more than `MAX_RESIZED_PIXELS`.
    """
    height, width = how.input_size
    resized = _resized((image.height, image.width), how)
    # Pillow resizes rows first, so that the old height meets the new width in between.
    if resized[1] * max(resized[0], image.height) > MAX_RESIZED_PIXELS:
        raise ImageError(
            f"{name}: too long and thin (got {image.width}x{image.height} pixels, which a "
            f"{width}x{height} input scales to {resized[1]}x{resized[0]}). Crop it first."
        )
    if resized != (image.height, image.width):
        image = image.resize((resized[1], resized[0]), _FILTERS[how.interpolation])
    left, top = _offset(image.width, width), _offset(image.height, height)
    if image.width >= width and image.height >= height:
        return image.crop((left, top, left + width, top + height))
    red, green, blue = (round(255 * value) for value in how.mean)
    fill = (red, green, blue) if how.crop_mode == "border" else (0, 0, 0)
    canvas = Image.new("RGB", (width, height), fill)
    canvas.paste(image, (-left, -top))
    return canvas


def _resized(size: Size, how: Preprocess) -> Size:
    """Return the (height, width) before cropping.

    Source: torchvision's `Resize` for a square centre crop, timm's `ResizeKeepRatio` for the
    others: one truncates the longer side, the other rounds both.
    """
    scaled = tuple(math.floor(side / how.crop_pct) for side in how.input_size)
    if how.crop_mode == "squash":
        return (scaled[0], scaled[1])
    if how.crop_mode == "center" and scaled[0] == scaled[1]:
        longer = int(scaled[0] * max(size) / min(size))
        return (longer, scaled[0]) if size[0] > size[1] else (scaled[0], longer)
    ratios = (size[0] / scaled[0], size[1] / scaled[1])
    ratio = max(ratios) if how.crop_mode == "border" else min(ratios)
    # timm fails where a side rounds to 0.
    return (max(1, round(size[0] / ratio)), max(1, round(size[1] / ratio)))


def _offset(side: int, crop: int) -> int:
    """Return where a centred crop begins; negative when it is larger than the image.

    Both round, and not alike: a crop to the even half, padding down.
    """
    return round((side - crop) / 2) if side >= crop else -((crop - side) // 2)


@functools.lru_cache(maxsize=16)
def _normalised_values(mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """Return (3, 256): each 8-bit value normalised.

    A look-up costs what a fused multiply-add over the image does, and has timm's very bits.
    """
    every = np.arange(256, dtype=np.uint8)
    return normalise(np.tile(every, (3, 1, 1)), mean, std)[:, 0]


def _name(source: Path | bytes) -> str:
    return "image" if isinstance(source, bytes) else str(source)


def _read(path: Path, name: str, max_bytes: int) -> bytes:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ImageError(f"{name}: is a folder (expected an image). Name a file in it.")
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited on for ever
            raise ImageError(f"{name}: is not a regular file. Copy its content to one.")
        if status.st_size > max_bytes:
            raise _too_large(name, status.st_size, max_bytes)
        with path.open("rb") as file:
            return file.read(max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or error
        raise ImageError(
            f"{name}: cannot be read ({reason}). Check the path and its permissions."
        ) from error


def _too_large(name: str, size: int, max_bytes: int) -> ImageError:
    return ImageError(
        f"{name}: the file is too large (got {size / 2**20:.1f} MiB, expected at most "
        f"{max_bytes / 2**20:.1f} MiB). Save it smaller."
    )


def _plugin(data: bytes, name: str) -> type[ImageFile.ImageFile]:
    for prefixes, plugin in _FORMATS:
        if data.startswith(prefixes):
            return plugin
    raise ImageError(
        f"{name}: not an image of a format that is read (it begins with {data[:12]!r}, expected "
        "JPEG, PNG, WebP, BMP, GIF or TIFF). Convert it to one of these."
    )


def _check_structure(
    plugin: type[ImageFile.ImageFile], data: bytes, name: str, limits: ImageLimits
) -> None:
    """Raise ImageError for what would hold a decoder up, or fill the memory before it tells."""
    if plugin in _CHECKS:
        _CHECKS[plugin](data, name)
    if plugin is WebPImagePlugin.WebPImageFile and (size := webp_size(data)):
        _check_header(size, name, limits)


def _check_header(size: tuple[int, int], name: str, limits: ImageLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise ImageError(
            f"{name}: too many pixels (got {width}x{height}, expected at most "
            f"{limits.max_pixels / 1e6:.0f} million). Scale it down."
        )
    if min(size) < limits.min_side:
        raise ImageError(
            f"{name}: too small (got {width}x{height} pixels, expected sides of at least "
            f"{limits.min_side}). Use a larger copy."
        )
    if max(size) > limits.max_aspect * min(size):
        raise ImageError(
            f"{name}: too long and thin (got {width}x{height} pixels, expected sides within "
            f"{limits.max_aspect:g}:1). Crop it first."
        )


def _upright(image: ImageFile.ImageFile, rgb: Image.Image) -> Image.Image:
    """Turn `rgb` as the camera was held; `image`, loaded, carries the metadata."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # broken metadata, as varied as broken pixels, does not spoil an image
        return rgb
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def _from_16_bits(image: Image.Image) -> Image.Image:
    tags = getattr(image, "tag_v2", {})
    bits = 12 if tags.get(_BITS_PER_SAMPLE) == (12,) else 16
    values = np.asarray(image)
    grey = (values >> (bits - 8)).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero: Pillow inverts only up to 8 bits
        grey = 255 - grey
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")
