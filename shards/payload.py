"""From one source file to the members of one sample: bytes kept as they are wherever they can be."""

import io
import json
from typing import Any

import cv2
import numpy as np
from PIL import Image

from shards.decode import decode_rgb, file_extension, image_size
from shards.sources.base import Item, Source

Members = dict[str, bytes]


def make_members(source: Source, item: Item, *, max_side: int | None, quality: int, decode: bool) -> Members:
    """Members of one sample: the image first, then its JSON.

    JPEG and PNG files pass through untouched; other formats become PNG. With `max_side`, images that are larger are
    scaled down and re-encoded as JPEG; fixations are scaled with them.

    Raises:
        ValueError, OSError: the image cannot be used; the message says why.
    """
    data = source.read(item)
    if not data:
        raise ValueError("zero bytes")
    height, width = image_size(data)
    fixations = source.fixations(item)
    extension = file_extension(data)
    new_size = _reduced(height, width, max_side)
    if new_size is not None:
        # libjpeg's eighths are rounded up to whole pixels: of other sides the last pixel would reach past the image,
        # and the resize would shift what lies before it.
        least = new_size if height % 8 == 0 and width % 8 == 0 else None
        pixels = cv2.resize(decode_rgb(data, min_size=least), new_size[::-1], interpolation=cv2.INTER_AREA)
        data, extension = _encode_jpeg(pixels, quality), "jpg"
        if fixations is not None:
            scale = np.array([new_size[1] / width, new_size[0] / height])
            # The centre of a pixel moves to the pixel that now holds it.
            fixations = [
                np.floor((np.array(one).reshape(-1, 2) + 0.5) * scale).astype(int).tolist() for one in fixations
            ]
        height, width = new_size
    elif extension is None:
        pixels = decode_rgb(data)
        data, extension, (height, width) = _encode_png(pixels), "png", pixels.shape[:2]
    elif decode:
        decode_rgb(data)
    info = {"width": width, "height": height, "name": item.name.encode("utf-8", "backslashreplace").decode()}
    extra = {} if fixations is None else {"fixations": fixations}
    return {extension: data, "json": json.dumps(info | extra, separators=(",", ":")).encode()}


def gaze_of(source: Source, *, max_side: int | None) -> dict[str, Any] | None:
    """The manifest's entry on gaze, with sigma in pixels of the images as they are stored.

    Gaze sets show all images at one size, so the first readable one tells the scale.
    """
    if source.gaze is None or max_side is None:
        return source.gaze
    for item in source.items():
        try:
            height, width = image_size(source.read(item))
        except (ValueError, OSError):
            continue
        new_size = _reduced(height, width, max_side) or (height, width)
        return source.gaze | {"sigma": source.gaze["sigma"] * new_size[1] / width}
    return source.gaze


def _reduced(height: int, width: int, max_side: int | None) -> tuple[int, int] | None:
    """Size after scaling the longer side down to `max_side`; None when the image is small enough."""
    if max_side is None or max(height, width) <= max_side:
        return None
    scale = max_side / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _encode_jpeg(pixels: np.ndarray, quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _encode_png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
