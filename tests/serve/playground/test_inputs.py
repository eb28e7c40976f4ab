"""Every scenario has its inputs on the page, filled with its example, and they are read back as they were."""

from __future__ import annotations

import pytest

pytest.importorskip("gradio", reason="the extra [serve] is not installed")

import io
from pathlib import Path
from typing import Any

import gradio
from gradio.data_classes import ImageData

from openm6.core.errors import DataError
from openm6.serve.config import Limits
from openm6.serve.errors import BadRequestError
from openm6.serve.playground import page
from openm6.serve.playground.page import (
    ImageInput,
    make_inputs,
    read_typed,
    uploaded,
    values_in,
    write_typed,
)
from openm6.serve.scenarios.run import example_values
from openm6.serve.scenarios.scenario import LANGUAGES, Scenario, read_library
from tests.data.sample_images import png, wav

ALL = read_library().scenarios.values()


@pytest.mark.parametrize("scenario", ALL, ids=lambda scenario: scenario.name)
def test_the_example_goes_in_and_comes_back(scenario: Scenario) -> None:
    for language in LANGUAGES:
        with gradio.Blocks():
            components = make_inputs(scenario, language, example_values(scenario, language))
        values = [component.value for component in components]
        contents = tuple(value["path"] if isinstance(value, dict) else value for value in values)
        found, given = values_in(scenario, contents, Limits()), example_values(scenario, language)
        assert set(found) == set(given)
        for name, value in given.items():
            if isinstance(value, bytes):
                assert isinstance(found[name], bytes) and io.BytesIO(found[name]).read(4)
            else:
                assert found[name] == value


def test_without_an_example_inputs_are_empty() -> None:
    kinds: set[str] = set()
    with gradio.Blocks():
        for scenario in ALL:
            if not {given.kind for given in scenario.inputs.values()} <= kinds:
                kinds |= {given.kind for given in scenario.inputs.values()}
                assert all(not component.value for component in make_inputs(scenario, "en", {}))


def test_what_was_uploaded_broken_or_too_large_is_one_sentence_in_the_pages_language(tmp_path: Path) -> None:
    path = tmp_path / "upload"
    limits = Limits(pixels=1000, audio_seconds=1.0)
    for kind, data in (
        ("image", b"no"),
        ("image", png("red", 40)),
        ("audio", b"RIFF"),
        ("audio", wav(seconds=2)),
    ):
        path.write_bytes(data)
        for language, word in (("en", "save it again"), ("zh", "另存为")):
            with pytest.raises(DataError, match=word) as caught:
                uploaded(kind, str(path), limits, language)  # type: ignore[arg-type]
            assert str(tmp_path) not in str(caught.value) and ("1,000" if kind == "image" else "1 ") in str(
                caught.value
            )
    path.write_bytes(png("red", 20))
    assert uploaded("image", str(path), limits, "en") == png("red", 20)


def test_a_long_text_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "read_typed", lambda kind, text: pytest.fail("it was parsed"))
    for kind, line in (("numbers", "a = May 2024\n"), ("series", "1,"), ("candidates", "a\n")):
        scenario = next(one for one in ALL if one.kind_of(kind))
        contents = [line * 20_000 if given.kind == kind else None for given in scenario.inputs.values()]
        with pytest.raises(BadRequestError, match="20,000"):
            values_in(scenario, tuple(contents), Limits())


def test_an_image_is_passed_on_unread_also_when_its_label_has_changed(tmp_path: Path) -> None:
    """Gradio creates a component again with every update; what it makes must not read the file either."""
    first = ImageInput(elem_id="free-image", label="Image")
    again = type(first)(**{**first.constructor_args, "label": "图片", "render": False})
    broken = tmp_path / "a.png"
    broken.write_bytes(b"no image")
    for made in (first, again):
        assert made.get_block_name() == "image"
        assert made.preprocess(ImageData(path=str(broken))) == str(broken)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("text", "seven"),
        ("numbers", {"mass": 3.5, "length": None, "digit": 7.0, "sold": "2024-01-03 10:30"}),
        ("numbers", {"people": 1234567.0, "year": 20240131.0, "share": 1013.2537, "temp:max": 3.5}),
        ("series", {"name": "price", "values": [3.5, None, 4.0]}),
        ("candidates", ["a cup", "一个杯子"]),
        ("box", [0.25, 0.0, 1.0, 0.5]),
        ("span", [0.2, 0.5]),
    ],
)
def test_what_is_shown_reads_back(kind: Any, value: Any) -> None:
    assert read_typed(kind, write_typed(kind, value)) == value


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("numbers", "mass: 3.5; length = ", {"mass": 3.5, "length": None}),
        ("numbers", "质量：3", {"质量": 3.0}),
        ("series", "1, 2，3", {"name": "value", "values": [1.0, 2.0, 3.0]}),
        ("candidates", "a\n\n b \n", ["a", "b"]),
        ("series", "p: nan, 3", {"name": "p", "values": [None, 3.0]}),
    ],
)
def test_it_is_read_as_people_write(kind: Any, text: str, value: Any) -> None:
    assert read_typed(kind, text) == value


@pytest.mark.parametrize(
    ("kind", "text"), [("numbers", "mass"), ("numbers", "mass = x"), ("series", "p: 1, b"), ("numbers", "mass = inf")]
)
def test_what_cannot_be_read_is_one_sentence(kind: Any, text: str) -> None:
    with pytest.raises(DataError) as caught:
        read_typed(kind, text)
    assert "\n" not in str(caught.value)
