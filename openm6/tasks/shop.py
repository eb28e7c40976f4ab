"""Tasks of a shop: titles, selling points, scripts, attributes, reviews, prices, search and recommendation.

Besides a picture, a title (`text`), keywords (`tags`), a category (`label`) and numbers, they read what a table keeps
in `extra`: selling_points, script, attributes, review, sentiment, review_summary, query, history, recommendation.
"""

from __future__ import annotations

from openm6.tasks.comparing_slots import Fits, MaybeText, Shown
from openm6.tasks.slots import Future, OneColumn, Past, Picture, Slot, Text
from openm6.tasks.task import Task


def _writes(
    name: str,
    summary: str,
    given: dict[str, Slot],
    wanted: Text,
    en: str,
    zh: str,
    metrics: tuple[str, ...] = ("character_f1", "exact_match"),
) -> Task:
    """A task that answers in text."""
    return Task(
        name=name,
        summary=summary,
        given=given,
        wanted=wanted,
        prompts={"en": (en,), "zh": (zh,)},
        metrics=metrics,
        baseline="frequent_answer",
        reads="image" if "image" in given else "text",
        gives="text",
    )


_TITLE = Text("text")
_MAYBE = MaybeText("text")
_EXACT = ("exact_match",)

TASKS = (
    _writes(
        "write_title",
        "title a product from its picture and keywords",
        {"image": Picture(), "tags": Text("tags")},
        Text("text", max_tokens=48),
        "{image} {tags} Title:",
        "{image} {tags} 标题：",
    ),
    _writes(
        "write_selling_points",
        "say what speaks for a product",
        {"title": _TITLE, "tags": Text("tags")},
        Text("selling_points", max_tokens=96),
        "{title} {tags} Selling points:",
        "{title} {tags} 卖点：",
    ),
    _writes(
        "write_script",
        "write what a host says of a product in a live stream",
        {"title": _TITLE, "selling_points": Text("selling_points")},
        Text("script", max_tokens=160),
        "{title} {selling_points} Live:",
        "{title} {selling_points} 直播：",
    ),
    _writes(
        "fill_attributes",
        "read a product's attributes off its picture and title",
        {"image": Picture(), "title": _TITLE},
        Text("attributes", max_tokens=48),
        "{image} {title} Attributes:",
        "{image} {title} 属性：",
    ),
    _writes(
        "classify_product",
        "find the category of a product",
        {"image": Picture(), "title": _TITLE},
        Text("label", max_tokens=16),
        "{image} {title} Category:",
        "{image} {title} 类目：",
        _EXACT,
    ),
    Task(
        name="match_product",
        summary="say whether a title fits the picture of a product",
        given={"image": Picture(), "text": Shown()},
        wanted=Fits(_MAYBE),
        compares=True,
        prompts={"en": ("{image} {text} The same product?",), "zh": ("{image} {text} 是同款吗？",)},
        metrics=_EXACT,
        baseline="frequent_answer",
        reads="image",
        gives="text",
    ),
    _writes(
        "judge_review",
        "tell a friendly review from an unfriendly one",
        {"review": Text("review")},
        Text("sentiment", max_tokens=8),
        "{review} Positive or negative?",
        "{review} 好评还是差评？",
        _EXACT,
    ),
    _writes(
        "summarise_reviews",
        "say in a few words what reviews say",
        {"review": Text("review")},
        Text("review_summary", max_tokens=48),
        "{review} In short:",
        "{review} 总结：",
    ),
    _writes(
        "search_product",
        "find the product that a query means",
        {"query": Text("query")},
        Text("text", max_tokens=48),
        "search {query}:",
        "搜索{query}：",
    ),
    _writes(
        "recommend",
        "recommend a product to someone, and say why",
        {"history": Text("history")},
        Text("recommendation", max_tokens=96),
        "Bought: {history} Next:",
        "买过：{history} 推荐：",
    ),
    _writes(
        "answer_buyer",
        "answer a buyer's question about a product",
        {"title": _TITLE, "attributes": Text("attributes"), "question": Text("buyer_question")},
        Text("buyer_answer", max_tokens=32),
        "{title} {attributes} {question}",
        "{title} {attributes} {question}",
    ),
    Task(
        name="predict_price",
        summary="predict the price of a product",
        given={"image": Picture(), "title": _TITLE},
        wanted=OneColumn("price"),
        prompts={
            "en": ("{image} {title} What is its {column}?",),
            "zh": ("{image} {title} {column}是多少？",),
        },
        metrics=("crps_share", "mae", "coverage_80"),
        baseline="column_median",
        reads="image",
        gives="numbers",
    ),
    Task(
        name="forecast_demand",
        summary="forecast the sales of a product",
        given={"series": Past()},
        wanted=Future(),
        prompts={"en": ("{series} Sales to come?",), "zh": ("{series} 未来销量？",)},
        metrics=("crps_share", "mae", "coverage_80"),
        baseline="last_value",
        reads="numbers",
        gives="numbers",
    ),
)
