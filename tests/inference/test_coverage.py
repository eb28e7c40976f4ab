"""A question that was trained for is taught; another pair, other words or an unsure answer is not, with a sentence."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from openm6.core.config import read_yaml
from openm6.core.errors import DataError
from openm6.inference.load import LoadedModel
from openm6.inference.question import MIN_CONFIDENCE, Coverage, Question, answer_questions, assess, inputs_of
from openm6.inference.sampling import Decoding, Sampling
from openm6.modalities.interface import Part
from openm6.models.description import CheckpointConfig
from openm6.tasks.registry import TASKS
from openm6.train.multimodal_data import words_read
from openm6.train.run import recipe_path
from tests.data.sample_images import png
from tests.small_model import demo_sources, loaded


def trained(*tasks: str) -> CheckpointConfig:
    return loaded(trained_tasks=tuple((task, "x") for task in tasks)).description


def text(words: str) -> Part:
    return Part("text", words)


IMAGE, ROW = Part("image", b""), Part("numbers", {"mass": 1.0})
CLASSIFIER = trained("image_classification", "tabular_classification")


@pytest.mark.parametrize("name", TASKS)
def test_the_modalities_of_a_task_follow_from_its_slots(name: str) -> None:
    task = TASKS[name]
    assert task.input_modality in (inputs_of(task) or {"text"})


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if not task.contrastive])
def test_what_was_trained_is_taught(name: str) -> None:
    """A record put to its own task, in both languages and all its prompts."""
    task, rng = TASKS[name], np.random.default_rng(0)
    seen = 0
    for source in demo_sources().values():
        for row in range(3):
            try:
                example = task.example(source[row], rng, train=True)
            except (DataError, KeyError):
                continue
            seen += 1
            assert assess(example.source, task.output_modality, trained("word_translation", name), 0.9) == Coverage()
    assert seen or task.chat or task.needs_negatives or task.name in ("text_tabular_regression",)


@pytest.mark.parametrize(
    ("parts", "target", "said"),
    [
        ([text("draw a cat")], "image", "image from text, only text from image; text from numbers"),
        ([IMAGE, text(" Say it.")], "audio", "audio from image, only text from image"),
        ([ROW, IMAGE], "text", "text from image and numbers, only"),
        ([ROW, text(" What is its mass?")], "numbers", "numbers from numbers, only"),
    ],
)  # fmt: skip
def test_a_pair_that_was_never_trained(parts: list[Part], target: str, said: str) -> None:
    found = assess(parts, target, CLASSIFIER)
    assert not found.trained and said in found.message("en") and "\n" not in found.en
    assert found.message("zh").startswith("未学过")


def test_words_that_are_like_no_prompt() -> None:
    assert assess([IMAGE, text(" What is this?")], "text", CLASSIFIER).trained
    assert assess([IMAGE, text(" 这是什么？")], "text", CLASSIFIER).trained
    found = assess([IMAGE, text(" Who painted it, and when?")], "text", CLASSIFIER)
    assert not found.trained and "trained on '… What is this?'" in found.en


def test_the_words_of_a_chat_template_are_no_words_of_a_question() -> None:
    tasks = read_yaml(recipe_path("smol"))["tasks"]
    smol = trained("chat_image_classification").model_copy(update={"tasks": tasks})
    assert assess([IMAGE, text(" What is this?")], "text", smol).trained
    found = assess([IMAGE, text(" Who painted it?")], "text", smol)
    assert not found.trained and "trained on '… What is this?'" in found.en


def test_an_answer_to_any_words_must_be_sure() -> None:
    """Where a prompt has no words of its own, only the answer can tell."""
    free, question = (
        trained("question_answering", "word_translation"),
        [text("What is the capital of France?")],
    )
    assert assess(question, "text", free, MIN_CONFIDENCE).trained and assess(question, "text", free).trained
    found = assess(question, "text", free, 0.04)
    assert not found.trained and "probably not trained" in found.en and "4%" in found.en
    assert assess([text("zero in Chinese:")], "text", free, 0.04).trained, "its words were trained"


def test_a_model_of_embeddings_answers_nothing() -> None:
    assert "only embeddings" in assess([text("a")], "text", trained("image_text_retrieval")).en


def say(model: LoadedModel, question: Question, log: pytest.LogCaptureFixture) -> str:
    log.clear()
    answer_questions(model, [question], Decoding(text=Sampling(max_tokens=3)))
    return log.text


def test_a_note_is_logged_beside_the_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("openm6"), "propagate", True)
    image = tmp_path / "a.png"
    image.write_bytes(png())
    model = loaded(trained_tasks=(("image_classification", "digits"),))
    assert "not trained" not in say(model, Question(output="text", image=image), caplog)
    noted = say(model, Question(output="image", text="a cat"), caplog)
    assert "never trained to generate image from text, only text from image" in noted


def test_a_text_much_shorter_than_those_of_training() -> None:
    """A task without words of its own reads texts: a bare question is none of them, however sure the answer is."""
    description = trained("question_answering")
    known = [trained_task.model_copy(update={"words": (9, 20)}) for trained_task in description.trained_tasks]
    description = description.model_copy(update={"trained_tasks": known})
    found = assess([text("What is the capital of France?")], "text", description, 0.9)
    assert not found.trained and "has 6 words" in found.en and "9 to 20 words" in found.en
    read = text("The flag of Aruba. Capital: Oranjestad. Region: Caribbean. What is the capital?")
    assert assess([read], "text", description, 0.9).trained
    assert assess([text("seven")], "text", trained("question_answering"), 0.9).trained, (
        "lengths are unknown: nothing is said"
    )


def test_lengths_are_those_of_the_records() -> None:
    fewest, most = words_read(TASKS["question_answering"], demo_sources()["questions"]) or (0, 0)
    assert 8 <= fewest <= 12 and 12 <= most <= 40
    assert words_read(TASKS["question_answering"], demo_sources()["digits"]) is None
