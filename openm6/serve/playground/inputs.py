"""Inputs and words of the page: a fixed few slots of each kind, labelled and filled as a scenario needs them."""

from __future__ import annotations

import io
from abc import ABCMeta
from pathlib import Path
from typing import Any

import gradio
import soundfile
from PIL import Image as Pillow

from openm6.core.errors import DataError
from openm6.serve.config import Limits
from openm6.serve.content import check_audio, check_image
from openm6.serve.errors import BadRequestError
from openm6.serve.scenarios.ask import example_values
from openm6.serve.scenarios.scenario import Bilingual, InputKind, Language, Scenario

TEXTS, IMAGES, AUDIOS = 4, 3, 1  # the most that any scenario takes
Update = dict[str, Any]

LANGUAGE_NAMES = (("English", "en"), ("中文", "zh"))
TITLE = Bilingual(en="OpenM6 playground", zh="OpenM6 试验场")
LEAD = Bilingual(
    en="One model with text, images, audio and numbers as inputs and outputs.",
    zh="一个模型，读写文本、图片、声音和数值。",
)
LANGUAGE = Bilingual(en="Language", zh="语言")
SCENARIOS = Bilingual(en="Scenarios", zh="场景")
FREELY = Bilingual(en="Ask freely", zh="自由提问")
DOMAIN = Bilingual(en="Field", zh="领域")
SCENARIO = Bilingual(en="Scenario", zh="场景")
SEED = Bilingual(en="Seed", zh="随机种子")
RUN = Bilingual(en="Answer", zh="回答")
TEXT = Bilingual(en="Text", zh="文本")
IMAGE = Bilingual(en="Image", zh="图片")
AUDIO = Bilingual(en="Audio", zh="声音")
OUTPUT = Bilingual(en="Output", zh="想要")
ANSWER = Bilingual(en="Answer", zh="回答")
GALLERY = Bilingual(en="Gallery of this visit", zh="本次画廊")
READY = Bilingual(en="● ready", zh="● 可用")
OWN = Bilingual(
    en="The example is of other data than the model was trained on: give inputs of your own.",
    zh="示例数据与模型的训练数据不同：请自行输入。",
)
ESTIMATE = Bilingual(en="estimate", zh="估算")
WRONG = Bilingual(en="That did not work", zh="未能完成")
NOTHING = Bilingual(
    en="The input is empty: write something, or add an image or audio.",
    zh="没有输入：请写点什么，或添加图片或声音。",
)
BAD_IMAGE = Bilingual(
    en="The image is broken, of an unknown kind or over {most:,} pixels: save it again as PNG, or shrink it.",
    zh="图片已损坏、格式未知或超过 {most:,} 像素：请另存为 PNG 或缩小。",
)
BAD_AUDIO = Bilingual(
    en="The audio is broken, of an unknown kind or over {most:g} seconds long: save it again as WAV, or cut it.",
    zh="声音已损坏、格式未知或超过 {most:g} 秒：请另存为 WAV 或剪短。",
)
UNCOUNTED = Bilingual(en="energy not measured on this machine", zh="本机未计能耗")
HINTS = {
    "numbers": Bilingual(en="one a line: mass = 3.5", zh="每行一个：mass = 3.5"),
    "series": Bilingual(en="name: 3.1, 3.4, 2.9", zh="名称: 3.1, 3.4, 2.9"),
    "candidates": Bilingual(en="one a line", zh="每行一个"),
    "box": Bilingual(en="left, top, right, bottom as fractions", zh="左, 上, 右, 下（占比）"),
    "span": Bilingual(en="start, end as fractions", zh="起, 止（占比）"),
}


def _path_of(_: gradio.Image, payload: Any) -> str | None:
    """The path of an image's file, unread: errors are reported in our words, not in Gradio's."""
    return None if payload is None else payload.path


# A class, since Gradio creates a component again when its label changes, and would lose a method of the object's own.
# Not by a class statement, at which it would write a stub file beside this one.
ImageInput: Any = ABCMeta.__new__(
    type(gradio.Image),
    "ImageInput",
    (gradio.Image,),
    {"is_template": True, "preprocess": _path_of, "__module__": __name__},
)


def image_input(elem_id: str, label: str | None = None, visible: bool = True) -> gradio.Image:
    """Return an image component that passes its file on unread."""
    found = ImageInput(
        type="filepath", format="png", height=200, elem_id=elem_id, label=label, visible=visible
    )
    assert isinstance(found, gradio.Image)
    return found


def uploaded(kind: str, path: str, limits: Limits, language: Language) -> bytes:
    """Return the bytes of an image or audio that was uploaded or recorded.

    Raises:
        DataError: it cannot be read, or is too large, in the language of the page.
    """
    data = Path(path).read_bytes()
    try:
        return check_image(data, limits, kind) if kind == "image" else check_audio(data, limits, kind)
    except BadRequestError:
        text, most = (BAD_IMAGE, limits.pixels) if kind == "image" else (BAD_AUDIO, limits.audio_seconds)
        raise DataError(text.text(language).format(most=most)) from None


def make_slots() -> list[gradio.components.Component]:
    """Return all slots, hidden: text boxes, images, audio."""
    texts = [gradio.Textbox(visible=False, lines=2, elem_id=f"text-{index}") for index in range(TEXTS)]
    with gradio.Row():
        images = [image_input(f"image-{index}", visible=False) for index in range(IMAGES)]
    audio_clips = [
        gradio.Audio(visible=False, type="filepath", elem_id=f"audio-{index}") for index in range(AUDIOS)
    ]
    return [*texts, *images, *audio_clips]


def slot_names(scenario: Scenario) -> list[str | None]:
    """Return which input each slot holds."""
    names: list[str | None] = []
    for kind, count in (("text", TEXTS), ("image", IMAGES), ("audio", AUDIOS)):
        found = [
            name
            for name, declared in scenario.inputs.items()
            if kind == (declared.kind if declared.kind in ("image", "audio") else "text")
        ]
        if len(found) > count:
            raise DataError(
                f"scenario {scenario.name} takes {len(found)} inputs of kind {kind}: {count} can be shown"
            )
        names += [*found, *[None] * (count - len(found))]
    return names


def slot_updates(scenario: Scenario, language: Language, filled: bool = True) -> list[Update]:
    """Return an update of each slot for a scenario, filled with its example or empty."""
    example = example_values(scenario, language) if filled else {}
    updates = []
    for name in slot_names(scenario):
        if name is None:
            updates.append(gradio.update(visible=False))
            continue
        declared = scenario.inputs[name]
        label = declared.label.text(language)
        if declared.kind in HINTS:
            label = f"{label} ({HINTS[declared.kind].text(language)})"
        value = _shown(declared.kind, example[name]) if filled else None
        updates.append(gradio.update(visible=True, label=label, value=value))
    return updates


def _shown(kind: InputKind, value: Any) -> Any:
    if kind == "image":
        return Pillow.open(io.BytesIO(value)).convert("RGBA")
    if kind == "audio":
        samples, rate = soundfile.read(io.BytesIO(value), dtype="int16")
        return rate, samples
    return write_typed(kind, value)


def values_in(
    scenario: Scenario, slots: tuple[Any, ...], limits: Limits, language: Language = "en"
) -> dict[str, Any]:
    """Return the contents of the slots, by name, as `scenario_request` takes them.

    Raises:
        DataError: something cannot be read.
    """
    found = {}
    for name, value in zip(slot_names(scenario), slots, strict=True):
        if name is not None and value not in (None, ""):
            kind = scenario.inputs[name].kind
            is_file = kind in ("image", "audio")
            found[name] = uploaded(kind, value, limits, language) if is_file else read_typed(kind, value)
    return found


def read_typed(kind: InputKind, text: str) -> Any:
    """Return the value that was typed into a text box.

    Raises:
        DataError: it cannot be read as this kind.
    """
    text = text.strip()
    if kind == "numbers":
        return dict(_column(line) for line in text.replace(";", "\n").splitlines() if line.strip())
    if kind == "series":
        name, _, values = text.replace("：", ":").rpartition(":")
        return {"name": name.strip() or "value", "values": _numbers(values)}
    if kind == "candidates":
        return [line.strip() for line in text.splitlines() if line.strip()]
    if kind in ("box", "span"):
        return _numbers(text)
    return text


def _column(line: str) -> tuple[str, float | None]:
    name, equals, value = line.replace("：", "=").replace(":", "=").partition("=")
    if not equals or not name.strip():
        raise DataError(f"{line.strip()!r} must look like mass = 3.5")
    return name.strip(), _number(value)


def _numbers(text: str) -> list[Any]:
    return [_number(word) for word in text.replace("，", ",").split(",")]


def _number(word: str) -> float | None:
    word = word.strip()
    if not word:
        return None
    try:
        return float(word)
    except ValueError:
        raise DataError(f"{word!r} is not a number: write it as 3.5") from None


def write_typed(kind: InputKind, value: Any) -> str:
    """Return a value as it would be typed."""
    if kind == "numbers":
        return "\n".join(f"{name} = {_plain(number)}" for name, number in value.items())
    if kind == "series":
        return f"{value['name']}: {', '.join(map(_plain, value['values']))}"
    if kind == "candidates":
        return "\n".join(value)
    if kind in ("box", "span"):
        return ", ".join(map(_plain, value))
    return str(value)


def _plain(number: float | None) -> str:
    return "" if number is None else f"{number:g}"
