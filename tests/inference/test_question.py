"""Questions: what fits together, what is refused, and the words in which they reach the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openm6.core.errors import ConfigError, DataError
from openm6.inference.question import (
    Question,
    answer_questions,
    parse_fractions,
    parse_numbers,
    parse_series,
    prompt_parts,
)
from openm6.inference.sampling import Decoding, Sampling
from openm6.modalities.interface import Part
from openm6.modalities.registry import MODALITIES
from openm6.modalities.series import NumberSeries
from openm6.tasks.registry import TASKS
from openm6.tasks.task import Task
from openm6.train.run import read_recipe, recipe_path
from tests.data.sample_images import png, wav
from tests.small_model import loaded

MODEL = loaded(
    trained_tasks=(
        ("image_classification", "digits"),
        ("image_inpainting", "digits"),
        ("image_regression", "digits"),
        ("tabular_classification", "penguins"),
        ("tabular_regression", "penguins"),
        ("time_series_forecasting", "weather"),
        ("audio_inpainting", "spoken"),
    )
)

DEMO = read_recipe(recipe_path("demo"), [])[0]
ASKED = sorted(
    {
        trained_task.task for trained_task in DEMO.mixture
        if len(TASKS[trained_task.task].inputs) == 1 and TASKS[trained_task.task].input_modality != "text"
    } - {"image_captioning", "image_categorization"}  # asked in the words of image_classification, which comes first
)  # fmt: skip
RECORD = {
    "image": png(), "audio": wav(), "label": "seven", "label_zh": "七",
    "numbers": {"mass": 1.0, "length": None}, "series": {"temp_max": [1.0, 2.0, 3.0]}, "extra": {"horizon": 1},
}  # fmt: skip


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    path.write_bytes(png())
    return path


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "a.wav"
    path.write_bytes(wav())
    return path


def shown(question: Question) -> list[Any]:
    """Texts as they are, everything else by the name of its modality."""
    parts = prompt_parts(question, MODEL)
    return [part.raw if part.modality == "text" else part.modality for part in parts]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"output": "video", "text": "x"}, "'video' is not one of text, image, audio, numbers"),
        ({"output": "text"}, "nothing is given"),
        ({"output": "text", "text": ""}, "nothing is given"),
        ({"output": "image", "text": "x", "mask_box": (0, 0, 1, 1)}, "a mask box fills in an image"),
        ({"output": "text", "image": Path("a"), "mask_box": (0, 0, 1, 1)}, "a mask box fills in an image"),
        ({"output": "audio", "text": "x", "mask_span": (0, 1)}, "a mask span fills in an audio clip"),
        ({"output": "image", "image": Path("a"), "mask_box": (0.5, 0, 0.5, 1)}, "each start below its end"),
        ({"output": "image", "image": Path("a"), "mask_box": (0, 0, 1, 1.5)}, "between 0 and 1"),
        ({"output": "audio", "audio": Path("a"), "mask_span": (-0.1, 0.5)}, "between 0 and 1"),
        ({"output": "audio", "audio": Path("a"), "mask_span": (0.6, 0.5)}, "each start below its end"),
    ],
)
def test_what_does_not_fit_together_is_one_sentence(asked: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        Question(**asked)
    assert "\n" not in str(caught.value)


def test_an_image_alone_is_asked_in_taught_words(image: Path) -> None:
    assert shown(Question(output="text", image=image)) == ["image", " What is this?"]


def test_a_persons_words_win(image: Path) -> None:
    assert shown(Question(output="text", image=image, text="How many?")) == ["image", " How many?"]
    assert shown(Question(output="image", text="draw the digit seven")) == ["draw the digit seven"]


def taught(task: Task, language: str) -> list[Any]:
    """The parts that a record of a task's training gives in a language, as `shown` gives them."""
    example = task.example(RECORD, np.random.default_rng(0), language=language)
    return [part.raw if part.modality == "text" else part.modality for part in example.source]


def asked(task: Task, language: str, image: Path, recording: Path) -> Question:
    """What a person gives and wants who would have a task done, without a word of how it was taught."""
    given: dict[str, Any] = {
        "image": {"image": image},
        "audio": {"audio": recording},
        "numbers": {"numbers": {"mass": 3.0, "length": 4.0}},
    }[task.input_modality]
    if "series" in task.inputs:
        given = {"series": NumberSeries("temp_max", [1.0, 2.0])}
    elif task.output_modality == "numbers":
        given |= {"column": "mass"}
    if task.is_inpainting:
        given |= {"mask_box": (0.0, 0.0, 0.5, 0.5)} if task.input_modality == "image" else {"mask_span": (0.0, 0.5)}
    return Question(output=task.output_modality, language=language, **given)


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("name", ASKED)
def test_the_question_put_in_is_the_one_that_was_taught(name: str, language: str, image: Path, recording: Path) -> None:
    model = loaded(trained_tasks=((name, "digits"),))
    parts = prompt_parts(asked(TASKS[name], language, image, recording), model)
    found = [part.raw if part.modality == "text" else part.modality for part in parts]
    assert found == taught(TASKS[name], language)
    assert any(isinstance(part.raw, str) for part in parts)


def test_the_demo_asks_for_all_that_it_gives() -> None:
    """Between them, the tasks above read and give all there is but texts, which a person words."""
    pairs = {(TASKS[name].input_modality, TASKS[name].output_modality) for name in ASKED}
    assert pairs == {(reads, gives) for reads in MODALITIES if reads != "text" for gives in MODALITIES}


@pytest.mark.parametrize(("language", "question"), [("en", " What is its mass?"), ("zh", " mass是多少？")])
def test_a_text_that_tells_of_something_is_asked_for_the_number(language: str, question: str) -> None:
    model = loaded(trained_tasks=(("text_regression", "penguins"),))
    told = Question(output="numbers", text="a stone", column="mass", language=language)
    assert [part.raw for part in prompt_parts(told, model)] == ["a stone" + question]
    own = Question(output="numbers", text="How much mass has a stone?", column="mass", language=language)
    assert [part.raw for part in prompt_parts(own, model)] == ["How much mass has a stone?"]


def test_a_hole_is_asked_for_as_in_training(image: Path) -> None:
    mask_box = (0.25, 0.25, 0.75, 0.75)
    parts = prompt_parts(Question(output="image", image=image, mask_box=mask_box), MODEL)
    assert parts == [Part("image", png(), {"mask_box": mask_box}), Part("text", " Fill in.", {"cuttable": ()})]


def test_a_gap_is_read_at_the_length_that_will_be_filled(recording: Path) -> None:
    """As in training: a share of the length must be the same stretch in what is read and what is wanted."""
    parts = prompt_parts(Question(output="audio", audio=recording, mask_span=(0.2, 0.5)), MODEL)
    assert parts[0].options == {"mask_span": (0.2, 0.5)}
    read = MODEL.audio.source(parts[0].raw, options=parts[0].options)
    assert len(read) * 0.08 == pytest.approx(MODEL.audio.seconds, abs=0.08)
    assert parts[1].raw == " Fill in."


def test_a_number_is_asked_for_by_name(image: Path) -> None:
    asked = Question(output="numbers", image=image, column="body_mass_g")
    assert shown(asked) == ["image", " What is the body mass g?"]


def test_the_missing_number_is_the_wanted_one() -> None:
    asked = Question(output="numbers", numbers={"bill_length_mm": 40.0, "body_mass_g": None})
    assert asked.target_column() == "body_mass_g"
    parts = prompt_parts(asked, MODEL)
    assert parts[0] == Part("numbers", {"bill_length_mm": 40.0})
    assert parts[1].raw == " What is its body mass g?"


def test_a_number_is_asked_in_the_words_of_a_task_over_whole_records() -> None:
    asked = Question(output="numbers", numbers={"bill_length_mm": 40.0, "body_mass_g": None})
    parts = prompt_parts(asked, loaded(trained_tasks=(("record_regression", "penguins"),)))
    assert parts[0].raw == {"bill_length_mm": 40.0} and parts[1].raw == " What is its body mass g?"


def test_a_target_column_is_never_an_input() -> None:
    numbers = {"bill_length_mm": 40.0, "body_mass_g": 4000.0}
    parts = prompt_parts(Question(output="numbers", numbers=numbers, column="body_mass_g"), MODEL)
    assert parts[0].raw == {"bill_length_mm": 40.0}


@pytest.mark.parametrize("numbers", [{"a": 1.0}, {"a": None, "b": None}])
def test_an_open_question_for_a_number_is_refused(numbers: dict[str, float | None]) -> None:
    with pytest.raises(ConfigError, match="the number to predict is not named: add --column"):
        prompt_parts(Question(output="numbers", numbers=numbers), MODEL)


def test_missing_numbers_are_told_as_missing_where_none_is_wanted() -> None:
    parts = prompt_parts(Question(output="text", numbers={"mass": None, "length": 3.0}), MODEL)
    assert parts[0].raw == {"mass": None, "length": 3.0} and parts[1].raw == " What is this?"


def test_a_series_is_asked_to_go_on() -> None:
    series = NumberSeries("temp_max", [1.0, None, 3.0])
    assert shown(Question(output="numbers", series=series)) == ["numbers", " What comes next?"]


def test_steps_may_be_numbers_of_numpy() -> None:
    series = NumberSeries("temp_max", [1.0, 2.0])
    question = Question(output="numbers", series=series, ahead=np.int64(4))  # type: ignore[arg-type]
    assert series.to_forecast(question.ahead).values == [1.0] * 4
    for ahead in (0, np.int64(-1), 2.0, "4"):
        with pytest.raises(ConfigError, match="steps cannot be forecast: ask for at least 1"):
            Question(output="numbers", series=series, ahead=ahead)  # type: ignore[arg-type]


def test_an_answer_draws_by_its_place_whatever_others_need_no_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [Question(output="text", text=f"draw {word}") for word in ("one", "two", "three", "four")]
    decoding = Decoding(text=Sampling(temperature=1.0, max_tokens=8, seed=3))
    drawn = answer_questions(MODEL, questions, decoding)
    named = {questions[0]: "zero", questions[2]: "two"}
    monkeypatch.setattr("openm6.inference.question._class_of", lambda question, *_: named.get(question))
    assert answer_questions(MODEL, questions, decoding) == ["zero", drawn[1], "two", drawn[3]]


def test_what_was_never_taught_is_asked_without_words(recording: Path, image: Path) -> None:
    assert shown(Question(output="image", audio=recording)) == ["audio"]
    assert shown(Question(output="text", audio=recording, image=image)) == ["image", "audio"]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file at .*nowhere.png: check the path"):
        prompt_parts(Question(output="text", image=tmp_path / "nowhere.png"), MODEL)
    with pytest.raises(DataError, match="cannot be read"):
        prompt_parts(Question(output="text", image=tmp_path), MODEL)


def test_shares_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        Question(output="image", image=Path("a"), mask_box=(float("nan"), 0.0, 1.0, 1.0))


def test_an_image_is_a_path_or_bytes(image: Path) -> None:
    asked = Question(output="text", image=str(image))
    parts = prompt_parts(asked, MODEL)
    assert parts == prompt_parts(Question(output="text", image=image), MODEL)
    assert parts == prompt_parts(Question(output="text", image=image.read_bytes()), MODEL)
    with pytest.raises(DataError, match="^the image is broken"):
        prompt_parts(Question(output="text", image=b""), MODEL)


def test_words_as_columns() -> None:
    assert parse_numbers("mass=3.5, length=,x=-1e3") == {"mass": 3.5, "length": None, "x": -1000.0}
    assert parse_numbers("day=2024-01-31, at=31.01.2024 10:00") == {"day": "2024-01-31", "at": "31.01.2024 10:00"}
    assert parse_numbers(None) is None


@pytest.mark.parametrize("words", ["a", "a=x", "a=31.02.2024", "=3", "a=1,,b=2", "a=nan", "a=inf", "a=-1e999", "a=1=2"])
def test_columns_that_are_none(words: str) -> None:
    with pytest.raises(ConfigError, match=r"^--numbers has '.*', which must look like name=3.5"):
        parse_numbers(words)


def test_words_as_shares() -> None:
    assert parse_fractions("0, 0.25,1,.5", 4, "--mask-box") == (0.0, 0.25, 1.0, 0.5)
    assert parse_fractions(None, 4, "--mask-box") is None
    for words in ("", "0,1", "a,b,c,d", "0,0,1,1,1"):
        with pytest.raises(ConfigError, match="must be 4 numbers"):
            parse_fractions(words, 4, "--mask-box")


def test_words_as_a_series() -> None:
    assert parse_series("t=1,,-2.5") == NumberSeries("t", [1.0, None, -2.5])
    assert parse_series(None) is None
    for words in ("t", "=1,2"):
        with pytest.raises(ConfigError, match="must look like temp_max="):
            parse_series(words)
    with pytest.raises(ConfigError, match="--series has 'a' as value 1"):
        parse_series("t=a,b")


@pytest.mark.parametrize("value", ["nan", "inf", "1e999"])
def test_a_series_holds_finite_numbers(value: str) -> None:
    with pytest.raises(ConfigError, match=f"--series has '{value}' as value 2, which must be a finite number"):
        parse_series(f"t=1,{value}")
