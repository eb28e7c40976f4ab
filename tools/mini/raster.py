"""SVG and PNG files as images of 64 × 64 pixels on white."""

from __future__ import annotations

import io

from PIL import Image

SIDE = 64
MARGIN = 2
# Drawings are rendered this large, cut to what is drawn and made smaller.
DRAWN_SIDE = 320


def svg_image(svg: str, side: int = SIDE) -> Image.Image:
    """A square SVG at `side` pixels, antialiased, on white."""
    return on_white(_render(svg, side))


def drawing_image(svg: str) -> Image.Image | None:
    """An SVG of any page, cut to what is drawn; None if that is nothing or cannot be rendered."""
    try:
        image = _render(svg, DRAWN_SIDE)
    except ValueError:
        return None
    box = image.getchannel("A").point(lambda value: 255 if value > 8 else 0).getbbox()
    return None if box is None else fit_square(image.crop(box))


def fit_square(image: Image.Image, side: int = SIDE, margin: int = MARGIN) -> Image.Image:
    """An image as large as fits into a white square, in its middle."""
    scale = (side - 2 * margin) / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # Weights by alpha: the colour of what is transparent must not show at the borders.
    small = image.convert("RGBa").resize(size, Image.Resampling.BOX if scale < 0.5 else Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (side, side), (255, 255, 255, 0))
    square.paste(small.convert("RGBA"), ((side - size[0]) // 2, (side - size[1]) // 2))
    return on_white(square)


def on_white(image: Image.Image) -> Image.Image:
    """The image over white, in RGB."""
    background = Image.new("RGBA", image.size, "white")
    background.alpha_composite(image.convert("RGBA"))
    return background.convert("RGB")


def png(image: Image.Image) -> bytes:
    """The bytes of a PNG, with a palette if the image has at most 256 colours."""
    file = io.BytesIO()
    if image.mode == "RGB" and image.getcolors(256) is not None:
        image = image.quantize(256, method=Image.Quantize.FASTOCTREE) if _octree_is_exact(image) else image
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def _octree_is_exact(image: Image.Image) -> bool:
    return image.quantize(256, method=Image.Quantize.FASTOCTREE).convert("RGB").tobytes() == image.tobytes()


def _render(svg: str, side: int) -> Image.Image:
    # Installed by the builder into its cache; the rest of the file works without it.
    import resvg_py  # noqa: PLC0415

    # Without a resolution, sizes in points count as none.
    data = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, dpi=96, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(data))).convert("RGBA")
