"""Images: continuous patches in, codes of an autoencoder out, decoded masked-parallel."""

# Letters: N tokens, H and W tokens down and across, P side of a patch in pixels, G codes per position

import functools
import io
import math
import struct
import warnings
from functools import partial
from typing import Any, ClassVar, Literal, Self

import numpy as np
import PIL.Image
import torch
from PIL import UnidentifiedImageError
from PIL.Image import Transpose
from pydantic import Field, model_validator
from torch import Tensor, nn

from openm6.codecs.base import Codec
from openm6.codecs.external import Encoder, EncoderName
from openm6.codecs.pixel_encoder import PixelEncoder
from openm6.core.config import Config
from openm6.core.errors import ConfigError, DataError
from openm6.core.lru_cache import LRUCache
from openm6.modalities.codes import CACHE_BYTES, FEATURE_BYTES, CodesModality, TokenGrid, key_of, random_rectangle
from openm6.modalities.image_stem import ConvStem, kept_elements
from openm6.modalities.interface import NO_OPTIONS, Options, Rng, Segment

MaskBox = tuple[float, float, float, float] | np.ndarray | None
SIDE_UNITS = 32  # units of rotary positions along each side of an image
MAX_PIXELS = 32_000_000
LONGEST_MASK = 2048  # pixels of a side
MAX_SCANS = 100  # of a JPEG
# What Pillow's readers of its many formats raise for a broken file.
BROKEN = (
    OSError, ValueError, SyntaxError, TypeError, RuntimeError, LookupError, EOFError, AttributeError, struct.error,
)  # fmt: skip
ORIENTATION = 0x0112  # of EXIF
ROTATIONS = dict(enumerate((
    Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180, Transpose.FLIP_TOP_BOTTOM, Transpose.TRANSPOSE,
    Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90,
), 2))  # fmt: skip
REACH = (0.2, 0.1, 0.15, 0.1, 0.1)  # strong augmentation: logs of scale and aspect, radians, shift across and down
TINTS = (0.92, 1.08)  # and brightness of each colour beside that of all
CONTRASTS = (0.85, 1.1)  # brightness of all colours, in any augmentation
OVERSAMPLING = 4  # pixels decoded for each that is kept: fewer would show after resizing


def read_image(raw: Any, max_pixels: int = MAX_PIXELS, target_pixels: int | None = None) -> PIL.Image.Image:
    """An RGB image (transparency over white) from file bytes, a Pillow image, or an array H W 3 of bytes.

    If it is to be resized to `target_pixels`, the file of a large JPEG is decoded at 1/2, 1/4 or 1/8 of its sides.
    DataError: not an image, broken, or of more than `max_pixels` by its header, before anything is unpacked.
    """
    if isinstance(raw, np.ndarray):
        return PIL.Image.fromarray(raw.astype(np.uint8)).convert("RGB")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            image = raw if isinstance(raw, PIL.Image.Image) else PIL.Image.open(io.BytesIO(raw))
        if image.width * image.height > max_pixels:
            raise DataError(
                f"the image has {image.width} x {image.height} pixels, over the bound of {max_pixels:,}: shrink it"
            )
        # Each scan goes over all pixels, and takes a few bytes of the file.
        is_jpeg = isinstance(raw, bytes) and image.format in ("JPEG", "MPO")
        if is_jpeg and raw.count(b"\xff\xda") > MAX_SCANS:
            raise DataError(f"the image has more than {MAX_SCANS} scans: save it again as PNG or JPEG")
        if target_pixels is not None and not isinstance(raw, PIL.Image.Image):
            image = _decoded_small(image, OVERSAMPLING * target_pixels)
        return in_rgb(upright(image))
    except PIL.Image.DecompressionBombError:
        raise DataError(f"the image is over the bound of {max_pixels:,} pixels: shrink it") from None
    except BROKEN as error:
        # Pillow's own sentence about an unknown format names an object in memory.
        reason = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
        raise DataError(f"the image is broken or of an unknown format{reason}: save it again as PNG or JPEG") from None


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image turned as the camera was held; other entries of its EXIF, which may be broken, are left alone."""
    image.load()  # a TIFF turns itself then, and has no such entry any more
    turn = ROTATIONS.get(image.getexif().get(ORIENTATION, 1))
    if turn is not None:
        image = image.transpose(turn)
        image.info.pop("exif", None)
    return image


def _decoded_small(image: PIL.Image.Image, min_pixels: int) -> PIL.Image.Image:
    """A JPEG that is not yet decoded with fewer pixels, but no fewer than `min_pixels`; any other image as it is."""
    scale = (min_pixels / (image.width * image.height)) ** 0.5
    if scale >= 1:
        return image
    drafted = image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
    if drafted is None or drafted[1] == (0, 0, *image.size):
        return image
    # A side that 8 does not divide ends within the last pixel.
    return image.resize(image.size, PIL.Image.Resampling.BICUBIC, box=drafted[1])


def in_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """RGB of any mode, transparency over white; DataError for fractions, which Pillow would read as black."""
    if image.mode == "F":
        raise DataError("the image holds floating-point numbers: save it with 8 or 16 bits per channel")
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
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    square = PIL.Image.new("RGB", (side, side), "white")
    resized = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
    square.paste(resized, ((side - width) // 2, (side - height) // 2))
    return square


def pixels(image: PIL.Image.Image | np.ndarray) -> np.ndarray:
    """Values in [-1, 1].  # H W 3"""
    return np.asarray(image, dtype=np.float32) / 127.5 - 1


LEVELS = pixels(np.arange(256))  # the value of each level of brightness


def merged(features: np.ndarray, size: int) -> np.ndarray:
    """Squares of size x size tokens as one each, with the features of all; zeros beyond the edges.  # h w F -> H W F"""
    down, across, width = features.shape
    features = np.pad(features, ((0, -down % size), (0, -across % size), (0, 0)))
    parts = features.reshape(-(-down // size), size, -(-across // size), size, width).swapaxes(1, 2)
    return parts.reshape(*parts.shape[:2], -1)


@functools.lru_cache(256)
def image_grid(down: int, across: int) -> TokenGrid:
    """The grid of `down` × `across` tokens, row by row, at one moment: middles, also as fractions of the sides."""
    rows, columns = np.divmod(np.arange(down * across, dtype=np.int32), across)
    middles = [(2 * index + 1) * SIDE_UNITS // (2 * count) for index, count in ((rows, down), (columns, across))]
    positions = np.stack([(rows + 0.5) / down, (columns + 0.5) / across], axis=1).astype(np.float32)
    return TokenGrid(np.stack([np.zeros_like(rows), *middles], axis=1), positions, (down, across))


class ImageConfig(Config):
    """`codec` is a shipped name, a file or a model as transformers:NAME; generated images are squares of `side` pixels.
    `encoder`: a shipped name, a file, or a model as transformers:NAME or openm6:NAME, whose frozen features replace
    patches and their settings; of squares of `spatial_merge_size` tokens a side, all features become one token.

    An image that is read becomes `min_patches` to `max_patches` patches of `patch` x `patch` pixels, enlarged or shrunk
    to that. `stem`: patches are embedded by a linear layer each, or by convolutions over the image. `augmentation` of
    training images: slight shifts, or also other scales, angles and colours. `flips`: half of them are mirrored.
    """

    codec: str = "image-64"
    encoder: EncoderName = None
    spatial_merge_size: int = Field(default=1, ge=1, le=8)
    side: int = Field(default=64, ge=8, le=4096)
    min_patches: int = Field(default=0, ge=0)  # 0: small images keep their size
    max_patches: int = Field(default=64, ge=1)
    max_pixels: int = Field(default=MAX_PIXELS, ge=64)
    patch: Literal[8, 16] = 8
    stem: Literal["linear", "conv"] = "linear"
    augmentation: Literal["slight", "strong"] = "slight"
    flips: bool = False

    @property
    def stem_elements(self) -> int:
        """Elements that the stem keeps of a patch for its backward pass, if they count beside those of the layers."""
        return kept_elements(self.patch) if self.stem == "conv" and self.encoder is None else 0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_patches > self.max_patches:
            raise ValueError(f"min_patches={self.min_patches} is above max_patches={self.max_patches}: lower it")
        if self.spatial_merge_size > 1 and self.encoder is None:
            raise ValueError(
                f"spatial_merge_size={self.spatial_merge_size} is for an encoder: name one, or leave it out"
            )
        return self


class Image(CodesModality):
    """An image as patches in, at its own aspect up to a budget of tokens, and a square of `side` pixels out."""

    name: ClassVar[str] = "image"

    def __init__(self, codec: Codec, config: ImageConfig, encoder: Encoder | None = None) -> None:
        self.codec, self.config, self.max_pixels = codec, config, config.max_pixels
        self.has_encoder = config.encoder is not None
        self.pixel_encoder = encoder if isinstance(encoder, PixelEncoder) else None
        self.encoder = None if isinstance(encoder, PixelEncoder) else encoder  # of images of any size
        if self.pixel_encoder is not None and config.spatial_merge_size > 1:
            raise ConfigError(
                f"spatial_merge_size={config.spatial_merge_size} is for an encoder of more tokens than "
                f"{config.encoder}: leave it out"
            )
        self.patch_size = config.patch**2 * 3 if encoder is None else encoder.width * config.spatial_merge_size**2
        self.side = side = config.side
        self.target_grid = image_grid(side // codec.step, side // codec.step)
        self.code_cache = LRUCache[np.ndarray](CACHE_BYTES)
        self._size_cache = LRUCache[np.ndarray](2**20)
        self._pixel_cache = LRUCache[np.ndarray](CACHE_BYTES if self.encoder is None else FEATURE_BYTES)

    def source(self, raw: Any, rng: Rng = None, options: Options = NO_OPTIONS) -> Segment:
        """Patches of the image; `mask_box` (left, top, right, bottom as fractions of the sides) masks patches."""
        mask_box = options.get("mask_box")
        rng = None if mask_box is not None or options.get("aligned") else rng  # pixels must keep their positions
        if self.encoder is not None:
            return self._encoded(raw, self.encoder, mask_box, rng if self.encoder.augments else None)
        values = self._pixel_cache.get_or_compute(key_of(raw), lambda: self._fit(raw))
        gain = np.ones((), np.float32)
        if rng is not None:
            values, strong = augmented(values, self.config, rng), self.config.augmentation == "strong"
            gain = np.asarray(rng.uniform(*CONTRASTS) * (rng.uniform(*TINTS, 3) if strong else 1), np.float32)
        if self.pixel_encoder is not None:
            return self._summarized(LEVELS.take(values) * gain, self.pixel_encoder, mask_box)
        side = self.config.patch
        down, across = values.shape[0] // side, values.shape[1] // side
        patches = values.reshape(down, side, across, side, 3).transpose(0, 2, 1, 3, 4).reshape(down * across, -1, 3)
        floats = (LEVELS.take(patches) * gain).reshape(len(patches), -1)
        segment = self._source(floats, box_mask(mask_box, down, across), image_grid(down, across))
        if self.config.stem == "conv":
            segment.arrays["shapes"] = np.full((len(patches), 2), (down, across))
        return segment

    def _summarized(self, values: np.ndarray, encoder: PixelEncoder, mask_box: MaskBox) -> Segment:
        """Features of the image, in which a masked region is grey, and of all of it.  # S S 3"""
        across, side = encoder.config.across, len(values)
        is_masked = box_mask(mask_box, across, across)
        hidden = is_masked.reshape(across, across).repeat(side // across, 0).repeat(side // across, 1)
        features = encoder(np.where(hidden[..., None], np.float32(0), values))
        down = len(features)
        is_masked = np.pad(is_masked, (0, (down - across) * across))  # its summaries are of all that is seen
        return self._source(features.reshape(down * across, -1), is_masked, image_grid(down, across))

    def _encoded(self, raw: Any, encoder: Encoder, mask_box: MaskBox, rng: Rng) -> Segment:
        """Features of the image, from which a masked region is hidden; cached without one and without augmentation."""

        def compute() -> np.ndarray:
            image = read_image(raw, self.max_pixels)
            hidden = box_mask(mask_box, 256, 256).reshape(256, 256)
            image.paste("grey", mask=PIL.Image.fromarray(hidden).resize(image.size))
            return encoder(image) if rng is None else encoder(image, rng)

        key = key_of(raw) if mask_box is None and rng is None else None
        features = merged(self._pixel_cache.get_or_compute(key, compute), self.config.spatial_merge_size)
        down, across, _ = features.shape
        patches = features.reshape(down * across, -1)
        return self._source(patches, box_mask(mask_box, down, across), image_grid(down, across))

    def stem(self, hidden_size: int) -> nn.Module:
        return ConvStem(self.config.patch, hidden_size) if self.config.stem_elements else super().stem(hidden_size)

    def _fit(self, raw: Any) -> np.ndarray:
        """An image resized to whole patches within the limits on their number, or to a square.  # H W 3"""
        if self.pixel_encoder is not None:
            side = self.pixel_encoder.config.side
            return np.asarray(to_square(read_image(raw, self.max_pixels, side**2), side))
        image = read_image(raw, self.max_pixels, self.config.max_patches * self.config.patch**2)
        down, across = image.height / self.config.patch, image.width / self.config.patch
        count = max(down * across, 1e-9)
        scale = (min(max(count, self.config.min_patches), self.config.max_patches) / count) ** 0.5
        rows = min(max(1, round(down * scale)), self.config.max_patches)
        columns = min(max(1, round(across * scale)), self.config.max_patches // rows)
        size = (columns * self.config.patch, rows * self.config.patch)
        return np.asarray(image if image.size == size else image.resize(size, PIL.Image.Resampling.BICUBIC))

    def target(self, raw: Any, rng: Rng = None, options: Options = NO_OPTIONS) -> Segment:
        """Codes of the image, masked by the training pattern, or, with `mask_box`, in the box alone."""
        mask_box = options.get("mask_box")
        region = None
        if mask_box is not None:
            size = self._size_cache.get_or_compute(
                key_of(raw), lambda: np.asarray(read_image(raw, self.max_pixels).size)
            )
            region = box_mask(squared(mask_box, *size.tolist()), *self.target_grid.shape)
        return self._target(self.target_grid, (key_of(raw), partial(self._read, raw)), region, options, rng)

    def blank(self) -> Segment:
        return self._target(self.target_grid, None)

    def encode(self, raw: Any) -> np.ndarray:
        """Codes of an image squared to `side`; cached by the bytes of the file.  # N G"""
        return self._encode(key_of(raw), partial(self._read, raw))

    def _read(self, raw: Any) -> np.ndarray:
        """The values of an image squared to `side`.  # 3 H W"""
        square = to_square(read_image(raw, self.max_pixels, self.side**2), self.side)
        return np.moveaxis(pixels(square), 2, 0)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> PIL.Image.Image:
        """The image of one grid of codes.  # H*W G"""
        values = self.codec.decode(codes.cpu().view(1, *self.target_grid.shape, -1))[0]
        levels = ((values.clamp(-1, 1) + 1) * 127.5).round().byte()
        return PIL.Image.fromarray(levels.permute(1, 2, 0).numpy())


def box_mask(mask_box: MaskBox, down: int, across: int) -> np.ndarray:
    """Positions touched by a box (fractions of the side: left, top, right, bottom) or a mask (bool).  # H*W bool"""
    if mask_box is None:
        return np.zeros(down * across, bool)
    if isinstance(mask_box, np.ndarray):
        mask = PIL.Image.fromarray(mask_box.astype(np.float32))
        return np.asarray(mask.resize((across, down), PIL.Image.Resampling.BOX)).reshape(-1) > 0
    left, top, right, bottom = mask_box
    row, column = np.divmod(np.arange(down * across), across)
    beside = (column + 1 <= left * across + 1e-6) | (column >= right * across - 1e-6)
    above = (row + 1 <= top * down + 1e-6) | (row >= bottom * down - 1e-6)
    return ~(beside | above)


def squared(mask_box: MaskBox, width: int, height: int) -> MaskBox:
    """A box or mask of an image of this size, moved as `to_square` moves the image: beside it nothing is generated."""
    if isinstance(mask_box, np.ndarray):  # it may be smaller than the image
        # A square of the long side of a thin image would take far more memory than the image.
        shrunk = min(1.0, LONGEST_MASK / max(mask_box.shape))
        down, across = (max(1, math.ceil(shrunk * length)) for length in mask_box.shape)
        if shrunk < 1:
            mask_box = box_mask(mask_box, down, across).reshape(down, across)
        height, width = down, across
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    if mask_box is None or width == height:
        return mask_box
    if isinstance(mask_box, np.ndarray):
        return np.pad(mask_box, ((top, side - height - top), (left, side - width - left)))
    x, y = ((offset + np.asarray(mask_box[axis::2]) * length) / side
            for axis, (offset, length) in enumerate(((left, width), (top, height))))  # fmt: skip
    return float(x[0]), float(y[0]), float(x[1]), float(y[1])


def random_box(rng: np.random.Generator, grid: int = 8) -> tuple[float, float, float, float]:
    """A box on a `grid` × `grid` raster, as fractions of the side: left, top, right, bottom."""
    inside = np.flatnonzero(random_rectangle(grid, grid, rng))
    rows, columns = np.divmod(inside, grid)
    return (columns.min() / grid, rows.min() / grid, (columns.max() + 1) / grid, (rows.max() + 1) / grid)


def augmented(values: np.ndarray, config: ImageConfig, rng: np.random.Generator, reach: float = 1 / 16) -> np.ndarray:
    """The image of a training example, transformed or moved by up to `reach` of its height, and flipped.  # H W 3"""
    values = _transformed(values, rng) if config.augmentation == "strong" else _moved(values, rng, reach)
    return values[:, ::-1] if config.flips and rng.random() < 0.5 else values


def _moved(values: np.ndarray, rng: np.random.Generator, fraction: float) -> np.ndarray:
    """The image moved by up to a fraction of its height, edges repeated, as augmentation.  # H W 3"""
    reach = max(1, int(values.shape[0] * fraction))
    moves = rng.integers(-reach, reach + 1, 2).tolist()
    for axis, move in enumerate(moves):
        values = values.take(np.arange(move, move + values.shape[axis]), axis, mode="clip")
    return values


def _transformed(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image at another scale, aspect, angle and position, edges repeated, as strong augmentation.  # H W 3"""
    height, width = values.shape[:2]
    margin = 2 * max(height, width) // 5  # as far as the largest of all changes together reaches
    for axis, length in enumerate((height, width)):
        values = values.take(np.arange(-margin, length + margin), axis, mode="clip")
    log_scale, log_aspect, angle, *shift = (rng.uniform(-1, 1, 5) * REACH).tolist()
    cos, sin = math.exp(log_scale) * math.cos(angle), math.exp(log_scale) * math.sin(angle)
    wider, taller = math.exp(log_aspect), math.exp(-log_aspect)
    # A pixel of the result is read there: the middle stays the middle, but for the shift.
    x = width / 2 + margin + shift[0] * width - (cos * width * wider + sin * height) / 2
    y = height / 2 + margin + shift[1] * height - (cos * height * taller - sin * width) / 2
    image = PIL.Image.fromarray(values).transform(
        (width, height), PIL.Image.Transform.AFFINE, (cos * wider, sin, x, -sin, cos * taller, y),
        PIL.Image.Resampling.BILINEAR,
    )  # fmt: skip
    return np.asarray(image)
