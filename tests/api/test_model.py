"""Loading and asking from Python: kinds of inputs and answers, batches, streams, and bad input in one sentence."""

from __future__ import annotations

import base64
import doctest
import io
import math
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import soundfile
import torch

import openm6
from openm6.api import model, values
from openm6.api.values import media_bytes
from openm6.core.errors import CheckpointError, ConfigError, OpenM6Error
from openm6.hub.find import find_model
from openm6.inference import question
from openm6.modalities.image import read_image
from tests.small_model import embedding_model

FAST: dict[str, Any] = {"num_inference_steps": 2}
IMPORT = (
    "import sys, time; t = time.process_time(); import openm6; print(time.process_time() - t, 'torch' in sys.modules)"
)


def test_the_import_is_cheap() -> None:
    """The bound is ten times what it takes here: what fails is an import of torch, pandas or pydantic."""
    found = [subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True).stdout for _ in range(3)]
    assert min(float(line.split()[0]) for line in found) < 0.15 and "True" not in "".join(found)


def test_public_names_are_there() -> None:
    assert all(getattr(openm6, name) is not None for name in openm6.__all__)
    assert set(openm6.__all__) <= set(dir(openm6))
    with pytest.raises(AttributeError, match="laod"):
        openm6.laod  # noqa: B018


@pytest.mark.parametrize("module", [model, values], ids=lambda module: module.__name__)
def test_examples_of_docstrings_run(module: ModuleType, m6: openm6.OpenM6, run: Path, files: Path) -> None:
    penguins = pd.DataFrame({"bill_length_mm": [40.0, 50.0], "flipper_length_mm": [190.0, 210.0]})
    days = pd.date_range("2024-01-01", periods=20)
    weather = pd.DataFrame({"item_id": "here", "timestamp": days, "temp_max": np.arange(20.0)})
    known = {"m6": m6, "run": run, "embedder": openm6.OpenM6(embedding_model())}
    known |= {"penguins": penguins, "weather": weather}
    results = [
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(found)
        for found in doctest.DocTestFinder(exclude_empty=False).find(module, extraglobs=known)
    ]
    assert sum(one.attempted for one in results) > 3 and not any(one.failed for one in results)


def test_examples_of_the_page_run(
    m6: openm6.OpenM6, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
    models = {"runs/demo": m6, "runs/embed": openm6.OpenM6(embedding_model())}
    monkeypatch.setattr("openm6.api.model.load", lambda path: models[path])
    monkeypatch.setattr("openm6.train.start.find_model", lambda name: run)
    monkeypatch.chdir(tmp_path)
    penguins = pd.DataFrame({"bill_length_mm": [40.0, 50.0] * 8, "flipper_length_mm": [190.0, 210.0] * 8})
    penguins = penguins.assign(body_mass_g=[4000.0, 5000.0] * 8, label=["Adelie", "Gentoo"] * 8)
    weather = pd.DataFrame({"timestamp": pd.date_range("2024-01-01", periods=20), "temp_max": np.arange(20.0)})
    known = {"penguins": penguins, "weather": weather.assign(item_id="here")}
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), known)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["published", "seven.png", "seven.wav"]


def test_public_methods_have_examples() -> None:
    methods = [name for name, one in vars(openm6.OpenM6).items() if callable(one) and not name.startswith("_")]
    without = [name for name in methods if ">>>" not in (getattr(openm6.OpenM6, name).__doc__ or "")]
    assert without == ["answer"], "which takes the settings of the command line"


def test_a_checkpoint_of_any_name_is_loaded(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copied"
    copy.mkdir()
    for file in (run / "checkpoints" / "step-2").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert openm6.load(copy, dtype=torch.bfloat16).loaded.omni.text.embedding.weight.dtype == torch.bfloat16


def test_a_model_on_the_hub_is_fetched(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *words, **named: asked.append((words, named)) or run
    )
    openm6.load("someone/model")
    openm6.load("someone/model@v1.0")
    openm6.OpenM6.from_pretrained("someone/model", revision="v1.0", token="secret", cache_dir="here")
    files = {"allow_patterns": ["*.json", "*.safetensors", "*.jinja", "README.md"], "ignore_patterns": "*consolidated*"}
    plain = {**files, "token": None, "cache_dir": None, "force_download": False, "local_files_only": False}
    own = {"revision": "v1.0", "token": "secret", "cache_dir": "here"}
    assert [named for _, named in asked] == [plain | one for one in ({"revision": None}, {"revision": "v1.0"}, own)]
    assert {words for words, _ in asked} == {("someone/model",)}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "no-such",
            "no model of this name in nohome/models: name a run.s folder, such as runs/demo, which openm6 demo trains",
        ),
        ("someone/nothing", "someone/nothing is neither a local path nor can it be downloaded"),
        (Path("nowhere"), "there is no run or checkpoint at nowhere"),
        ("/nowhere/run", "there is no run or checkpoint at /nowhere/run"),
        (5, "5 is neither a path nor the name of a model"),
        ("~nouser/x", "'~nouser/x' is neither a path nor the name of a model"),
    ],
)
def test_a_model_that_is_not_there(name: str | Path, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*words: Any, **named: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setenv("OPENM6_HOME", "nohome")
    with pytest.raises(CheckpointError, match=sentence):
        openm6.load(name)


def test_a_model_by_its_name(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mini").symlink_to(run)
    monkeypatch.setenv("OPENM6_HOME", str(tmp_path))
    assert openm6.load("mini").loaded.checkpoint.name == "step-2"
    with pytest.raises(CheckpointError, match="did you mean 'mini'"):
        openm6.load("mimi")


def test_names_are_looked_up_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder here, OPENM6_HOME, the home folder, then the models of the package."""
    places = [tmp_path / "home" / "models", tmp_path / ".openm6" / "models", tmp_path / "shipped"]
    for place in places:
        (place / "mini").mkdir(parents=True)
    monkeypatch.setenv("OPENM6_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("openm6.hub.find.SHIPPED", places[-1])
    monkeypatch.chdir(tmp_path)
    for place in places:
        assert find_model("mini") == place / "mini"
        (place / "mini").rmdir()
    (tmp_path / "mini").mkdir()
    assert find_model("mini") == Path("mini")


def test_every_kind_of_image_is_the_same_question(m6: openm6.OpenM6, files: Path) -> None:
    image = PIL.Image.open("seven.png").convert("RGB")
    kinds = ["seven.png", Path("seven.png"), (files / "seven.png").read_bytes(), image, np.asarray(image)]
    answers = m6.generate(image=kinds, max_new_tokens=4)
    assert len(answers) == 5 and len(set(answers)) == 1
    assert m6.generate(image=image, max_new_tokens=4) == answers[0]


def test_a_photo_is_the_same_as_a_file_and_in_memory() -> None:
    turned, printed = io.BytesIO(), io.BytesIO()
    image = PIL.Image.effect_noise((40, 20), 90).convert("RGB")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(turned, "JPEG", exif=exif)
    image.convert("CMYK").save(printed, "JPEG")
    for file in (turned, printed):
        whole, opened = read_image(file.getvalue()), PIL.Image.open(file)
        again = read_image(media_bytes(opened, "image"))
        assert again.size == whole.size and np.array_equal(np.asarray(again), np.asarray(whole))


def test_every_kind_of_audio_is_the_same_question(m6: openm6.OpenM6, files: Path) -> None:
    samples, rate = soundfile.read("zero.wav")
    clip = openm6.Audio(samples, rate)
    answers = m6.generate(audio=["zero.wav", clip, {"array": samples, "sampling_rate": rate}], max_new_tokens=4)
    assert len(set(answers)) == 1


def test_a_batch_is_as_one_after_the_other(m6: openm6.OpenM6) -> None:
    words = ["draw the digit seven", "say zero"]
    assert m6.generate(words, max_new_tokens=6) == [m6.generate(word, max_new_tokens=6) for word in words]
    first, second = m6.generate([words[0]] * 2, output="image", seed=3, **FAST)
    assert np.array_equal(first, m6.generate(words[0], output="image", seed=3, **FAST))
    assert np.array_equal(second, m6.generate(words[0], output="image", seed=4, **FAST))
    assert m6.generate([]) == []


def test_numbers(m6: openm6.OpenM6) -> None:
    rows = [{"bill_length_mm": 40.0, "body_mass_g": None}, {"bill_length_mm": 50.0, "body_mass_g": None}]
    first, second = m6.generate(numbers=rows, output="numbers")
    assert first.name == "body_mass_g" and isinstance(first.mean, float) and first.median != second.median
    low, high = first.interval(0.5)
    assert low < first.median < high and "body_mass_g" in repr(first)
    ahead = m6.generate(series={"body_mass_g": [4000, None, 4200]}, output="numbers", prediction_length=11)
    assert ahead.mean.shape == ahead.quantile(0.9).shape == (11,)


def test_a_streamed_text_is_the_text(m6: openm6.OpenM6) -> None:
    chat = [{"role": "user", "content": "draw the digit seven"}]
    whole = m6.chat(chat, max_new_tokens=12, temperature=1.0, seed=2)
    assert "".join(m6.chat(chat, max_new_tokens=12, temperature=1.0, seed=2, stream=True)) == whole
    assert "".join(m6.generate(chat[0]["content"], max_new_tokens=12, temperature=1.0, seed=2, stream=True)) == whole


def test_a_streamed_class_is_the_class(m6: openm6.OpenM6, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(question, "_class_of", lambda *_: "Adelie")
    row = {"bill_length_mm": 40.0}
    assert list(m6.generate(numbers=row, stream=True)) == [m6.generate(numbers=row)] == ["Adelie"]


def test_a_streamed_text_has_the_same_note(m6: openm6.OpenM6, caplog: pytest.LogCaptureFixture) -> None:
    notes = []
    for stream in (False, True):
        caplog.clear()
        list(m6.generate("sing me quite another song", max_new_tokens=4, stream=stream))
        notes.append([record.message for record in caplog.records])
    assert notes[0] == notes[1] and "not trained" in notes[0][0]


def test_parts_of_a_chat_in_all_forms(m6: openm6.OpenM6, files: Path) -> None:
    data = base64.b64encode((files / "seven.png").read_bytes()).decode()
    sound = base64.b64encode((files / "zero.wav").read_bytes()).decode()
    forms = [
        {"type": "image", "path": "seven.png"},
        {"type": "image", "image": PIL.Image.open("seven.png")},
        {"type": "image", "url": f"data:image/png;base64,{data}"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
    ]
    chats = [[{"role": "user", "content": [form, {"type": "text", "text": "What is this?"}]}] for form in forms]
    assert len(set(m6.chat(chats, max_new_tokens=4))) == 1
    spoken = [{"type": "audio", "path": "zero.wav"}, {"type": "input_audio", "input_audio": {"data": sound}}]
    assert len(set(m6.chat([[{"role": "user", "content": [form]}] for form in spoken], max_new_tokens=4))) == 1
    row = {"type": "numbers", "numbers": {"body_mass_g": 4000}}
    past = {"type": "numbers", "series": {"name": "body_mass_g", "values": [1.0, None]}}
    assert m6.chat([{"role": "user", "content": [row, past]}], "image", **FAST).size == (64, 64)


def test_candidates_are_ranked(m6: openm6.OpenM6) -> None:
    found = m6.rank("draw the digit", ["seven", "a long text of many words"], normalize=False)
    assert [one.log_likelihood for one in found] == sorted((one.score for one in found), reverse=True)
    assert found[0].candidate == "seven" and found[0].index == 0
    assert m6.rank("draw the digit", np.array(["seven", "nine"]))


def test_embeddings_of_what_belongs_together(files: Path) -> None:
    embedder = openm6.OpenM6(embedding_model())
    assert embedder.embed(image="seven.png").shape == (16,)
    both = embedder.embed(["red", "blue"], image="seven.png", numbers={"price": 3.0})
    np.testing.assert_allclose(np.linalg.norm(both, axis=1), 1, rtol=1e-5)


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def weight(m6: openm6.OpenM6) -> openm6.Distribution:
    return m6.generate(numbers={"body_mass_g": None, "bill_length_mm": 40}, output="numbers")


BAD = {
    "no such output": (lambda m6: m6.generate("x", output="video"), "'video' is not one of text, image"),
    "nothing": (lambda m6: m6.generate(), "nothing is given"),
    "no file": (lambda m6: m6.generate(image="nowhere.png"), "no file at nowhere.png"),
    "zero bytes": (lambda m6: m6.generate(image=b""), "the image is broken"),
    "an empty file": (lambda m6: m6.generate(image="empty.png"), "empty.png: the image is broken"),
    "a number as an image": (lambda m6: m6.generate(image=7), "int is no image"),
    "an image of floats": (lambda m6: m6.generate(image=np.zeros((8, 8))), "an array H W 3 of uint8"),
    "a Pillow image of floats": (
        lambda m6: m6.generate(image=PIL.Image.fromarray(np.zeros((8, 8), np.float32))), "floating-point numbers",
    ),
    "an array of text": (lambda m6: m6.generate(audio=np.zeros(3)), "ndarray is no audio"),
    "lists of two lengths": (lambda m6: m6.generate(["a", "b"], image=["x"]), "there are 2 of prompt, 1 of image"),
    "a bad setting": (lambda m6: m6.generate("x", top_p=2), "text.top_p: Input should be less than or equal to 1"),
    "a stream of images": (lambda m6: m6.generate("x", output="image", stream=True), "stream=True is for one answer"),
    "a series without name": (lambda m6: m6.generate(series=[[1, 2]], output="numbers"), "given as its name"),
    "an unknown column": (lambda m6: m6.generate(numbers={"mass": 1.0}), "has no column 'mass'"),
    "a quantile": (lambda m6: weight(m6).quantile(2), "between 0 and 1"),
    "a role": (lambda m6: m6.chat([{"role": "wizard", "content": "x"}]), "message 0 needs a role"),
    "an empty chat": (lambda m6: m6.chat([]), "the chat is empty"),
    "content of numbers": (lambda m6: m6.chat([{"role": "user", "content": 3}]), "the content of message 0"),
    "a video": (lambda m6: m6.chat(user({"type": "video", "path": "x"})), "part 0 of message 0 is not understood"),
    "a web page": (lambda m6: m6.chat(user({"type": "image", "url": "https://x"})), "nothing is fetched"),
    "broken base64": (lambda m6: m6.chat(user({"type": "input_audio", "input_audio": "?"})), "not valid base64"),
    "no image": (lambda m6: m6.chat(user({"type": "image_url"})), "part 0 of message 0 is not understood"),
    "a list as a type": (lambda m6: m6.chat(user({"type": ["text"]})), "part 0 of message 0 is not understood"),
    "a message as a chat": (lambda m6: m6.chat(user()[0]), "message 0 needs a role"),
    "a number as a series": (lambda m6: m6.generate(series={"a": 5}, output="numbers"), "the series 'a' holds int"),
    "no steps": (lambda m6: m6.generate(series={"a": [5]}, output="numbers", prediction_length=0), "0 steps cannot"),
    "numbers without names": (lambda m6: m6.generate(numbers=(1, 2), output="numbers"), "not tuple"),
    "a number as a text": (lambda m6: m6.generate(3), "a text is expected, not int"),
    "a zero byte": (lambda m6: m6.generate(image="a\0b"), "null byte"),
    "half a box": (
        lambda m6: m6.generate(image="seven.png", output="image", mask_box=(0, 0, 1)), "must be 4 fractions",
    ),
    "a chat of numbers": (lambda m6: m6.chat(user(), output="numbers"), "a chat answers with text, image or audio"),
    "no embeddings": (lambda m6: m6.embed("x"), "this model makes no embeddings"),
    "no candidates": (lambda m6: m6.rank("x", []), "candidates must be a list"),
    "a number as candidates": (lambda m6: m6.rank("x", 5), "candidates must be a list"),
    "a number as a column of a chat": (
        lambda m6: m6.chat(user({"type": "numbers", "numbers": {1: 2.0}})), "has columns whose names are no texts"
    ),
    "an infinite temperature": (lambda m6: m6.generate("x", temperature=math.inf), "text.temperature: Input should"),
    "infinite guidance": (
        lambda m6: m6.generate("x", output="image", guidance_scale=math.inf), "masked.guidance: Input should"
    ),
    "an output in a list": (lambda m6: m6.generate("x", output=["text"]), r"\['text'\] is not one of"),
    "a seed beyond 64 bits": (lambda m6: m6.generate("x", seed=2**63), "text.seed: Input should be less"),
    "more tokens than fit": (lambda m6: m6.generate("x", max_new_tokens=10**12), "text.max_tokens: Input"),
    "a list as a number": (lambda m6: m6.generate(numbers={"a": [1]}, output="numbers"), r"not {'a': \[1\]}"),
    "a number as a column": (lambda m6: m6.generate(numbers={1: 2}, output="numbers"), "not {1: 2}"),
    "a text as a box": (lambda m6: m6.generate(image="seven.png", output="image", mask_box="abcd"), "4 fractions"),
    "a number as a box": (lambda m6: m6.generate(image="seven.png", output="image", mask_box=0.5), "4 fractions"),
    "a text as a length": (
        lambda m6: m6.generate(series={"a": [5]}, output="numbers", prediction_length="x"), "'x' steps cannot",
    ),
    "no chat": (lambda m6: m6.chat(None), "a chat is a list of messages, not NoneType"),
    "a quantile of letters": (lambda m6: weight(m6).quantile("a"), "between 0 and 1"),
    "an address": (lambda m6: m6.generate(image="http://x/y.png"), "is an address, and nothing is fetched"),
    "a clip of letters": (lambda m6: openm6.Audio(np.array(["a"])).save("x.wav"), "the audio cannot be written"),
    "no layers": (lambda m6: openm6.load(m6.loaded.checkpoint, num_gpu_layers=-1), "num_gpu_layers=-1 is negative"),
    "a clip as MP4": (lambda m6: openm6.Audio(np.zeros(3)).save("x.mp4"), "use .wav, .flac or .ogg"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case: str, m6: openm6.OpenM6, files: Path) -> None:
    call, sentence = BAD[case]
    with pytest.raises(OpenM6Error, match=sentence) as caught:
        call(m6)
    assert "\n" not in str(caught.value)
    assert not list(files.glob("x.*"))


def test_no_such_dtype(run: Path) -> None:
    with pytest.raises(ConfigError, match="no dtype is called 'fp64'"):
        openm6.load(run, dtype="fp64")
