"""The words of the page itself, in both languages."""

from __future__ import annotations

from openm6.serve.scenarios.scenario import Words

TITLE = Words(en="OpenM6 playground", zh="OpenM6 试验场")
LEAD = Words(
    en="One model that takes in and gives out text, pictures, sound and numbers.",
    zh="一个模型，读写文本、图片、声音和数值。",
)
LANGUAGE = Words(en="Language", zh="语言")
SCENARIOS = Words(en="Scenarios", zh="场景")
FREELY = Words(en="Ask freely", zh="自由提问")
DOMAIN = Words(en="Field", zh="领域")
SCENARIO = Words(en="Scenario", zh="场景")
SEED = Words(en="Seed", zh="随机种子")
RUN = Words(en="Answer", zh="回答")
TEXT = Words(en="Text", zh="文本")
PICTURE = Words(en="Picture", zh="图片")
SOUND = Words(en="Sound", zh="声音")
WANTED = Words(en="I want", zh="想要")
ANSWER = Words(en="Answer", zh="回答")
FIGURE = Words(en="Numbers", zh="数值")
GALLERY = Words(en="Gallery of this visit", zh="本次画廊")
READY = Words(en="● ready", zh="● 可用")
OWN = Words(
    en="The example is of other data than the model was trained on: give inputs of your own.",
    zh="示例数据与模型的训练数据不同：请自行输入。",
)
ESTIMATE = Words(en="estimate", zh="估算")
WRONG = Words(en="That did not work", zh="未能完成")
NOTHING = Words(
    en="Nothing is given: write something, or add a picture or a sound.",
    zh="没有输入：请写点什么，或添加图片或声音。",
)
BAD_PICTURE = Words(
    en="The picture is broken, of an unknown kind or over {most:,} pixels: save it anew as PNG, or shrink it.",
    zh="图片已损坏、格式未知或超过 {most:,} 像素：请另存为 PNG 或缩小。",
)
BAD_SOUND = Words(
    en="The sound is broken, of an unknown kind or over {most:g} seconds long: save it anew as WAV, or cut it.",
    zh="声音已损坏、格式未知或超过 {most:g} 秒：请另存为 WAV 或剪短。",
)
UNCOUNTED = Words(en="energy not counted on this machine", zh="本机未计能耗")
HINTS = {
    "numbers": Words(en="one a line: mass = 3.5", zh="每行一个：mass = 3.5"),
    "series": Words(en="name: 3.1, 3.4, 2.9", zh="名称: 3.1, 3.4, 2.9"),
    "candidates": Words(en="one a line", zh="每行一个"),
    "box": Words(en="left, top, right, bottom as shares", zh="左, 上, 右, 下（占比）"),
    "stretch": Words(en="start, end as shares", zh="起, 止（占比）"),
}
LANGUAGE_NAMES = (("English", "en"), ("中文", "zh"))
