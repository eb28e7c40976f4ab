"""Masks of edited pictures: from transparency to what is filled in, and the kept pixels put back."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image as Pillow
from PIL import ImageOps

from openm6.modalities.image import Image, read_image, to_square
from openm6.serve.errors import BadRequestError

FULLY_OPAQUE = 255


def hole_of_mask(mask: bytes | None, given: bytes, pixels: int) -> np.ndarray | None:
    """Where a picture may change: the transparent pixels of the mask (or of the picture itself).  # H W bool

    None where nothing says: all of it may change.

    Raises:
        BadRequestError: the mask has no transparency, or is of another size than the picture.
        DataError: one of them is broken.
    """
    size = read_image(given, pixels).size
    if mask is None:
        own = _transparent(given)
        return own if own is not None and own.any() else None
    covered = read_image(mask, pixels).size
    if covered != size:
        raise BadRequestError(f"mask is {covered}, but image is {size}: make them equal in size", "mask")
    hole = _transparent(mask)
    if hole is None or not hole.any():
        raise BadRequestError("mask is transparent nowhere: make transparent what may change", "mask")
    return hole


def _transparent(data: bytes) -> np.ndarray | None:
    """Pixels of a picture, known to be sound, that let something shine through."""
    with Pillow.open(io.BytesIO(data)) as opened:
        picture = ImageOps.exif_transpose(opened)
    if picture.mode not in ("RGBA", "LA", "PA") and "transparency" not in picture.info:
        return None
    return np.asarray(picture.convert("RGBA").getchannel("A")) < FULLY_OPAQUE


def kept_outside(drawn: Pillow.Image, given: bytes, hole: np.ndarray, image: Image) -> Pillow.Image:
    """The drawn picture within the hole, the given one, squared like it, everywhere else."""
    kept = to_square(read_image(given, image.max_pixels), image.side)
    outside = Pillow.fromarray(np.where(hole, 0, 255).astype(np.uint8)).convert("RGB")
    keep = to_square(outside, image.side).convert("L")
    return Pillow.composite(kept, drawn, keep.point(lambda value: 255 if value == 255 else 0))
