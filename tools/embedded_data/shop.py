"""An invented shop: products with images, words in English and Chinese, prices, reviews and sales."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from embedded_data.series import HORIZON, pick, seasonal_series
from openm6.data.parquet import EmbeddedConfig
from openm6.data.records import Record


class Word(NamedTuple):
    """A word in both languages."""

    en: str
    zh: str


class Product(NamedTuple):
    """A kind of product: the emoji that shows it, its name, category, materials, usual price, and what goes with it."""

    emoji: str
    name: Word
    category: str
    materials: tuple[str, ...]
    price: float
    beside: str


CATEGORIES = {
    "clothing": Word("clothing", "服装"),
    "shoes": Word("shoes", "鞋子"),
    "bags": Word("bags", "箱包"),
    "home": Word("home", "家居"),
    "sport": Word("sport", "运动"),
    "electronics": Word("electronics", "电器"),
}
MATERIALS = {  # word, what speaks for it, what it does to the price
    "cotton": (Word("cotton", "棉"), Word("soft and breathable", "柔软透气"), 1.0),
    "wool": (Word("wool", "羊毛"), Word("warm and light", "温暖轻盈"), 1.8),
    "leather": (Word("leather", "皮革"), Word("strong and supple", "结实柔韧"), 2.2),
    "canvas": (Word("canvas", "帆布"), Word("light and washable", "轻便可洗"), 0.9),
    "steel": (Word("steel", "钢"), Word("made to last", "经久耐用"), 1.5),
    "plastic": (Word("plastic", "塑料"), Word("light and cheap", "轻便实惠"), 0.6),
    "wood": (Word("wooden", "木制"), Word("natural and quiet", "天然安静"), 1.3),
}
PRODUCTS = (
    Product("t-shirt", Word("T-shirt", "T恤"), "clothing", ("cotton", "wool"), 15, "shorts"),
    Product("dress", Word("dress", "连衣裙"), "clothing", ("cotton", "wool"), 40, "handbag"),
    Product("shorts", Word("shorts", "短裤"), "clothing", ("cotton", "canvas"), 18, "running shoe"),
    Product("scarf", Word("scarf", "围巾"), "clothing", ("wool", "cotton"), 20, "gloves"),
    Product("gloves", Word("gloves", "手套"), "clothing", ("wool", "leather"), 17, "scarf"),
    Product("socks", Word("socks", "袜子"), "clothing", ("cotton", "wool"), 6, "running shoe"),
    Product("necktie", Word("tie", "领带"), "clothing", ("cotton", "wool"), 22, "man’s shoe"),
    Product("running shoe", Word("running shoes", "跑鞋"), "shoes", ("canvas", "leather"), 60, "socks"),
    Product("hiking boot", Word("hiking boots", "登山鞋"), "shoes", ("leather", "canvas"), 90, "backpack"),
    Product("man’s shoe", Word("shoes", "皮鞋"), "shoes", ("leather", "canvas"), 70, "necktie"),
    Product("backpack", Word("backpack", "背包"), "bags", ("canvas", "leather"), 45, "hiking boot"),
    Product("handbag", Word("handbag", "手提包"), "bags", ("leather", "canvas"), 80, "purse"),
    Product("purse", Word("purse", "钱包"), "bags", ("leather", "canvas"), 25, "handbag"),
    Product("couch and lamp", Word("sofa", "沙发"), "home", ("leather", "cotton"), 400, "candle"),
    Product("candle", Word("candle", "蜡烛"), "home", ("wood", "steel"), 8, "couch and lamp"),
    Product("mantelpiece clock", Word("clock", "座钟"), "home", ("wood", "steel"), 55, "radio"),
    Product("broom", Word("broom", "扫帚"), "home", ("wood", "plastic"), 9, "basket"),
    Product("basket", Word("basket", "篮子"), "home", ("wood", "plastic"), 14, "broom"),
    Product("kick scooter", Word("scooter", "滑板车"), "sport", ("steel", "plastic"), 75, "running shoe"),
    Product("sled", Word("sled", "雪橇"), "sport", ("wood", "plastic"), 50, "scarf"),
    Product("skateboard", Word("skateboard", "滑板"), "sport", ("wood", "plastic"), 48, "socks"),
    Product("radio", Word("radio", "收音机"), "electronics", ("plastic", "wood"), 35, "mantelpiece clock"),
    Product("flashlight", Word("torch", "手电筒"), "electronics", ("steel", "plastic"), 12, "backpack"),
    Product("camera", Word("camera", "相机"), "electronics", ("steel", "plastic"), 250, "backpack"),
)
COLOURS = {
    "red": Word("red", "红色"),
    "green": Word("green", "绿色"),
    "blue": Word("blue", "蓝色"),
    "gold": Word("yellow", "黄色"),
    "purple": Word("purple", "紫色"),
    "black": Word("black", "黑色"),
}
GRADES = ((Word("simple", "简约"), 0.8), (Word("classic", "经典"), 1.0), (Word("premium", "高档"), 1.5))
OPINIONS = {  # of the thing, then of the bargain; kind, then unkind
    "praise": (
        (Word("lovely colour", "颜色漂亮"), Word("well made", "做工好")),
        (Word("fast delivery", "发货快"), Word("good value", "很划算")),
    ),
    "blame": (
        (Word("wrong colour", "颜色不对"), Word("loose seams", "做工差")),
        (Word("late delivery", "发货慢"), Word("too dear", "太贵")),
    ),
}
SENTIMENT = {"praise": Word("positive", "好评"), "blame": Word("negative", "差评")}
BUYERS = (Word("What colour is it?", "什么颜色？"), Word("What is it made of?", "什么材质？"))


@cache
def emoji_images() -> dict[str, bytes]:
    """The emoji of each kind of product."""
    emoji = EmbeddedConfig(name="emoji").open("emoji", "train", lambda name: NotImplemented)
    used = {product.emoji for product in PRODUCTS}
    names = emoji.values("text_en")
    return {name: emoji[row]["image"] for row, name in enumerate(names) if name in used}


def product_record(rng: np.random.Generator) -> Record:
    """A product whose image, words and price follow from kind, colour, material and grade."""
    article = _article(rng)
    product = article.product
    words: dict[str, str] = {}
    for side, language in enumerate(("en", "zh")):
        words |= {f"{name}_{language}": text for name, text in article.texts(side).items()}
    sales = float(rng.uniform(20, 200) * (40 / product.price) ** 0.3)
    rating = float(f"{rng.uniform(3, 5):.2g}")
    return {
        "license": "CC0-1.0; image: Apache-2.0",
        "image": tinted(emoji_images()[product.emoji], article.shade),
        "text_en": words.pop("title_en"),
        "text_zh": words.pop("title_zh"),
        "tags_en": article.keywords(0),
        "tags_zh": article.keywords(1),
        "label": CATEGORIES[product.category].en,
        "label_zh": CATEGORIES[product.category].zh,
        "numbers": {"price": article.price, "rating": rating, "monthly_sales": float(round(sales))},
        "series": {"weekly_sales": seasonal_series(rng, sales / 4, 12, 0.1)},
        "extra": {**words, "horizon": HORIZON},
    }


@dataclass(frozen=True)
class Article:
    """One product of the shop: what was drawn at random."""

    product: Product
    shade: str
    material: str
    grade: Word
    price: float
    opinion: str
    views: tuple[int, int]  # which opinion of the thing, which of the bargain
    asked: int

    def keywords(self, side: int) -> list[str]:
        stuff = MATERIALS[self.material][0]
        return [COLOURS[self.shade][side], stuff[side], self.product.name[side], self.grade[side]]

    def texts(self, side: int) -> dict[str, str]:
        """All texts in one language: 0 English, 1 Chinese."""
        colour, stuff, name, grade = self.keywords(side)
        first, second = (views[chosen][side] for views, chosen in zip(OPINIONS[self.opinion], self.views, strict=True))
        values = {
            "name": name,
            "colour": colour,
            "material": stuff,
            "grade": grade,
            "good": MATERIALS[self.material][1][side],
            "beside": _named(self.product.beside).name[side],
            "price": f"{self.price:g}",
            "first": first,
            "second": second,
        }
        texts = {key: form.format_map(values) for key, form in FORMS[side].items()}
        kind, unkind = texts.pop("praise"), texts.pop("blame")
        return {
            **texts,
            "review": kind if self.opinion == "praise" else unkind,
            "sentiment": SENTIMENT[self.opinion][side],
            "buyer_question": BUYERS[self.asked][side],
            "buyer_answer": (colour, stuff)[self.asked],
        }


def _article(rng: np.random.Generator) -> Article:
    product = pick(rng, PRODUCTS)
    material, (grade, dearer) = pick(rng, product.materials), pick(rng, GRADES)
    price = product.price * MATERIALS[material][2] * dearer * np.exp(rng.normal(0, 0.08))
    first, second, asked = (int(coin) for coin in rng.integers(0, 2, 3))
    return Article(
        product=product,
        shade=pick(rng, sorted(COLOURS)),
        material=material,
        grade=grade,
        price=float(f"{price:.3g}"),
        opinion=pick(rng, sorted(OPINIONS)),
        views=(first, second),
        asked=asked,
    )


_ENGLISH = {
    "title": "{grade} {colour} {material} {name}",
    "selling_points": "{good} {material}; {colour} goes with everything; a {grade} design",
    "script": "Hello everyone! Look at this {colour} {name}: {material}, {good}. Only {price} today!",
    "attributes": "colour: {colour}; material: {material}; design: {grade}",
    "praise": "This {name} is just right: {first}, {second}. I would buy it again.",
    "blame": "This {name} is a pity: {first}, {second}. I want to send it back.",
    "review_summary": "{first}, {second}",
    "query": "{name} {colour} {material}",
    "history": "{colour} {name}",
    "recommendation": "{beside}: goes with the {name}",
}
_CHINESE = {
    "title": "{grade}{colour}{material}{name}",
    "selling_points": "{material}{good}；{colour}百搭；{grade}设计",
    "script": "大家好！看看这款{colour}{name}：{material}，{good}。今天只要{price}元！",
    "attributes": "颜色：{colour}；材质：{material}；设计：{grade}",
    "praise": "这款{name}很合适：{first}，{second}。会再买。",
    "blame": "这款{name}很遗憾：{first}，{second}。我要退货。",
    "review_summary": "{first}，{second}",
    "query": "{colour}{name} {material}",
    "history": "{colour}{name}",
    "recommendation": "{beside}：和{name}很配",
}

FORMS = (_ENGLISH, _CHINESE)


def _named(emoji: str) -> Product:
    return next(product for product in PRODUCTS if product.emoji == emoji)


def tinted(image: bytes, colour: str) -> bytes:
    """An image on white, blended towards one colour, as lossless WebP."""
    layers = Image.open(io.BytesIO(image)).convert("RGBA")
    whole = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
    shades = ImageOps.colorize(ImageOps.grayscale(whole), "black", "white", mid=colour)
    stream = io.BytesIO()
    Image.blend(whole, shades, 0.7).save(stream, "WEBP", lossless=True, quality=100, method=6)
    return stream.getvalue()
