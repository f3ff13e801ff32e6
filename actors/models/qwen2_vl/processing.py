"""Sizes, grids and token counts of images, without decoding or torch."""

import math

from vlmrt.actors.models.config import ImageProcessing

MAX_ASPECT_RATIO = 200


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width as multiples of factor, with an area in [min_pixels, max_pixels] and nearly the same aspect.

    Raises: ValueError if a side is not positive or the aspect ratio is above 200.
    """
    if height < 1 or width < 1:
        raise ValueError(f"image size {width}x{height}: both sides must be at least 1 pixel")
    aspect_ratio = max(height, width) / min(height, width)
    if aspect_ratio > MAX_ASPECT_RATIO:
        raise ValueError(f"image size {width}x{height}: aspect ratio {aspect_ratio:.6g} is above {MAX_ASPECT_RATIO}")
    resized_height = round(height / factor) * factor
    resized_width = round(width / factor) * factor
    if resized_height * resized_width > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        resized_height = max(factor, math.floor(height / shrink / factor) * factor)
        resized_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif resized_height * resized_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        resized_height = math.ceil(height * grow / factor) * factor
        resized_width = math.ceil(width * grow / factor) * factor
    return resized_height, resized_width


def resized_size(width: int, height: int, processing: ImageProcessing) -> tuple[int, int]:
    """(width, height) in pixels that an image is resized to before it is cut into patches."""
    factor = processing.patch_size * processing.merge_size
    resized_height, resized_width = smart_resize(height, width, factor, processing.min_pixels, processing.max_pixels)
    return resized_width, resized_height


def image_grid_thw(width: int, height: int, processing: ImageProcessing) -> tuple[int, int, int]:
    """Patches along time, height and width of a still image of the given size in pixels."""
    resized_width, resized_height = resized_size(width, height, processing)
    return 1, resized_height // processing.patch_size, resized_width // processing.patch_size


def num_image_tokens(grid_thw: tuple[int, int, int], merge_size: int) -> int:
    """Placeholder tokens, which is also the number of rows from the vision tower."""
    frames, height, width = grid_thw
    return frames * height * width // merge_size**2
