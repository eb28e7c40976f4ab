"""Tasks of a shop: titles, selling points, scripts, attributes, reviews, prices, search and recommendation.

Besides an image, a title (`text`), keywords (`tags`), a category (`label`) and numbers, they read what a table keeps
in `extra`: selling_points, script, attributes, review, sentiment, review_summary, query, history, recommendation.
"""

from __future__ import annotations

from openm6.tasks.builders import FUTURE, PRICE, TEXT_MATCH
from openm6.tasks.slots import IMAGE, LABEL, TEXT, Derived, Text
from openm6.tasks.task import Task

TASKS = {
    "product_title_generation": Task(
        summary="Write a product title from image and keywords", inputs={"image": IMAGE, "tags": Text("tags")},
        target=Text("text", max_tokens=48),
        prompts={"en": ("{image} {tags} Title:",), "zh": ("{image} {tags} 标题：",)},
    ),
    "selling_point_generation": Task(
        summary="Write the selling points of a product", inputs={"title": TEXT, "tags": Text("tags")},
        target=Text("selling_points", max_tokens=96),
        prompts={"en": ("{title} {tags} Selling points:",), "zh": ("{title} {tags} 卖点：",)},
    ),
    "script_generation": Task(
        summary="Write the script of a host for a live stream",
        inputs={"title": TEXT, "selling_points": Text("selling_points")}, target=Text("script", max_tokens=160),
        prompts={"en": ("{title} {selling_points} Live:",), "zh": ("{title} {selling_points} 直播：",)},
    ),
    "attribute_extraction": Task(
        summary="Extract the attributes of a product from image and title", inputs={"image": IMAGE, "title": TEXT},
        target=Text("attributes", max_tokens=48),
        prompts={"en": ("{image} {title} Attributes:",), "zh": ("{image} {title} 属性：",)},
    ),
    "product_classification": Task(
        summary="Name the category of a product from image and title", inputs={"image": IMAGE, "title": TEXT},
        target=LABEL,
        prompts={"en": ("{image} {title} Category:",), "zh": ("{image} {title} 类目：",)},
    ),
    "product_matching": Task(
        summary="Decide whether a title matches the image of a product", inputs={"image": IMAGE, "text": TEXT},
        target=TEXT_MATCH,
        prompts={"en": ("{image} {text} The same product?",), "zh": ("{image} {text} 是同款吗？",)},
        needs_negatives=True,
    ),
    "sentiment_analysis": Task(
        summary="Classify a review as positive or negative", inputs={"review": Text("review")},
        target=Text("sentiment", max_tokens=8),
        prompts={"en": ("{review} Positive or negative?",), "zh": ("{review} 好评还是差评？",)},
    ),
    "review_summarization": Task(
        summary="Summarize reviews", inputs={"review": Text("review")}, target=Text("review_summary", max_tokens=48),
        prompts={"en": ("{review} In short:",), "zh": ("{review} 总结：",)},
    ),
    "product_search": Task(
        summary="Return the product for a query", inputs={"query": Text("query")}, target=Text("text", max_tokens=48),
        prompts={"en": ("search {query}:",), "zh": ("搜索{query}：",)},
    ),
    "product_recommendation": Task(
        summary="Recommend a product from past purchases, with a reason", inputs={"history": Text("history")},
        target=Text("recommendation", max_tokens=96),
        prompts={"en": ("Bought: {history} Next:",), "zh": ("买过：{history} 推荐：",)},
    ),
    "product_question_answering": Task(
        summary="Answer a buyer's question about a product",
        inputs={"title": TEXT, "attributes": Text("attributes"), "question": Text("buyer_question")},
        target=Text("buyer_answer", max_tokens=32),
        prompts={"en": ("{title} {attributes} {question}",), "zh": ("{title} {attributes} {question}",)},
    ),
    "price_prediction": Task(
        summary="Predict the price of a product from image and title", inputs={"image": IMAGE, "title": TEXT},
        target=PRICE,
        prompts={"en": ("{image} {title} What is its {column}?",), "zh": ("{image} {title} {column}是多少？",)},
    ),
    "demand_forecasting": Task(
        summary="Forecast the sales of a product", inputs={"series": Derived("numbers")}, target=FUTURE,
        prompts={"en": ("{series} Sales to come?",), "zh": ("{series} 未来销量？",)}, baseline="last_value",
    ),
}  # fmt: skip
