"""Encoded picture -> uint8 pixels of the size the model asks for, bit-identical to the reference processor's."""

from __future__ import annotations

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from vlmrt.runtime.errors import RequestError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

Pixels = NDArray[np.uint8]


def limit_pillow(max_pixels: int) -> None:
    """Process-wide settings of Pillow: nothing above max_pixels is opened, nothing is completed by guess."""
    Image.MAX_IMAGE_PIXELS = max_pixels
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd metadata, which pictures from anywhere are full of
    warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def decode_image(encoded: bytes, size: tuple[int, int], target_size: tuple[int, int], max_pixels: int) -> Pixels:
    """Frame 0, upright, as RGB, resized.

    Args: size (width, height) is what the header promised, after EXIF orientation.
    Shapes: -> uint8 [1, height, width, 3] of target_size.
    Raises: RequestError 400 for whatever is wrong with the bytes.   Source: transformers' load_image and
    Qwen2VLImageProcessorPil: exif_transpose, convert("RGB"), Pillow's bicubic.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise _too_large(max_pixels)
            if size not in (image.size, image.size[::-1]):
                raise _mismatch(image.size, size)
            ImageOps.exif_transpose(image, in_place=True)
            if image.size != size:
                raise _mismatch(image.size, size)
            rgb = image.convert("RGB")
        resized = rgb.resize(target_size, Image.Resampling.BICUBIC)
        return np.asarray(resized)[np.newaxis]
    except RequestError:
        raise
    except MemoryError:
        raise RequestError(
            "not enough memory to decode the image", status=503, code="media_out_of_memory", retry_after_s=1
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(max_pixels) from None
    except UnidentifiedImageError:
        raise RequestError("the image's bytes are not of a format that can be decoded", code="invalid_image") from None
    except Exception:  # a decoder may raise anything; what it says may quote the bytes
        raise RequestError("the image is broken: it cannot be decoded", code="invalid_image") from None


def _too_large(max_pixels: int) -> RequestError:
    return RequestError(f"the image has more than {max_pixels} pixels", code="image_too_large")


def _mismatch(found: tuple[int, int], promised: tuple[int, int]) -> RequestError:
    return RequestError(
        f"the image decodes to {found[0]}x{found[1]}, its header said {promised[0]}x{promised[1]}",
        code="image_mismatch",
    )
