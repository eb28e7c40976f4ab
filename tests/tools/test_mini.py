"""The corpus of the shipped model, made of tiny made-up packages: splits, determinism and NOTICE, without a network."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

from openm6.data.source import Split
from openm6.data.sources import open_sources
from openm6.train.recipe import MultimodalRecipe
from openm6.train.run import read_recipe, recipe_path
from tools.mini import avatars, build, corpus, facts, images, names, packages, raster, speech, tables

ROOT = Path(__file__).parents[2]
CODES = {"1F34E": ("apple", "苹果"), "1F410": ("goat", "山羊"), "1F697": ("car", "汽车"), "1F3E0": ("house", "房屋")}


class MadeUp(packages.Packages):
    """Folders of made-up packages in place of those that are fetched."""

    def folder(self, key: str) -> Path:
        folder = self.cache / key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def import_requirements(self) -> None:
        raise AssertionError("the network is not needed")

    def write(self, name: str, content: str) -> None:
        file = self.cache / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")


def draw(svg: str, side: int = raster.SIDE) -> Image.Image:
    """An image that depends on the text alone, in place of a rendered one."""
    shade = int(corpus.fraction_of(svg) * 200)
    return Image.new("RGB", (side, side), (shade, 40, 90))


@pytest.fixture
def made_up(tmp_path, monkeypatch) -> MadeUp:
    monkeypatch.setattr(images, "svg_image", draw)
    made = MadeUp(tmp_path / "packages")
    for side, language in enumerate(("en", "zh")):
        entries = [{"hexcode": code, "label": words[side], "tags": [words[side], "x"], "group": 1}
                   for code, words in CODES.items()]  # fmt: skip
        made.write(f"emojibase/{language}/data.json", json.dumps(entries))
    tabler, mdi = {}, []
    for _, (name, _) in CODES.items():
        styles = {"outline": {}, "filled": {}}
        tabler[name] = {"category": "Things", "tags": ["thing"], "styles": styles}
        mdi.append({"name": name, "aliases": ["an-alias"], "tags": ["Things"], "deprecated": False})
        for style in styles:
            made.write(f"tabler/icons/{style}/{name}.svg", f"<svg>{style} {name}</svg>")
        for style in ("bold", "thin"):
            made.write(f"phosphor/assets/{style}/{name}-{style}.svg", f"<svg>{style} {name}</svg>")
        made.write(f"mdi/svg/{name}.svg", f"<svg>mdi {name}</svg>")
    tabler["brand-acme"] = {"category": "Brand", "tags": [], "styles": {"outline": {}}}
    made.write("tabler/icons/outline/brand-acme.svg", "<svg/>")
    made.write("tabler/icons.json", json.dumps(tabler))
    made.write("mdi/meta.json", json.dumps(mdi))
    monkeypatch.setattr(images, "ICON_LIBRARIES", ("tabler", "phosphor", "mdi"))
    for language, words in (("en", ("France", "Chad")), ("zh", ("法国", "乍得"))):
        coded = zip(("FR", "TD"), words, strict=True)
        listed = "".join(f'<territory type="{code}">{word}</territory>' for code, word in coded)
        made.write(f"cldr/{names.CLDR}/main/{language}.xml", f"<ldml>{listed}</ldml>")
    return made


def test_icons_have_names_in_both_languages_and_no_brands(made_up):
    rows = list(images.icons(made_up))
    assert len(rows) == 5 * len(CODES) and len({row["id"] for row in rows}) == len(rows)
    apple = next(row for row in rows if row["id"] == "tabler outline/apple/0")
    assert apple["label_zh"] == "苹果" and apple["text_en"] == "apple, Tabler outline icon"
    assert apple["text_zh"] == "苹果，Tabler线框图标" and apple["tags_en"] == ["thing"]
    assert not any("acme" in row["label"] for row in [*rows, *images.more_icons(made_up)])


def test_things_are_concepts_of_icons_and_emoji(made_up, monkeypatch):
    emoji = [images.Icon("twemoji", name.title(), style, f"<svg>{style} {name}</svg>", "名")
             for name, styles in (("apple", ("noto", "twemoji")), ("kite", ("noto",)))
             for style in styles]  # fmt: skip
    monkeypatch.setattr(images, "_emoji", lambda packages: iter(emoji))
    monkeypatch.setattr(images, "MIN_STYLES", 2)
    rows = list(images.things(made_up))
    styles = ("noto", "twemoji", "tabler outline", "tabler filled", "phosphor bold", "phosphor thin", "mdi filled")
    assert {row["id"] for row in rows} == {f"{style}/apple" for style in styles}
    assert {(row["label"], row["label_zh"]) for row in rows} == {("apple", "名")}


def test_a_tested_pair_of_concept_and_style_is_trained_in_neither_order():
    pairs = [(f"thing {number}", style) for number in range(200) for style in ("a", "b", "c")]
    split = corpus.split_pairs([*pairs, ("single", "a")], test=0.3, validation=0.1)
    tested = {pair for pair, side in split.items() if side == "test"}
    assert 30 < len(tested) < 90 and split["single", "a"] == "train"
    for side in (0, 1):
        trained = {pair[side] for pair, where in split.items() if where == "train"}
        assert {pair[side] for pair in tested} <= trained
    assert split == corpus.split_pairs(reversed([*pairs, ("single", "a")]), test=0.3, validation=0.1)


def test_more_voices_are_neither_tested_nor_trained_twice():
    more = {*speech.MORE_ESPEAK_VOICES}
    assert len(more) == len(speech.MORE_ESPEAK_VOICES) and not more & {*speech.ESPEAK_VOICES}
    assert not {f"espeak-{voice}" for voice in more} & speech.TEST_VOICES


def test_combinations_of_attributes_voices_and_years_are_held_out(made_up):
    options = {"mouth": "happy01", "hair": "long02", "hairColor": "#28150a", "skinColor": "#cb9e6e",
               "clothingColor": "#d11141", "glasses": "dark01", "hat": "v1", "hatColor": "#2663a3"}  # fmt: skip
    family = avatars.FAMILIES["pixel-art"]
    found = family.attributes(options)
    english, chinese = avatars.caption(family, found)
    assert english == (
        "a happy face with tan skin, long black hair, a red shirt, dark glasses and a blue hat, pixel art"
    )
    assert chinese == "开心的脸，棕褐色皮肤，黑色长发，红色上衣，墨镜，蓝色帽子，像素画"
    rows = [speech.spoken_row("word", voice, ("apple", "苹果"), "en", b"x", {}) for voice in ("espeak-f4", "espeak-m1")]
    assert [row["split"] == "test" for row in rows] == [True, False]
    lines = "\n".join(f"Chad,{year},6.1,50,{year}" for year in range(2000, 2013))
    file = made_up.folder("bokeh") / "_data" / "gapminder.csv.gz"
    file.parent.mkdir()
    file.write_bytes(gzip.compress(f"country,year,fertility,life_expectancy,population\n{lines}".encode()))
    years = {row["numbers"]["year"]: row["split"] for row in tables.lives(made_up)}
    assert all((side == "test") == (year >= 2008) for year, side in years.items())


def test_of_a_tested_fact_another_wording_is_trained():
    for number in range(40):
        subject, asked = (f"land {number}", "某国"), ("a {name}?", "b {name}?")
        fact = facts.Fact(f"x/{number}", subject, ("Town", "某城"), asked, ("{name}？",))
        sides = [row["split"] for row in facts.fact_rows(fact, "geonames")]
        assert len(sides) == 3 and sides.count("train") >= 2


def test_the_same_packages_make_the_same_files(made_up, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "PARTS", {"icons": images.PARTS["icons"], "more": names.PARTS["dictionary"]})
    for name in ("first", "second"):
        report = build.build(tmp_path / name, made_up, limit=12)
    assert report["icons"]["train"] + report["icons"]["validation"] + report["icons"]["test"] == 12
    for file in ("icons.parquet", "more.parquet", "NOTICE"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    table = pq.read_table(tmp_path / "first" / "icons.parquet")
    assert "audio" not in table.column_names and set(table["license"].to_pylist()) == {"MIT", "Apache-2.0"}
    image = Image.open(io.BytesIO(table["image"][0].as_py()))
    assert image.size == (64, 64)


def test_the_recipe_reads_the_parts(made_up, tmp_path):
    corpus.write_part(images.icons(made_up), tmp_path / "icons.parquet")
    source = {"kind": "parquet", "path": str(tmp_path / "icons.parquet")}
    recipe = MultimodalRecipe.model_validate({"sources": {"icons": source},
                                              "mixture": [{"source": "icons", "task": "text_to_image"}]})  # fmt: skip
    splits: tuple[Split, ...] = ("train", "test")
    ids = [set(open_sources(recipe.sources, split)["icons"].values("id")) for split in splits]
    assert ids[0] and not ids[0] & ids[1]


@pytest.mark.parametrize("name", ["mini", *(str(path) for path in (ROOT / "tools" / "mini").glob("*.yaml"))])
def test_share_alike_and_test_only_parts_never_train(name):
    recipe, _ = read_recipe(recipe_path(name), [])
    paths = [Path(source.path).stem for source in recipe.sources.values() if hasattr(source, "path")]
    assert paths and all(build.PARTS[name].trains for name in paths)
    keys = {key for name in paths for key in build.PARTS[name].packages}
    assert not any("SA-" in packages.PACKAGES[key].license for key in keys)


def test_an_id_is_not_given_twice(tmp_path):
    with pytest.raises(ValueError, match="holds an id twice"):
        corpus.write_part([{"id": "a", "split": "test"}] * 2, tmp_path / "part.parquet")


def test_notice_names_each_package_with_licence_and_author():
    used = {key for part in build.PARTS.values() for key in part.packages}
    assert used == set(packages.PACKAGES)
    text = packages.notice(["gcin", "tabler"])
    assert text.index("@tabler/icons 3.51.0 (npm)") < text.index("gcin-voice")
    assert "Licence: CC-BY-3.0" in text and "Chu Lo" in text and "mdi" not in text
    assert all(len(pinned.package.sha256) == 64 and pinned.author for pinned in packages.PACKAGES.values())


def test_recordings_are_cut_and_of_one_loudness():
    wave = 0.1 * np.sin(np.arange(48_000) / 20)
    samples, rate = soundfile.read(io.BytesIO(speech.flac(np.concatenate([np.zeros(9000), wave]), 24_000)))
    assert rate == 16_000 and len(samples) == int(speech.SECONDS * rate)
    assert np.abs(samples).max() == pytest.approx(speech.LOUDNESS, abs=0.02)
    assert np.abs(samples[: rate // 20]).max() > 0.5


def test_names_of_icons_are_words():
    slugs = ("a-cane", "a", "apple-2", "number-circle-4", "arrow-right-one")
    assert [names.english_name(slug) for slug in slugs] == ["cane", "a", "apple", "number circle 4", "arrow right one"]
    assert names.english_name("arrow-right-one", numbered=True) == "arrow right"
    assert names.plain_words("São Tomé, 2") == ["sao", "tome", "2"]


def test_outlines_cross_the_date_line_and_leave_out_what_is_far():
    def ring(x, y, size):
        return [[x, y], [size, 0], [0, size], [-size, 0], [0, -size]]

    arcs = [ring(174, -18, 5), ring(-180, -18, 4), ring(100, 40, 1)]
    country = {"type": "MultiPolygon", "arcs": [[[0]], [[1]], [[2]]]}
    rings = images._rings(country, {"arcs": arcs, "transform": {"scale": [1, 1], "translate": [0, 0]}})
    kept = images._main_rings(rings)
    assert len(rings) == 3 and len(kept) == 2
    assert {x for ring in kept for x, _ in ring} == {174, 179, 180, 184}
