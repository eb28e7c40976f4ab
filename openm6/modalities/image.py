"""Images: continuous patches in, codes of an autoencoder out, drawn masked-parallel."""

# Letters: N tokens, H and W tokens down and across, P side of a patch in pixels, G codes per position

from __future__ import annotations

import io
import math
import warnings
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch
from PIL import ImageOps, UnidentifiedImageError
from torch import Tensor, nn

from openm6.codecs.image import ImageCodec
from openm6.core.errors import DataError
from openm6.core.seeds import content_key
from openm6.modalities.codes import (
    ArrayCache,
    CodesAdapter,
    FourierPositionEmbedding,
    image_positions,
    inpainting_masks,
    masked_arrays,
    random_rectangle,
    sample_mask,
)
from openm6.modalities.interface import NO_OPTIONS, OWN_ORIGIN, Adapter, Modality, Options, Segment, rectangle

PATCH = 8
MAX_PIXELS = 32_000_000
OVERSAMPLING = 4  # pixels decoded for each that is kept: fewer would show after resizing


def read_image(raw: Any, max_pixels: int = MAX_PIXELS, target_pixels: int | None = None) -> PIL.Image.Image:
    """An RGB image (transparency over white) from file bytes, a Pillow image, or an array H W 3 of bytes.

    Where it is to be resized to `target_pixels`, the file of a large JPEG is decoded at 1/2, 1/4 or 1/8 of its sides.

    Raises:
        DataError: not an image, broken, or more than `max_pixels`; the size is read from the header, before
            anything is unpacked, so a decompression bomb costs nothing.
    """
    if isinstance(raw, np.ndarray):
        return PIL.Image.fromarray(raw.astype(np.uint8)).convert("RGB")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            image = raw if isinstance(raw, PIL.Image.Image) else PIL.Image.open(io.BytesIO(raw))
        if image.width * image.height > max_pixels:
            raise DataError(
                f"the image has {image.width} x {image.height} pixels, "
                f"over the bound of {max_pixels:,}: shrink it"
            )
        if target_pixels is not None and not isinstance(raw, PIL.Image.Image):
            image = _decoded_small(image, OVERSAMPLING * target_pixels)
        return _in_colour(ImageOps.exif_transpose(image))  # as the camera was held
    except DataError:
        raise
    except PIL.Image.DecompressionBombError:
        raise DataError(f"the image is over the bound of {max_pixels:,} pixels: shrink it") from None
    except UnidentifiedImageError:  # its own words name an object in memory
        raise DataError("the image is broken or of an unknown format: save it again as PNG or JPEG") from None
    except (OSError, ValueError, SyntaxError, TypeError) as error:
        raise DataError(
            f"the image is broken or of an unknown format ({error}): save it again as PNG or JPEG"
        ) from None


def _decoded_small(image: PIL.Image.Image, least: int) -> PIL.Image.Image:
    """A JPEG that is not yet decoded with fewer pixels, but no fewer than `least`; any other image as it is."""
    share = (least / (image.width * image.height)) ** 0.5
    if share >= 1:
        return image
    drafted = image.draft(None, (math.ceil(image.width * share), math.ceil(image.height * share)))
    if drafted is None or drafted[1] == (0, 0, *image.size):
        return image
    # A side that 8 does not divide ends within the last pixel.
    return image.resize(image.size, PIL.Image.Resampling.BICUBIC, box=drafted[1])


def _in_colour(image: PIL.Image.Image) -> PIL.Image.Image:
    """RGB of any mode, transparency over white."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would cut off at 255
        levels = np.asarray(image, np.float32) / 257
        image = PIL.Image.fromarray(levels.clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layers = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", layers.size, "white"), layers)
    return image.convert("RGB")


def to_square(image: PIL.Image.Image, side: int) -> PIL.Image.Image:
    """The image within a white square of `side` pixels, its aspect kept."""
    if image.size == (side, side):
        return image
    share = side / max(image.size)
    size = (max(1, round(image.width * share)), max(1, round(image.height * share)))
    square = PIL.Image.new("RGB", (side, side), "white")
    square.paste(
        image.resize(size, PIL.Image.Resampling.BICUBIC), ((side - size[0]) // 2, (side - size[1]) // 2)
    )
    return square


def pixels(image: PIL.Image.Image) -> np.ndarray:
    """Values in [-1, 1].  # H W 3"""
    return np.asarray(image, dtype=np.float32) / 127.5 - 1


class Image(Modality):
    """An image as patches in, at its own aspect up to a budget of tokens, and a square of `side` pixels out."""

    name: ClassVar[str] = "image"

    def __init__(
        self, codec: ImageCodec, side: int = 64, max_patches: int = 64, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.codec = codec
        self.side = side
        self.grid_side = side // codec.quantizer_config.stride  # across, and down
        self.max_patches = max_patches
        self.max_pixels = max_pixels
        self.code_cache = ArrayCache()

    def source(
        self, raw: Any, rng: np.random.Generator | None = None, options: Options = NO_OPTIONS
    ) -> Segment:
        """Patches of the image; `mask_box` (a share-of-the-side box left, top, right, bottom) masks what it touches."""
        image = self._fit(read_image(raw, self.max_pixels, self.max_patches * PATCH**2))
        values = pixels(image)
        if rng is not None and options.get("mask_box") is None:  # an inpainted region must keep its position
            values = _shifted(values, rng)
        down, across = values.shape[0] // PATCH, values.shape[1] // PATCH
        patches = (
            values.reshape(down, PATCH, across, PATCH, 3).transpose(0, 2, 1, 3, 4).reshape(down * across, -1)
        )
        is_masked = box_mask(options.get("mask_box"), down, across)
        arrays = {
            "patches": np.where(is_masked[:, None], 0, patches).astype(np.float32),
            "is_masked": is_masked,
            "positions": image_positions(down, across),
        }
        grid, span, learn = rectangle(down, across), max(down, across), np.zeros(len(is_masked), bool)
        return Segment("image_in", arrays, grid, span, learn, moves=OWN_ORIGIN)

    def _fit(self, image: PIL.Image.Image) -> PIL.Image.Image:
        """The image resized to whole patches within the budget; small ones keep their size."""
        down, across = image.height / PATCH, image.width / PATCH
        share = min(1.0, (self.max_patches / max(down * across, 1e-9)) ** 0.5)
        rows = min(max(1, round(down * share)), self.max_patches)
        columns = min(max(1, round(across * share)), self.max_patches // rows)
        size = (columns * PATCH, rows * PATCH)
        return image if image.size == size else image.resize(size, PIL.Image.Resampling.BICUBIC)

    def target(
        self, raw: Any, rng: np.random.Generator | None = None, options: Options = NO_OPTIONS
    ) -> Segment:
        """Codes of the image, masked by the training pattern, or, with `mask_box`, in the hole alone.

        `mask_context` masks the codes around the hole as well; without a generator only those in it carry a loss.
        """
        codes = self.encode(raw)
        if options.get("mask_box") is None:
            mask = sample_mask(self.grid_side, self.grid_side, rng)
            return self._masked(codes, mask, mask, rng)
        mask_box = box_mask(_squared(options["mask_box"]), self.grid_side, self.grid_side)
        return self._masked(codes, *inpainting_masks(mask_box, bool(options.get("mask_context")), rng), rng)

    def blank(self) -> Segment:
        """A target of which every position is masked."""
        mask = sample_mask(self.grid_side, self.grid_side, None)
        return self._masked(np.zeros((len(mask), self.codec.groups), np.int64), mask, mask, None)

    def _masked(
        self, codes: np.ndarray, mask: np.ndarray, learn: np.ndarray, rng: np.random.Generator | None
    ) -> Segment:
        positions = image_positions(self.grid_side, self.grid_side)
        arrays, learn = masked_arrays(codes, mask, learn, positions, self.codec.codebook_size, rng)
        grid = rectangle(self.grid_side, self.grid_side)
        return Segment("image_out", arrays, grid, self.grid_side, learn, "block", OWN_ORIGIN)

    def encode(self, raw: Any) -> np.ndarray:
        """Codes of an image squared to `side`; remembered by the bytes of the file.  # N G"""
        key = content_key(raw) if isinstance(raw, bytes) else None
        known = self.code_cache.get(key)
        if known is not None:
            return known
        values = torch.from_numpy(
            pixels(to_square(read_image(raw, self.max_pixels, self.side**2), self.side))
        )
        with torch.no_grad():
            codes = self.codec.encode(values.permute(2, 0, 1)[None])  # 1 3 H W -> 1 h w G
        return self.code_cache.put(key, codes[0].flatten(0, 1).numpy().astype(np.int16))

    def decode(self, codes: Tensor) -> PIL.Image.Image:
        """The image of one grid of codes.  # H*W G"""
        with torch.no_grad():
            values = self.codec.decode(codes.cpu().view(1, self.grid_side, self.grid_side, -1))[0]
        return PIL.Image.fromarray(
            ((values.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        )

    def adapters(self, width: int) -> dict[str, Adapter]:
        position = FourierPositionEmbedding(width)
        out = CodesAdapter(position, width, self.codec.quantizer_config.levels, self.codec.groups)
        return {"image_in": PatchAdapter(position, PATCH * PATCH * 3, width), "image_out": out}

    def examples(self) -> list[Any]:
        rng = np.random.default_rng(0)
        return [
            rng.integers(0, 256, size, dtype=np.uint8) for size in ((64, 64, 3), (32, 32, 3), (20, 50, 3))
        ]


MaskBox = tuple[float, float, float, float] | np.ndarray | None


def box_mask(mask_box: MaskBox, down: int, across: int) -> np.ndarray:
    """Positions touched by a box (fractions of the side: left, top, right, bottom) or a mask (bool).  # H*W bool"""
    if mask_box is None:
        return np.zeros(down * across, bool)
    if isinstance(mask_box, np.ndarray):
        shares = PIL.Image.fromarray(mask_box.astype(np.float32)).resize(
            (across, down), PIL.Image.Resampling.BOX
        )
        return np.asarray(shares).reshape(-1) > 0
    left, top, right, bottom = mask_box
    row, column = np.divmod(np.arange(down * across), across)
    beside = (column + 1 <= left * across + 1e-6) | (column >= right * across - 1e-6)
    above = (row + 1 <= top * down + 1e-6) | (row >= bottom * down - 1e-6)
    return ~(beside | above)


def _squared(mask_box: MaskBox) -> MaskBox:
    """A mask as `to_square` lays its image out: nothing is to be filled in beside it.  # H W -> side side"""
    if not isinstance(mask_box, np.ndarray) or mask_box.shape[0] == mask_box.shape[1]:
        return mask_box
    side = max(mask_box.shape)
    square = np.zeros((side, side), bool)
    top, left = ((side - length) // 2 for length in mask_box.shape)
    square[top : top + mask_box.shape[0], left : left + mask_box.shape[1]] = mask_box
    return square


def random_box(rng: np.random.Generator, grid: int = 8) -> tuple[float, float, float, float]:
    """A box on a `grid` × `grid` raster, as shares of the side: left, top, right, bottom."""
    inside = np.flatnonzero(random_rectangle(grid, grid, rng))
    rows, columns = np.divmod(inside, grid)
    return (columns.min() / grid, rows.min() / grid, (columns.max() + 1) / grid, (rows.max() + 1) / grid)


def _shifted(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Training augmentation: moved by up to 1/16 of the side, edges repeated; contrast changed a little."""
    reach = max(1, values.shape[0] // 16)
    down, across = rng.integers(-reach, reach + 1, 2)
    padded = np.pad(values, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    moved = padded[reach + down :, reach + across :][: values.shape[0], : values.shape[1]]
    return moved * np.float32(rng.uniform(0.85, 1.1))


class PatchAdapter(Adapter):
    """Flat patches of raw values to vectors; masked patches become one learned vector."""

    def __init__(self, position: FourierPositionEmbedding, features: int, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(features, width)
        self.outer = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.gone = nn.Parameter(torch.empty(width))
        self.place = position
        nn.init.normal_(self.gone, std=0.02)

    def embed(self, arrays: dict[str, Tensor]) -> Tensor:
        seen = self.norm(
            self.outer(nn.functional.gelu(self.inner(arrays["patches"].to(self.gone.dtype))))
        )  # N F -> N D
        shown = torch.where(arrays["is_masked"][:, None], self.gone.to(seen.dtype), seen)
        return shown + self.place(arrays["positions"])
