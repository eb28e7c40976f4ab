"""A question to a model, its prompt in the words of the trained tasks, and answers, decoded as one batch.

Whether the model was trained on a question of its kind (`assess`) is checked in this order:

- the modalities: some trained task must have the same inputs and output;
- the words: more than half of the fixed words of one of that task's prompts must stand in the text;
- the length: if a task takes free text ("{text}"), the text must be about as long as those of training;
- the confidence: there, too, an answer whose tokens have a low mean probability is not trusted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from openm6.core.errors import ConfigError, DataError
from openm6.core.log import get_log
from openm6.inference.engine import generate_scored, predict_distributions, score_texts, stream_text
from openm6.inference.load import LoadedModel
from openm6.inference.masked import decode_masked
from openm6.inference.prefill import Prompt
from openm6.inference.sampling import Decoding, MaskedSampling, Sampling
from openm6.modalities.audio import Audio, read_audio
from openm6.modalities.chat_template import TURNS
from openm6.modalities.dates import is_date
from openm6.modalities.histogram import Histogram
from openm6.modalities.image import Image, read_image
from openm6.modalities.interface import Part, Segment
from openm6.modalities.registry import MODALITIES, prompt_segments, source_segments, target_segment
from openm6.modalities.series import NumberSeries
from openm6.modalities.text import join_texts
from openm6.models.description import CheckpointConfig
from openm6.tasks.chat import Turn, chat_parts, join_neighbours, said
from openm6.tasks.own import SomeNumbers
from openm6.tasks.registry import all_tasks
from openm6.tasks.slots import SHORT, Text
from openm6.tasks.task import LANGUAGES, Task, word_count, words_of

# Geometric mean probability of an answer's tokens; below it, an answer to free text is not trusted.
MIN_CONFIDENCE = 0.3
# The fraction of a prompt's fixed words that a question must exceed.
MIN_OVERLAP = 0.5
# How many times longer or shorter than those of training a text may be.
LENGTH_RATIO = 1.25
# Tasks or prompts that a message lists.
MAX_LISTED = 4
CHINESE = {"text": "文本", "image": "图片", "audio": "声音", "numbers": "数值"}
_SLOT = re.compile(r"\{\w+\}")


@dataclass(frozen=True)
class Coverage:
    """The result: `en` and `zh` describe what is missing, and are empty if nothing is."""

    en: str = ""
    zh: str = ""

    @property
    def trained(self) -> bool:
        return not self.en

    def message(self, language: str) -> str:
        return self.zh if language == "zh" else self.en


def assess(
    parts: Sequence[Part], target: str, description: CheckpointConfig, confidence: float | None = None
) -> Coverage:
    """Check whether the model was trained for a question: its parts, and the modality of the answer.

    `confidence` is the geometric mean probability of the tokens of a text that was answered.
    """
    if description.base_model and target == "text" and all(part.modality == "text" for part in parts):
        return Coverage()
    names = dict.fromkeys(component.task for component in description.trained_tasks)
    known = all_tasks(description.tasks)
    trained = [known[name] for name in names if name in known and not known[name].contrastive]
    given = {part.modality for part in parts} - {"text"}
    seen: dict[str, set[str]] = {name: set() for name in names}
    for component in description.trained_tasks:
        seen[component.task].update(component.modalities)
    fitting = [
        task for task in trained
        if task.output_modality == target
        and (given <= inputs_of(task) | seen[task.name] if task.optional or task.chat else given == inputs_of(task))
    ]  # fmt: skip
    if not fitting:
        return _other_modalities(given, target, trained)
    words = set(words_of(" ".join(str(part.raw) for part in parts if part.modality == "text")))
    if any(len(fixed & words) > MIN_OVERLAP * len(fixed) for task in fitting for fixed in _fixed_words(task)):
        return Coverage()
    free_text = [task.name for task in fitting if not all(_fixed_words(task))]
    if not free_text:
        return _other_words(fitting)
    length = word_count(parts)
    ranges = [component.words for component in description.trained_tasks if component.task in free_text]
    recorded = [found for found in ranges if found is not None]
    # A task whose lengths were not recorded takes any.
    fits = any(low / LENGTH_RATIO <= length <= high * LENGTH_RATIO for low, high in recorded)
    if len(recorded) == len(ranges) and not fits:
        shortest, longest = min(low for low, _ in recorded), max(high for _, high in recorded)
        return Coverage(
            f"not trained: the question has {length} words, and this model answers texts of {shortest} to "
            f"{longest} words, which must contain the answer",
            f"未学过：问题有{length}个词，该模型只学过回答{shortest}到{longest}个词的文本，且答案须在文本之中",
        )
    if confidence is None or confidence >= MIN_CONFIDENCE:
        return Coverage()
    return Coverage(
        f"probably not trained: the confidence in the answer is low (mean probability {confidence:.0%}), "
        f"as for questions unlike any in the training data",
        f"可能未学过：模型对答案没有把握（平均概率 {confidence:.0%}），训练数据中没有类似的问题",
    )


def inputs_of(task: Task) -> set[str]:
    """The input modalities of a task besides text."""
    return {slot.modality for slot in task.inputs.values()} - {"text"}


def _fixed_words(task: Task) -> list[set[str]]:
    """The words of each prompt of a task without its inputs; none if the prompt is an input alone."""
    prompts = [TURNS.sub(" ", prompt) for prompts in task.prompts.values() for prompt in prompts]
    return [set(words_of(_SLOT.sub(" ", prompt))) for prompt in prompts]


def _other_modalities(given: Collection[str], target: str, trained: list[Task]) -> Coverage:
    pairs = list(dict.fromkeys((tuple(sorted(inputs_of(task))) or ("text",), task.output_modality) for task in trained))
    inputs = sorted(given) or ["text"]
    en = "; ".join(f"{output} from {' and '.join(names)}" for names, output in pairs[:MAX_LISTED])
    zh = "；".join(f"{_zh(names)}→{CHINESE[output]}" for names, output in pairs[:MAX_LISTED])
    more = ("; …", "；…") if len(pairs) > MAX_LISTED else ("", "")
    return Coverage(
        f"not trained: this model was never trained to generate {target} from {' and '.join(inputs)}, "
        f"only {en or 'embeddings'}{more[0]}",
        f"未学过：该模型从未训练过{_zh(inputs)}→{CHINESE[target]}，只训练过{zh or '向量'}{more[1]}",
    )


def _other_words(fitting: list[Task]) -> Coverage:
    listed = {}
    for language in ("en", "zh"):
        prompts = [task.prompts[language][0] for task in fitting if language in task.prompts]
        shown = dict.fromkeys(prompts or [next(iter(task.prompts.values()))[0] for task in fitting])
        words = [_SLOT.sub("…", TURNS.sub("", prompt)).strip() for prompt in list(shown)[:MAX_LISTED]]
        listed[language] = ", ".join(map(repr, words))
    return Coverage(
        f"not trained: no prompt of this model has such words; it was trained on {listed['en']}",
        f"未学过：该模型从未见过这样的问法，训练时的问法是 {listed['zh']}",
    )


def _zh(modalities: Collection[str]) -> str:
    return "、".join(CHINESE[name] for name in modalities)


# Of an image or recording, far above their own bounds.
MAX_FILE_BYTES = 256 << 20

Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class Question:
    """Inputs and the modality of the answer.

    `numbers` maps columns to values (None: missing); `column` is the number to predict; `series` with `ahead` asks for
    a forecast of so many steps. `language` is that of the prompt, if `text` is not one itself. `mask_box` (left, top,
    right, bottom as fractions of the sides) and `mask_span` (start, end as fractions of the seconds generated) ask for
    inpainting: the image or audio is generated there and kept elsewhere. `image` and `audio` are paths or contents.
    """

    output: str
    text: str | None = None
    image: Path | str | bytes | None = None
    audio: Path | str | bytes | None = None
    numbers: dict[str, float | str | None] | None = None  # texts are dates
    series: NumberSeries | None = None
    column: str | None = None
    ahead: int = 8
    mask_box: Box | None = None
    mask_span: tuple[float, float] | None = None
    language: str = "en"

    def __post_init__(self) -> None:
        if not isinstance(self.output, str) or self.output not in MODALITIES:
            hint = ": --out names the file" if "." in str(self.output) else ""
            raise ConfigError(f"the output {self.output!r} is not one of {', '.join(MODALITIES)}{hint}")
        if self.language not in LANGUAGES:
            raise ConfigError(f"the language {self.language!r} is not one of {', '.join(LANGUAGES)}")
        if self.text is not None and not isinstance(self.text, str):
            raise ConfigError(f"a text is expected, not {type(self.text).__name__}")
        if self.numbers is not None and not isinstance(self.numbers, Mapping):
            raise ConfigError(f"numbers map columns to values, as {{'mass': 3.5}}, not {type(self.numbers).__name__}")
        for name, value in (self.numbers or {}).items():
            if not isinstance(name, str) or not (value is None or isinstance(value, float | int | str | np.number)):
                wrong = f"{name!r}: {value!r}"[:80]
                raise ConfigError(f"numbers map columns to values, as {{'mass': 3.5}}, not {{{wrong}}}")
        if not isinstance(self.ahead, int | np.integer) or self.ahead < 1:
            raise ConfigError(f"{self.ahead!r} steps cannot be forecast: ask for at least 1")
        media = (self.image, self.audio)
        if not any((self.text, self.numbers, self.series)) and media == (None, None):
            raise ConfigError("nothing is given: add a text, an image, audio, numbers or a series")
        if self.mask_box is not None and (self.image is None or self.output != "image"):
            raise ConfigError("a mask box fills in an image: it needs an image as input and as output")
        if self.mask_span is not None and (self.audio is None or self.output != "audio"):
            raise ConfigError("a mask span fills in an audio clip: it needs audio as input and as output")
        for name, mask, half in (("the mask box", self.mask_box, 2), ("the mask span", self.mask_span, 1)):
            if mask is not None and not is_region(mask, half):
                raise ConfigError(f"{name} must be {2 * half} fractions between 0 and 1, each start below its end")

    @property
    def is_inpainting(self) -> bool:
        return self.mask_box is not None or self.mask_span is not None

    def target_column(self) -> str:
        """Return the column to predict: the one named, or the one given as missing; ConfigError if neither is there."""
        missing = [name for name, value in (self.numbers or {}).items() if value is None]
        if self.column is None and len(missing) != 1:
            raise ConfigError(
                "the number to predict is not named: add --column (in Python, target), or give it without a value"
            )
        return missing[0] if self.column is None else self.column


def is_region(mask: Any, half: int) -> bool:
    """Whether a mask has `half` starts between 0 and 1, and as many ends above them."""
    if isinstance(mask, str) or not isinstance(mask, Sequence | np.ndarray) or len(mask) != 2 * half:
        return False
    numbers = all(isinstance(bound, float | int | np.number) for bound in mask)
    return numbers and all(0 <= start < end <= 1 for start, end in zip(mask[:half], mask[half:], strict=True))


def read_media(modality: Image | Audio, given: Path | str | bytes) -> bytes:
    """Return the bytes of an image or recording, or of the file at a path; DataError, after its path, if it is none."""
    path = Path() if isinstance(given, bytes) else Path(given)
    if re.match(r"https?:/", str(path)):
        raise DataError(f"{path} is an address, and nothing is fetched: load it, and give its path or bytes")
    try:
        if not isinstance(given, bytes) and path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"the file is larger than {MAX_FILE_BYTES >> 20} MiB, the most allowed: shrink or cut it")
        content = given if isinstance(given, bytes) else path.read_bytes()
        if isinstance(modality, Image):
            read_image(content, modality.max_pixels)
        else:
            read_audio(content, modality.max_seconds)
    except DataError as error:
        raise DataError(str(error) if isinstance(given, bytes) else f"{path}: {error}") from None
    except FileNotFoundError:
        raise DataError(f"no file at {path}: check the path") from None
    # A path with a zero byte is a ValueError.
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read ({reason}): name a file that you may read") from None
    return content


def prompt_parts(question: Question, loaded: LoadedModel, chat: bool = True) -> list[Part]:
    """The parts of the prompt: the inputs, and the words that ask for the output.

    These are the text of the question if it has one. Without one, or if the text does not name the number to
    predict, they are the prompt of the first trained task with the same input and output. If there is no such task, a
    model of chats is asked in a turn of the user, unless `chat` is false; so is one with a chat template about media.
    """
    parts: list[Part] = []
    if question.image is not None:
        parts.append(Part("image", read_media(loaded.image, question.image), {"mask_box": question.mask_box}))
    if question.audio is not None:
        parts.append(Part("audio", read_media(loaded.audio, question.audio), {"mask_span": question.mask_span}))
    # The column to predict is no input, and a text without other inputs must name it.
    has_column = question.output == "numbers" and (question.series is None or question.numbers is not None)
    column = question.target_column() if has_column else None
    rest = {name: value for name, value in (question.numbers or {}).items() if name != column}
    if rest:
        parts.append(Part("numbers", rest))
    if question.series is not None:
        parts.append(Part("numbers", question.series))
    found = trained_prompt(question, loaded)
    # An imported model reads own words beside an image in the turns of its chat template, as `openm6 chat` asks them.
    turns = bool(parts and question.text and question.output == "text" and loaded.has_chat_template)
    if chat and (turns or (found is None and loaded.chats)):
        return chat_prompt([("user", [*parts, Part("text", question.text or "")])], loaded)
    words = found or ("", "")
    asks = {"cuttable": ()} if question.text is None else {}
    if question.text is None:
        before, after = words
    elif parts or column is None or column in question.text or column.replace("_", " ") in question.text:
        before, after = "", (" " if parts else "") + question.text
    else:
        first, last = (Part("text", part, {"cuttable": ()}) for part in words)
        return [join_texts(join_texts(first, Part("text", question.text)), last)]
    around = [[Part("text", text, asks)] if text else [] for text in (before, after)]
    return [*around[0], *parts, *around[1]]


def chat_prompt(turns: Iterable[Turn], loaded: LoadedModel) -> list[Part]:
    """Return the prompt of a conversation.

    A model that was trained on chats, or imported with a chat template, reads turns with roles, as in training. Another
    one reads a line per turn, without roles; texts of neighbouring turns are joined unless each part is a block of its
    own, which an earlier request may have cached. One that was imported, and trained to answer single questions about
    images and audio, reads such a question without earlier turns, and later ones without these images and audio: it
    would take what follows for the same question.
    """
    turns = list(turns)
    if loaded.has_chat_template and not loaded.chats:
        # As other servers join the parts of a message.
        turns = [(role, join_neighbours(parts, "\n")) for role, parts in turns]
        turns = _as_single_questions(turns) if loaded.description.trained_tasks else turns
    if loaded.chats or loaded.has_chat_template:
        filled = [turn for turn in turns if said(turn[1])]
        # To a template an empty turn means something, as no system message at all.
        return chat_parts(turns if loaded.has_chat_template and filled else filled)
    joined: list[Part] = []
    for _, parts in turns:
        if parts:
            joined += join_neighbours([Part("text", "\n"), *parts] if joined else parts)
    return joined if loaded.modalities.prompt_attention != "bidirectional" else join_neighbours(joined)


def _as_single_questions(turns: list[Turn]) -> list[Turn]:
    """What is asked after the last answer: alone if it shows media, else after the texts of earlier turns."""
    answered = 1 + max((index for index, (role, _) in enumerate(turns) if role == "assistant"), default=-1)
    before, asked = turns[:answered], turns[answered:]
    if any(part.modality != "text" for _, parts in asked for part in parts):
        return [*(turn for turn in before if turn[0] == "system"), *asked]
    return [*((role, [part for part in parts if part.modality == "text"]) for role, parts in before), *asked]


def trained_prompt(question: Question, loaded: LoadedModel) -> tuple[str, str] | None:
    """Return the words before and after the input in the first prompt of the first trained task that fits, if any."""
    if not (fitting := _fitting(question, loaded)):
        return None
    task = fitting[0][0]
    # An own task may have prompts in other languages alone.
    prompts = task.prompts.get(question.language) or next(iter(task.prompts.values()))
    before, *_, after = re.split(r"\{(?!column\})\w+\}", prompts[0])
    column = question.target_column().replace("_", " ") if "{column}" in after else ""
    return before, after.replace("{column}", column)


def _fitting(question: Question, loaded: LoadedModel) -> list[tuple[Task, str]]:
    """The trained tasks with the same input and output, and their sources."""
    tasks = ((loaded.tasks.get(component.task), component.source) for component in loaded.description.trained_tasks)
    return [(task, source) for task, source in tasks if task is not None and _fits(task, question)]


def _fits(task: Task, question: Question) -> bool:
    inputs = {"image": question.image, "audio": question.audio, "numbers": question.numbers or question.series}
    given = [name for name, value in inputs.items() if value is not None] or ["text"]
    return (
        [task.input_modality] == given
        and task.output_modality == question.output
        and (len(task.inputs) == 1 or (task.optional and question.output == "numbers"))
        and not (task.contrastive or task.chat)
        and task.is_inpainting == question.is_inpainting
        and ("series" in task.inputs) == (question.series is not None)
        # An own task asks for one column.
        and not (isinstance(task.target, SomeNumbers) and question.target_column() not in task.target.columns)
    )


def parse_fractions(words: str | None, count: int, name: str) -> tuple[float, ...] | None:
    """Parse `0.25,0.25,0.75,0.75`; raise ConfigError unless these are `count` numbers."""
    if words is None:
        return None
    try:
        fractions = tuple(float(word) for word in words.split(","))
    except ValueError:
        fractions = ()
    if len(fractions) != count:
        raise ConfigError(f"{name} {words!r} must be {count} numbers between 0 and 1, with commas between")
    return fractions


def parse_numbers(words: str | None) -> dict[str, float | str | None] | None:
    """Parse `mass=3.5,length=,day=2024-01-31`; nothing after the equals sign means missing; else raise ConfigError."""
    if words is None:
        return None
    numbers: dict[str, float | str | None] = {}
    for part in words.split(","):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals or not name:
            raise ConfigError(f"--numbers has {part!r}, which must look like name=3.5")
        try:
            numbers[name] = value if is_date(value) else _number(value)
        except ValueError:
            raise ConfigError(
                f"--numbers has {part!r}, which must look like name=3.5, a finite number, or name= if it is missing"
            ) from None
    return numbers


def parse_series(words: str | None) -> NumberSeries | None:
    """Parse `temp_max=12.8,10.6,,11.1`; nothing between commas means missing; else raise ConfigError."""
    if words is None:
        return None
    name, equals, values = words.partition("=")
    numbers: list[float | None] = []
    for step, value in enumerate(values.split(","), 1):
        try:
            numbers.append(_number(value.strip()))
        except ValueError:
            raise ConfigError(
                f"--series has {value!r} as value {step}, which must be a finite number, or nothing if it is missing"
            ) from None
    if not equals or not name.strip():
        raise ConfigError(f"--series {words!r} must look like temp_max=12.8,10.6,11.7")
    return NumberSeries(name.strip(), numbers)


def _number(value: str) -> float | None:
    """None for an empty text; raise ValueError for anything but a finite number."""
    if not value:
        return None
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(value)
    return number


# Images, audio or rows of numbers decoded side by side.
BATCH = 32

Answer = str | PIL.Image.Image | np.ndarray | Histogram
"""The output of a model: text, an image, 16 kHz samples, or distributions of numbers."""


def answer_questions(loaded: LoadedModel, questions: Sequence[Question], decoding: Decoding) -> list[Answer]:
    """Return the answers to questions, all of which ask for one modality; the one at i draws from seed + i.

    A label that has simple predictors is answered by its most probable class, unless the question has words of its own.
    """
    parts = [prompt_parts(question, loaded) for question in questions]
    asked = list(zip(questions, parts, strict=True))
    targets = [target_of(question, prompt, loaded) for question, prompt in asked if question.output != "text"]
    named = {index: name for index, one in enumerate(asked) if (name := _class_of(*one, loaded)) is not None}
    free = [index for index in range(len(parts)) if index not in named]
    generated = answer_parts(loaded, [parts[index] for index in free], questions[0].output, targets, decoding, free)
    found = named | dict(zip(free, generated, strict=True))
    return [found[index] for index in range(len(questions))]


def _class_of(question: Question, parts: Sequence[Part], loaded: LoadedModel) -> str | None:
    """The most probable class of a label that the prompt of a trained task asks for, if it has simple predictors.

    If such questions were trained on several sources, each has its own classes, and the answer may be of any.
    """
    fitting = _fitting(question, loaded) if question.text is None else []
    task = fitting[0][0] if len({source for _, source in fitting}) == 1 else None
    if task is None or not isinstance(task.target, Text):
        return None
    shown = dict.fromkeys((task.target.name, f"{task.target.name}_{question.language}"), "a class")
    known = {"given": loaded.numbers.given(parts), "source": fitting[0][1]}
    options = {**task.target.part(shown, question.language).options, **known}
    label = loaded.numbers.label_predictions(options) if "column" in options else None
    if label is None:
        return None
    names = [target_segment(Part("text", name, {"max_tokens": SHORT}), loaded.modalities) for name in label.classes]
    nll = score_texts(loaded, [source_segments(parts, loaded.modalities)], names)
    return label.classes[int(loaded.numbers.label_scores(nll, label.classes, [options])[0].argmax())]


def answer_parts(
    loaded: LoadedModel, prompts: Sequence[Sequence[Part]], output: str, targets: Sequence[Segment], decoding: Decoding,
    indices: Sequence[int] = (),
) -> list[Answer]:  # fmt: skip
    """As `answer_questions`, of prompts as parts; `targets` are those of `target_of`, none for text.

    `indices` are those of the prompts among all questions, if texts of others are not generated.
    """
    segments = [prompt_segments(parts, loaded.modalities) for parts in prompts]
    texts = generate_scored(loaded, segments, decoding.text, indices) if output == "text" else []
    found: list[Answer] = [text for text, _ in texts]
    masked = loaded.masked_sampling(decoding.masked)
    for start in range(0, len(targets), BATCH):
        sampling = masked.model_copy(update={"seed": masked.seed + start})
        batch = slice(start, start + BATCH)
        found += decode_targets(loaded, segments[batch], output, list(targets[batch]), sampling)
    warn_untrained(loaded, prompts, output, [confidence for _, confidence in texts] or [None] * len(prompts))
    return found


def stream_question(loaded: LoadedModel, question: Question, sampling: Sampling) -> Iterator[str]:
    """Yield the text that `answer_questions` returns, as it is generated."""
    parts = prompt_parts(question, loaded)
    name = _class_of(question, parts, loaded)
    return stream_answer(loaded, parts, sampling) if name is None else iter([name])


def stream_answer(loaded: LoadedModel, parts: Sequence[Part], sampling: Sampling) -> Iterator[str]:
    """Yield the text that answers a prompt as it is generated; as `answer_parts`."""
    confidence = yield from stream_text(loaded, prompt_segments(parts, loaded.modalities), sampling)
    warn_untrained(loaded, [parts], "text", [confidence])


def warn_untrained(
    loaded: LoadedModel, prompts: Sequence[Sequence[Part]], output: str, confidences: Sequence[float | None]
) -> None:
    """Warn once of each reason why a question was not trained."""
    pairs = zip(prompts, confidences, strict=True)
    notes = [assess(parts, output, loaded.description, confidence).en for parts, confidence in pairs]
    for note in dict.fromkeys(filter(None, notes)):
        get_log().warning(note)


def decode_targets(
    loaded: LoadedModel, prompts: list[Prompt], modality: str, targets: list[Segment], sampling: MaskedSampling
) -> list[Answer]:
    """Return images, audio samples or distributions in answer to prompts, in one batch."""
    if modality == "numbers":
        return list(predict_distributions(loaded.omni, prompts, targets))
    codec = loaded.image if modality == "image" else loaded.audio
    return [codec.decode(codes) for codes in decode_masked(loaded.omni, prompts, targets, sampling).cpu()]


def target_of(question: Question, parts: Sequence[Part], loaded: LoadedModel) -> Segment:
    """Return what is decoded: all codes or those that are masked, a number, or the steps of a forecast."""
    if question.output == "numbers":
        name = question.target_column() if question.series is None else question.series.name
        # A target needs values; these are only asked for.
        value = loaded.numbers.scale(name)[0]
        raw = {name: value} if question.series is None else question.series.to_forecast(question.ahead)
        return loaded.numbers.target(raw, options={"given": loaded.numbers.given(parts)})
    modality = loaded.image if question.output == "image" else loaded.audio
    if question.is_inpainting:
        (masked,) = (part for part in parts if part.modality == question.output)
        return modality.target(masked.raw, options=masked.options)
    return modality.blank()
