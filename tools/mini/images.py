"""Icons in the styles of four libraries, emoji in those of four, drawings of Openclipart, and outlines of countries."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from html import unescape
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from tools.mini.corpus import Part, Row, identity, split_of, split_pairs
from tools.mini.names import Names, emoji_data, english_name, plain_words, single_nouns
from tools.mini.packages import Packages
from tools.mini.raster import SIDE, drawing_image, fit_square, png, svg_image

EXPORT = Path(__file__).with_name("export.mjs")
TEST_PAIRS, VALIDATION_PAIRS = 0.3, 0.05
MIN_STYLES, TEST_THINGS = 4, 0.6  # of icons, and of emoji, of a concept among `things`; instead of TEST_PAIRS
# Marks of companies are left out.
BRANDS = re.compile(r"brand|logo", re.IGNORECASE)
ICON_LIBRARIES = ("iconpark", "tabler", "phosphor", "mdi")
# Set and style -> the words of a caption.
STYLES: dict[str, tuple[str, str]] = {
    "iconpark outline": ("IconPark outline", "IconPark线框"),
    "iconpark filled": ("IconPark filled", "IconPark实心"),
    "iconpark two-tone": ("IconPark two-tone", "IconPark双色"),
    "iconpark multi-color": ("IconPark colour", "IconPark彩色"),
    "tabler outline": ("Tabler outline", "Tabler线框"),
    "tabler filled": ("Tabler filled", "Tabler实心"),
    "phosphor thin": ("Phosphor thin", "Phosphor极细"),
    "phosphor light": ("Phosphor light", "Phosphor细"),
    "phosphor regular": ("Phosphor regular", "Phosphor常规"),
    "phosphor bold": ("Phosphor bold", "Phosphor粗"),
    "phosphor fill": ("Phosphor filled", "Phosphor实心"),
    "phosphor duotone": ("Phosphor two-tone", "Phosphor双色"),
    "mdi filled": ("Material filled", "Material实心"),
    "mdi outline": ("Material outline", "Material线框"),
    "noto": ("Noto emoji", "Noto表情"),
    "twemoji": ("Twemoji", "Twemoji表情"),
    "fluent modern": ("Fluent colour emoji", "Fluent彩色表情"),
    "fluent flat": ("Fluent flat emoji", "Fluent扁平表情"),
    "fluent high-contrast": ("Fluent black emoji", "Fluent黑白表情"),
    "openmoji": ("OpenMoji", "OpenMoji表情"),
}


@dataclass
class Icon:
    """One image of a concept in a style, not rendered yet."""

    package: str
    concept: str
    style: str
    svg: str | Path
    chinese: str | None = None
    tags: list[str] = field(default_factory=list)
    tags_zh: list[str] = field(default_factory=list)


def exported(packages: Packages, keys: Iterable[str], *arguments: str) -> Iterator[Any]:
    """The lines that `export.mjs` prints, with the packages at hand."""
    root = packages.node_modules(keys)
    command = ["node", "--preserve-symlinks", str(EXPORT), arguments[0], str(root), *arguments[1:]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        assert process.stdout is not None
        yield from map(json.loads, process.stdout)
    if process.returncode != 0:
        raise RuntimeError(f"node {' '.join(command[1:])} failed: is node 18 or newer installed?")


def _iconpark(packages: Packages) -> Iterator[Icon]:
    for entry in exported(packages, ["iconpark"], "icons"):
        if not BRANDS.search(entry["category"]):
            chinese, tags = entry["title"] or None, [tag for tag in entry["tag"] if tag]
            name = english_name(entry["name"], numbered=True)
            yield Icon("iconpark", name, f"iconpark {entry['theme']}", entry["svg"], chinese, [], tags)


def _tabler(packages: Packages) -> Iterator[Icon]:
    root = packages.folder("tabler")
    for name, entry in sorted(json.loads((root / "icons.json").read_text(encoding="utf-8")).items()):
        if BRANDS.search(entry["category"] or "") or name.startswith("brand-"):
            continue
        for style in sorted(entry["styles"]):
            file = root / "icons" / style / f"{name}.svg"
            if file.is_file():
                yield Icon("tabler", english_name(name), f"tabler {style}", file, None, list(map(str, entry["tags"])))


def _phosphor(packages: Packages) -> Iterator[Icon]:
    root = packages.folder("phosphor") / "assets"
    for file in sorted(root.glob("*/*.svg")):
        style = file.parent.name
        name = file.stem.removesuffix(f"-{style}")
        if not BRANDS.search(name):
            yield Icon("phosphor", english_name(name), f"phosphor {style}", file)


def _mdi(packages: Packages) -> Iterator[Icon]:
    root = packages.folder("mdi")
    for entry in json.loads((root / "meta.json").read_text(encoding="utf-8")):
        if entry["deprecated"] or any(BRANDS.search(tag) for tag in entry["tags"]):
            continue
        name = entry["name"]
        style = "outline" if name.endswith("-outline") else "filled"
        concept = english_name(name.removesuffix("-outline"))
        aliases = [english_name(alias.removesuffix("-outline")) for alias in entry["aliases"]]
        yield Icon("mdi", concept, f"mdi {style}", root / "svg" / f"{name}.svg", None, aliases)


def icons(packages: Packages) -> Iterator[Row]:
    """Icons whose concept has a Chinese name or is drawn by two libraries; see `more_icons`."""
    return _icon_rows(packages, known=True)


def more_icons(packages: Packages) -> Iterator[Row]:
    """Icons of all other concepts: they have one set and an English name."""
    return _icon_rows(packages, known=False)


def things(packages: Packages) -> Iterator[Row]:
    """Icons and emoji of the concepts that both have in several styles: few enough to be learned in an hour."""
    names = Names(packages)
    icons, chinese, _ = _all_icons(packages)
    emoji = {(icon.concept.lower(), icon.style): icon for icon in _emoji(packages)}
    drawn = [Counter(concept for concept, _ in found) for found in (icons, emoji)]
    concepts = {name for name, count in drawn[0].items() if min(count, drawn[1][name]) >= MIN_STYLES}
    found = {pair: one[0] for pair, one in icons.items()} | emoji
    pairs = sorted(pair for pair in found if pair[0] in concepts)
    split = split_pairs(pairs, TEST_THINGS, VALIDATION_PAIRS)
    translated = {icon.concept.lower(): icon.chinese for icon in emoji.values()}
    for pair in pairs:
        icon = replace(found[pair], concept=pair[0])
        yield _row(icon, translated[pair[0]] or chinese.get(pair[0]) or names.chinese(pair[0]), split[pair])


def _all_icons(packages: Packages) -> tuple[dict[tuple[str, str], list[Icon]], dict[str, str], dict[str, set[str]]]:
    """Icons by concept and style, the Chinese names of concepts, and the libraries that draw them."""
    readers = {"iconpark": _iconpark, "tabler": _tabler, "phosphor": _phosphor, "mdi": _mdi}
    found: dict[tuple[str, str], list[Icon]] = defaultdict(list)
    chinese: dict[str, str] = {}
    libraries: dict[str, set[str]] = defaultdict(set)
    for key in ICON_LIBRARIES:
        for icon in readers[key](packages):
            found[icon.concept, icon.style].append(icon)
            libraries[icon.concept].add(icon.package)
            if icon.chinese:
                chinese.setdefault(icon.concept, icon.chinese)
    return found, chinese, libraries


def _icon_rows(packages: Packages, known: bool) -> Iterator[Row]:
    names = Names(packages)
    found, chinese, libraries = _all_icons(packages)
    split = split_pairs(found, TEST_PAIRS, VALIDATION_PAIRS)
    for (concept, style), drawn in sorted(found.items()):
        translated = chinese.get(concept) or names.chinese(concept)
        if (translated is not None or len(libraries[concept]) > 1) == known:
            # A set may draw a concept several times: as `apple` and `apple-one`.
            for number, icon in enumerate(drawn):
                row = _row(icon, translated, split[concept, style])
                yield row | {"id": f"{row['id']}/{number}"}


def _row(icon: Icon, chinese: str | None, split: str) -> Row:
    english_style, chinese_style = STYLES[icon.style]
    label = icon.concept
    kind = "" if "moji" in english_style.lower() else " icon"
    return {
        "id": f"{icon.style}/{label}",
        **identity(icon.package),
        "split": split,
        "image": png(_rendered(icon.svg)),
        "label": label,
        "label_zh": chinese,
        "text_en": f"{label}, {english_style}{kind}",
        "text_zh": f"{chinese}，{chinese_style}{'图标' if kind else ''}" if chinese else None,
        "tags_en": [tag for tag in icon.tags if tag != label] or None,
        "tags_zh": [tag for tag in icon.tags_zh if tag != chinese] or None,
        "extra": {"style_en": english_style, "style_zh": chinese_style},
    }


def _rendered(svg: str | Path) -> Image.Image:
    """An SVG text or file, or a PNG file, as an image."""
    if isinstance(svg, str):
        return svg_image(svg)
    if svg.suffix == ".svg":
        return svg_image(svg.read_text(encoding="utf-8"))
    with Image.open(svg) as image:
        return fit_square(image.convert("RGBA"), margin=1)


def emoji(packages: Packages) -> Iterator[Row]:
    """Emoji in the styles of Noto, Twemoji and Fluent, without skin tones; names and keywords in both languages."""
    found = {(icon.concept, icon.style): icon for icon in _emoji(packages)}
    split = split_pairs(found, TEST_PAIRS, VALIDATION_PAIRS)
    for pair, icon in found.items():
        yield _row(icon, icon.chinese, split[pair])


def openmoji(packages: Packages) -> Iterator[Row]:
    """The same emoji in a style that is never trained, as test records."""
    root = packages.folder("openmoji") / "color" / "svg"
    for entry, chinese in _named_emoji(packages):
        code = entry["hexcode"]
        files = [root / f"{name}.svg" for name in (code, code.replace("-FE0F", ""))]
        file = next((file for file in files if file.is_file()), None)
        if file is not None:
            icon = Icon("openmoji", entry["label"], "openmoji", file, chinese["label"], entry.get("tags") or [],
                        chinese.get("tags") or [])  # fmt: skip
            yield _row(icon, icon.chinese, "test")


def _named_emoji(packages: Packages) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    english, chinese = emoji_data(packages)
    by_code = {entry["hexcode"]: entry for entry in chinese}
    labels = Counter(entry["label"] for entry in english)
    for entry in english:
        if "group" in entry and entry["hexcode"] in by_code and labels[entry["label"]] == 1:
            yield entry, by_code[entry["hexcode"]]


def _emoji(packages: Packages) -> Iterator[Icon]:
    sheets = {key: packages.folder(key) for key in ("noto", "twemoji")}
    files = {}
    for key, inner in (("noto", "google"), ("twemoji", "twitter")):
        for entry in json.loads((sheets[key] / "emoji.json").read_text(encoding="utf-8")):
            file = sheets[key] / "img" / inner / "64" / entry["image"]
            if file.is_file():
                files[key, _bare(entry["unified"])] = file
    fluent = packages.folder("fluent") / "icons"
    for entry, chinese in _named_emoji(packages):
        tags, tags_zh = entry.get("tags") or [], chinese.get("tags") or []
        slug = "-".join(plain_words(entry["label"]))
        images = {key: files.get((key, _bare(entry["hexcode"]))) for key in ("noto", "twemoji")}
        for style in ("modern", "flat", "high-contrast"):
            named = [fluent / style / f"{name}.svg" for name in (slug, f"{slug}-default")]
            images[f"fluent {style}"] = next((file for file in named if file.is_file()), None)
        for style, file in images.items():
            if file is not None:
                package = style.split()[0]
                yield Icon(package, entry["label"], style, file, chinese["label"], tags, tags_zh)


def _bare(code: str) -> str:
    return code.upper().replace("-FE0F", "")


# Folders of Openclipart that hold no drawings of things.
NO_DRAWINGS = re.compile(
    r"/(special|shapes|logos|signs_and_symbols/flags|cards|icons|icon|themes?|buttons?|gradients|patterns"
    r"|[a-z]*-?theme|duplicates|decorations|gerald_g_[a-z_]*buttons?)(/|$)|flag|star_polygon"
)
LONGEST_SVG = 100_000
TITLE = re.compile(r"<dc:title>([^<]+)</dc:title>")
KEYWORD = re.compile(r"<rdf:li>([^<]+)</rdf:li>")
# Ends of titles that number the drawing or name its author or its colours.
TITLE_END = re.compile(r"(\s*[-_(#.,]?\s*(\d+|b ?& ?w|bw|01|remix|version|v)\)?)+$", re.IGNORECASE)
LICENSED = re.compile(r"GPL|by-sa", re.IGNORECASE)
# Titles that name no thing, and the author whose titles are Italian.
NO_TITLE = re.compile(
    r"clip ?art|icon|etiquette|submission|connector|untitled|unsorted|test\b|svg|tux|logo|\bled\b|aiga|map symbol"
    r"|rpg map|obligatoire|sortie|pimp|silhouet|gallows|bullet|atomic|dead|\bkill|naked|nude|sexy|nazi|swastika"
    r"|hitler|drunk|suicid"
)
ITALIAN = re.compile(r"rollandin", re.IGNORECASE)
TECHNIQUE = re.compile(r" (drawn with straight lines|b and w|black and white|silhouette|contour)\b.*")


def clipart(packages: Packages) -> Iterator[Row]:
    """Drawings of Openclipart with their titles; all drawings of a title are in one split."""
    root = packages.folder("openclipart") / "usr" / "share" / "openclipart" / "svg"
    names, nouns = Names(packages), single_nouns(packages)
    seen = set()
    for file in sorted(root.rglob("*.svg")):
        folder = f"/{file.parent.relative_to(root)}"
        if file.stat().st_size > LONGEST_SVG or NO_DRAWINGS.search(f"{folder}/{file.stem}".lower()):
            continue
        svg = file.read_text(encoding="utf-8", errors="replace")
        title = _title(svg)
        metadata = svg[: svg.find("</metadata>")]
        if title is None or LICENSED.search(metadata) or ITALIAN.search(metadata) or not nouns & set(title.split()):
            continue
        image = drawing_image(svg)
        if image is None or _is_plain(image) or image.tobytes() in seen:
            continue
        seen.add(image.tobytes())
        words = sorted({plain.lower() for word in KEYWORD.findall(svg) if (plain := unescape(word).strip())})
        topic = folder.strip("/").split("/")[0].replace("_", " ")
        chinese = names.chinese(title)
        yield {
            "id": f"openclipart/{file.relative_to(root).with_suffix('')}",
            **identity("openclipart"),
            "split": split_of("openclipart", title),
            "image": png(image),
            "label": title,
            "label_zh": chinese,
            "text_en": f"{title}, clip art",
            "text_zh": f"{chinese}，剪贴画" if chinese else None,
            "tags_en": [word for word in words if word not in (title, "hash") and len(word) < 30][:8] or None,
            "categories": {"topic": topic},
        }


def _title(svg: str) -> str | None:
    found = TITLE.search(svg)
    words = plain_words(TITLE_END.sub("", unescape(found.group(1)).strip()).replace("_", " ")) if found else []
    words = [word for word in words if not word.isdigit()]
    title = TECHNIQUE.sub("", " ".join(words[1:] if words[:1] in (["a"], ["an"], ["the"], ["another"]) else words))
    return title if 3 <= len(title) <= 40 and re.search("[a-z]{3}", title) and not NO_TITLE.search(title) else None


def _is_plain(image: Image.Image) -> bool:
    """Whether nearly nothing or one colour alone can be seen."""
    counts = sorted((count for count, _ in image.getcolors(SIDE * SIDE) or []), reverse=True)
    return counts[0] > 0.97 * SIDE * SIDE


# Fill and border of an outline, and the words for them.
OUTLINE_STYLES: dict[str, tuple[tuple[int, int, int], tuple[int, int, int] | None, str]] = {
    "black": ((30, 30, 30), None, "黑色"),
    "outline": ((255, 255, 255), (30, 30, 30), "线条"),
    "green": ((64, 160, 96), (24, 88, 48), "绿色"),
    "blue": ((72, 128, 208), (24, 56, 120), "蓝色"),
    "red": ((208, 72, 64), (120, 24, 24), "红色"),
    "yellow": ((240, 196, 64), (144, 104, 16), "黄色"),
}
OVERSAMPLE = 4
# Of the area of the largest ring: what lies near it is kept from the one on, what lies far from the other on.
SMALLEST_ISLAND, LARGE_ISLAND = 0.004, 0.25
NEAR = 0.15  # of the larger side, and a degree
ANTARCTICA = ("Antarctica", "南极洲")  # a map of degrees tears it up
MIN_COVERED = 0.1  # of the rectangle around the country: groups of specks have no outline
MIN_POINTS = 40  # of the borders of a country that has a shape of its own


def outlines(packages: Packages) -> Iterator[Row]:
    """Outlines of countries in six styles; of a third of them, one style is tested."""
    data = json.loads((packages.folder("world-atlas") / "countries-50m.json").read_text(encoding="utf-8"))
    names = Names(packages)
    shapes = {}
    for country in data["objects"]["countries"]["geometries"]:
        name = names.territory(country["properties"]["name"])
        rings = _main_rings(_rings(country, data))
        if name is None or name == ANTARCTICA or sum(map(len, rings)) < MIN_POINTS:
            continue
        if _covered(rings) >= MIN_COVERED:
            shapes[name] = rings
    split = split_pairs(((name[0], style) for name in shapes for style in OUTLINE_STYLES), TEST_PAIRS, VALIDATION_PAIRS)
    for (english, chinese), rings in sorted(shapes.items()):
        for style, (_, _, chinese_style) in OUTLINE_STYLES.items():
            words = "line drawing" if style == "outline" else f"{style} map"
            yield {
                "id": f"outline/{english}/{style}",
                **identity("world-atlas"),
                "split": split[english, style],
                "image": png(_drawn_outline(rings, style)),
                "label": english,
                "label_zh": chinese,
                "text_en": f"the outline of {english}, {words}",
                "text_zh": f"{chinese}的轮廓，{chinese_style}",
                "extra": {"style_en": words, "style_zh": chinese_style},
            }


Ring = list[tuple[float, float]]


def _rings(country: dict[str, Any], data: dict[str, Any]) -> list[Ring]:
    """The outer rings of a country, in degrees: TopoJSON stores arcs as differences of whole numbers."""
    scale, shift = data["transform"]["scale"], data["transform"]["translate"]

    def points(index: int) -> Ring:
        x = y = 0
        found = []
        for dx, dy in data["arcs"][index if index >= 0 else ~index]:
            x, y = x + dx, y + dy
            found.append((x * scale[0] + shift[0], y * scale[1] + shift[1]))
        return found if index >= 0 else found[::-1]

    polygons = country.get("arcs", [])
    polygons = [polygons] if country["type"] == "Polygon" else polygons
    rings = []
    for polygon in polygons:
        ring: Ring = []
        for index in polygon[0]:
            ring += points(index)[1 if ring else 0 :]
        rings.append(ring)
    longitudes = [x for ring in rings for x, _ in ring]
    if longitudes and max(longitudes) > 170 and min(longitudes) < -170:
        # The country lies on both sides of the date line.
        rings = [[(x + 360 if x < 0 else x, y) for x, y in ring] for ring in rings]
    return rings


def _area(ring: Ring) -> float:
    pairs = zip(ring, ring[1:] + ring[:1], strict=True)
    twice = sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in pairs)
    return abs(twice) / 2 * math.cos(math.radians(sum(y for _, y in ring) / len(ring)))


def _covered(rings: list[Ring]) -> float:
    """The fraction of the rectangle around the rings that they cover."""
    xs, ys = [x for ring in rings for x, _ in ring], [y for ring in rings for _, y in ring]
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    return sum(map(_area, rings)) / _area([(left, low), (right, low), (right, high), (left, high)])


def _main_rings(rings: list[Ring]) -> list[Ring]:
    """The largest ring and what lies near it: colonies over the sea would make the country small."""
    if not rings:
        return []
    main = max(rings, key=_area)
    xs, ys = [x for x, _ in main], [y for _, y in main]
    reach = NEAR * max(max(xs) - min(xs), max(ys) - min(ys)) + 1
    kept = []
    for ring in rings:
        x, y = sum(x for x, _ in ring) / len(ring), sum(y for _, y in ring) / len(ring)
        near = min(xs) - reach < x < max(xs) + reach and min(ys) - reach < y < max(ys) + reach
        if _area(ring) >= (SMALLEST_ISLAND if near else LARGE_ISLAND) * _area(main):
            kept.append(ring)
    return kept


def _drawn_outline(rings: list[Ring], style: str) -> Image.Image:
    fill, border, _ = OUTLINE_STYLES[style]
    middle = sum(y for ring in rings for _, y in ring) / sum(map(len, rings))
    width = math.cos(math.radians(middle))
    flat = [[(x * width, -y) for x, y in ring] for ring in rings]
    xs, ys = [x for ring in flat for x, _ in ring], [y for ring in flat for _, y in ring]
    size = SIDE * OVERSAMPLE
    scale = (size - 6 * OVERSAMPLE) / max(max(xs) - min(xs), max(ys) - min(ys), 1e-6)
    left, top = (size - scale * (max(xs) + min(xs))) / 2, (size - scale * (max(ys) + min(ys))) / 2
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    for ring in flat:
        points = [(x * scale + left, y * scale + top) for x, y in ring]
        draw.polygon(points, fill=fill)
        if border is not None:
            draw.line([*points, points[0]], fill=border, width=OVERSAMPLE + 2, joint="curve")
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


ICON_PACKAGES = (*ICON_LIBRARIES, "emojibase", "cldr")
PARTS = {
    "icons": Part(icons, ICON_PACKAGES),
    "more_icons": Part(more_icons, ICON_PACKAGES),
    "things": Part(things, (*ICON_PACKAGES, "noto", "twemoji", "fluent")),
    "emoji": Part(emoji, ("noto", "twemoji", "fluent", "emojibase")),
    "openmoji": Part(openmoji, ("openmoji", "emojibase"), trains=False),
    "clipart": Part(clipart, ("openclipart", "wordnet", "emojibase", "cldr")),
    "outlines": Part(outlines, ("world-atlas", "cldr")),
}
