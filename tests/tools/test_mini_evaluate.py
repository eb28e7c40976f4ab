"""The evaluation of the shipped model by other means: each on tiny data, and all rows with an untrained model."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image, ImageDraw

from openm6.core.errors import DataError
from openm6.models.description import TrainedTask
from openm6.train.run import read_recipe, recipe_path
from tests import small_model
from tools.mini import avatars, evaluate, networks, rows
from tools.mini.corpus import write_part
from tools.mini.networks import AvatarEvaluator, Design, SyllableEvaluator
from tools.mini.pretrained import EfficientNetLite0, spoken_words
from tools.mini.references import CharacterModel, boosted_values, seasonal_naive
from tools.mini.speech import TEST_VOICES

COLOURS = {"red": (200, 30, 30), "blue": (40, 60, 200)}
RATE = 16_000


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def flac(samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="FLAC")
    return file.getvalue()


def tone(pitch: float, rise: float = 0.0, seed: int = 0) -> bytes:
    time = np.arange(int(0.3 * RATE)) / RATE
    noise = 0.01 * np.random.default_rng(seed).standard_normal(len(time))
    return flac(0.5 * np.sin(2 * np.pi * (pitch + rise * time) * time) + noise)


def avatar(number: int, split: str) -> dict:
    """A face with a coloured shirt, with or without glasses, and its caption in the words of the corpus."""
    shirt, glasses = list(COLOURS)[number % 2], number // 2 % 2
    image = Image.new("RGB", (64, 64), "white")
    drawing = ImageDraw.Draw(image)
    drawing.rectangle((10, 44, 54, 63), fill=COLOURS[shirt])
    if glasses:
        drawing.rectangle((16 + number % 3, 20, 48, 26), fill="black")
    found = {"mood": ("happy", "开心"), "hair": ("long", "长发"), "hair colour": ("brown", "棕色")}
    found |= {"skin": ("tan", "棕褐色"), "shirt": (shirt, {"red": "红色", "blue": "蓝色"}[shirt])}
    found |= {"glasses": ("glasses", "眼镜")} if glasses else {}
    english, chinese = avatars.caption(avatars.FAMILIES["pixel-art"], found)
    categories = {"style": "pixel art"} | {name: words[0] for name, words in found.items()}
    words = {"text_en": english, "text_zh": chinese, "categories": categories}
    return {"id": f"avatar/{split}/{number}", "split": split, "image": png(image), **words}


LABELS = {"dot": "点", "ball": "球", "moon": "月"}


def icon(label: str, style: str) -> dict:
    """A disc whose size depends on the concept; the thin moon is only tested."""
    image = Image.new("RGB", (64, 64), "white")
    size = 10 + 6 * list(LABELS).index(label)
    box = (32 - size, 32 - size, 32 + size, 32 + size)
    ImageDraw.Draw(image).ellipse(box, fill=None if style == "thin" else "black", outline="black")
    split = "test" if (label, style) == ("moon", "thin") else "train"
    words = {"label": label, "label_zh": LABELS[label], "text_en": f"{label}, {style}", "tags_en": ["round thing"]}
    extra = {"style_en": style, "style_zh": style}
    return {"id": f"{style}/{label}", "split": split, "image": png(image), **words, "extra": extra}


def spoken(kind: str, voice: str, language: str, label: str, pitch: float) -> dict:
    """A recording; `kind` is that of its id."""
    split = "test" if voice in TEST_VOICES else "train"
    extra = {"voice": voice} | ({"spoken_language": language} if kind == "word" else {})
    words = {"label": label, "label_zh": label, "extra": extra}
    return {"id": f"{kind}/{voice}/{language}/{label}", "split": split, "audio": tone(pitch), **words}


def note(split: str, key: int) -> dict:
    numbers = {"pitch": float(key)}
    words = {"label": "flute", "label_zh": "长笛", "numbers": numbers}
    return {"id": f"instrument/{key}/{split}", "split": split, "audio": tone(20 * key), **words}


def fact(part: str, number: int) -> dict:
    extra = {"ask_en": f"What is the capital of land {number}?", "reply_en": f"Town {number}"}
    return {"id": f"fact/{part}/{number}", "split": "test" if number < 2 else "train", "extra": extra}


def series(name: str, days: int) -> list[dict]:
    times = (np.datetime64("2000-01-01") + days * np.arange(500)).astype(str)
    values = 5 + np.sin(np.arange(500) * 2 * np.pi / 12)
    return [
        {"id": f"{name}/{number}", "split": "train", "name": name, "time": time, name: float(value)}
        for number, (time, value) in enumerate(zip(times, values, strict=True))
    ]


def part_rows() -> dict[str, list[dict]]:
    """A few records of each part that the rows read."""
    both = [(split, number) for split, count in (("train", 8), ("test", 4)) for number in range(count)]
    pairs = [("明月松间照", "清泉石上流"), ("野旷天低树", "江清月近人"), ("白日依山尽", "黄河入海流")]
    found = {
        "avatars": [avatar(number, split) for split, number in both],
        "icons": [icon(label, style) for label in LABELS for style in ("thin", "bold")],
        "syllables": [
            spoken("syllable", voice, "zh", label, pitch)
            for voice in ("espeak-m1", "espeak-f4")
            for label, pitch in (("ma1", 300), ("ba3", 900))
        ],
        "words": [
            spoken("word", voice, language, label, 500)
            for voice in ("flite-slt", "flite-rms")
            for language in ("en", "zh")
            for label in ("robot", "mango")
        ],
        "said_words": [
            spoken("word", voice, "en", label, 500)
            for voice in ("flite-slt", "flite-rms")
            for label in ("robot", "mango")
        ],
        "instruments": [note(split, 40 + number) for split, number in both],
        "diamonds": [
            {"id": f"diamond/{split}/{number}", "split": split, "categories": {"cut": "Ideal"},
             "numbers": {"price": 100.0 * number, "carat": 0.1 * number}}
            for split, number in both
        ],
        "couplets": [
            {"id": f"couplet/{number}", "split": "test" if number == 2 else "train", "question": upper, "answer": lower,
             "text_zh": f"{upper}，{lower}。"}
            for number, (upper, lower) in enumerate(pairs)
        ],
        "kinship": [
            {"id": f"kinship/{split}/{number}", "split": split, "question": "妈妈的哥哥叫什么？", "answer": "大舅"}
            for split, number in both
        ],
        "countries": [fact("countries", number) for number in range(6)],
        "elements": [fact("elements", number) for number in range(6)],
        "monthly": series("monthly", 31),
        "daily": series("daily", 1),
    }  # fmt: skip
    other = {part: [{**one, "id": f"{part}/{one['id']}"} for one in found["icons"]] for part in ("emoji", "things")}
    return found | other


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for part, own in part_rows().items():
        write_part(({"source": "made up", "license": "CC0-1.0", **row} for row in own), folder / f"{part}.parquet")
    return folder


@pytest.fixture
def evaluation(corpus, tmp_path, monkeypatch) -> rows.Evaluation:
    """An untrained model that has the tasks of mini, with the published networks replaced by simple functions."""
    _, values = read_recipe(recipe_path("mini"), [])
    loaded = small_model.loaded()
    scales = loaded.description.scales | {"pitch": (60.0, 10.0), "carat": (0.5, 0.2)}
    trained = [TrainedTask(task=one["task"], source=one["source"]) for one in values["mixture"]]
    description = loaded.description.model_copy(update={
        "trained_tasks": trained, "tasks": values["tasks"], "scales": scales, "eval": {"decoding": {"steps": 2}},
    })  # fmt: skip
    monkeypatch.setitem(loaded.numbers.scales, "pitch", (60.0, 10.0))
    monkeypatch.setitem(loaded.numbers.scales, "carat", (0.5, 0.2))
    for column in ("monthly", "daily"):
        monkeypatch.setitem(loaded.numbers.scales, column, (5.0, 1.0))
    found = rows.Evaluation(replace(loaded, description=description), corpus, tmp_path, 2)
    found.__dict__["features"] = lambda images: np.random.default_rng(0).standard_normal((len(images), 8))
    found.__dict__["words"] = lambda clips: ["robot"] * len(clips)
    return found


def test_each_row_has_a_value_interval_goal_and_number(evaluation):
    lines: list[str] = []
    found = evaluate.evaluate_rows(evaluation, evaluate.ROWS, lambda line, _: lines.append(line))
    assert list(found) == list(evaluate.ROWS) and len(lines) == len(evaluate.ROWS) == 18
    assert not {name: row["failure"] for name, row in found.items() if "failure" in row}
    for row in found.values():
        low, high = row["interval"]
        assert math.isfinite(row["value"]) and row["n"] >= 1
        assert low <= row["value"] <= high or (row["n"] == 1 and math.isnan(low)), "one record has no interval"
        assert set(row["goal"]) == {"low", "high"} and isinstance(row["reached"], bool)
    measured = ("avatars-drawn", "icons-drawn", "syllables-spoken", "words-spoken", "diamonds-price")
    assert all((found[name]["ceiling"] is not None) == (name in measured) for name in found)
    json.dumps(found)


def test_a_row_without_its_part_or_task_states_the_reason(evaluation, tmp_path):
    evaluation.corpus = tmp_path
    lines: list[str] = []
    found = evaluate.evaluate_rows(evaluation, ["kinship"], lambda line, _: lines.append(line))
    assert "kinship.parquet" in found["kinship"]["failure"] and "kinship.parquet" in lines[0]
    with pytest.raises(DataError, match="not trained on image_tagging_of_nothing"):
        evaluation.examples("image_tagging_of_nothing", [])


def test_each_row_is_written_as_it_is_ready(tmp_path, monkeypatch):
    def failing(run):
        raise RuntimeError("no memory")

    first = evaluate.Row("first", "a test", 0.5, lambda run: rows.Evaluated(0.75, (0.7, 0.8), 4))
    monkeypatch.setattr(evaluate, "ROWS", {"first": first, "second": replace(first, evaluate=failing)})
    monkeypatch.setattr(evaluate, "find_model", Path)
    monkeypatch.setattr(evaluate, "load", lambda *_: small_model.loaded())
    monkeypatch.setattr(evaluate, "Packages", lambda _: SimpleNamespace(import_requirements=lambda: None))
    path = tmp_path / "rows.json"
    with pytest.raises(RuntimeError, match="no memory"):
        evaluate.main(["mini", "--corpus", str(tmp_path), "--json", str(path)])
    assert list(json.loads(path.read_text())["rows"]) == ["first"]


def test_degenerate_couplets_and_empty_descriptions_are_no_success(evaluation, monkeypatch):
    def ask(task_name, records):
        pairs = rows.Evaluation.examples(evaluation, task_name, records)
        return [rows.Asked(record, example, "") for record, example in pairs]

    monkeypatch.setattr(evaluation, "ask", ask)
    monkeypatch.setattr(rows, "generate_texts", lambda loaded, prompts, sampling: ["天天天天天"] * len(prompts))
    found = rows.couplet_form(evaluation)
    assert found.value == 0 and found.details["length"] == 1 and found.details["different lines"] == 1
    described = rows.avatars_described(evaluation)
    assert described.value == described.details["empty text"] < 0.5
    assert described.details["mood"] == 0 < described.details["glasses"]
    monkeypatch.setattr(rows, "generate_texts", lambda loaded, prompts, sampling: ["星垂平野阔"] * len(prompts))
    assert rows.couplet_form(evaluation).value == 1


def test_ranges_of_goals():
    assert evaluate.ROWS["avatars-drawn"].reached(0.93) and not evaluate.ROWS["avatars-drawn"].reached(0.92)
    coverage = evaluate.ROWS["diamonds-coverage"]
    assert [coverage.reached(value) for value in (0.74, 0.8, 0.9)] == [False, True, False]
    assert not evaluate.ROWS["couplets-likelihood"].reached(0.0) and evaluate.ROWS["couplets-likelihood"].reached(0.1)
    assert coverage.goal == "75.0 % to 85.0 %" and evaluate.ROWS["couplets-likelihood"].goal == "> 0"


class Few:
    """Records as a source."""

    def __init__(self, records: list[dict]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        return self.records[index]

    def values(self, key: str) -> list:
        return [record.get(key) for record in self.records]


def test_attributes_of_avatars_are_learned_and_kept_in_the_cache(tmp_path):
    train = Few([avatar(number, "train") for number in range(256)])
    (tmp_path / "avatars.parquet").write_bytes(b"data")
    design = Design(3, (8, 16), (4, 4), (1, 1), 4.0, 6)
    found = AvatarEvaluator.of(train, tmp_path / "avatars.parquet", tmp_path / "cache", design)
    tested = [avatar(number, "test") for number in range(300, 316)]
    compared = found.compare([one["image"] for one in tested], tested)
    assert networks.attribute_rates(compared)["shirt"] == 1 and networks.attribute_rates(compared)["glasses"] > 0.9
    assert set(compared[0]) == {"mood", "hair", "hair colour", "skin", "shirt", "glasses"}
    wrong = [{**one, "categories": one["categories"] | {"shirt": "green"}} for one in tested]
    assert networks.attribute_rates(found.compare([one["image"] for one in wrong], wrong))["shirt"] == 0
    (file,) = (tmp_path / "cache").iterdir()
    stamp = file.stat().st_mtime_ns
    again = AvatarEvaluator.of(train, tmp_path / "avatars.parquet", tmp_path / "cache", design)
    assert again.compare([one["image"] for one in tested], tested) == compared and file.stat().st_mtime_ns == stamp


def test_syllables_are_learned_with_their_tones(tmp_path):
    spoken = {"ma1": (250, 0), "ma2": (250, 900), "ba1": (900, 0), "ba2": (900, 900)}
    train = Few([{"label": label, "audio": tone(pitch * (1 + 0.01 * (seed % 5)), rise, seed)}
                 for seed in range(32) for label, (pitch, rise) in spoken.items()])  # fmt: skip
    (tmp_path / "syllables.parquet").write_bytes(b"data")
    design = Design(1, (8, 16), (8, 6), (1, 3), 0.1, 10)
    found = SyllableEvaluator.of(train, tmp_path / "syllables.parquet", tmp_path / "cache", design)
    clips = {label: tone(pitch * 1.02, rise, 99) for label, (pitch, rise) in spoken.items()}
    assert found.transcribe(list(clips.values())) == list(clips)
    # Silence before and behind, as generated recordings have it, changes nothing.
    samples, _ = soundfile.read(io.BytesIO(clips["ba2"]), dtype="float32")
    assert found.transcribe([np.concatenate([np.zeros(3000), samples, np.zeros(9000)])]) == ["ba2"]


def test_published_weights_fit_the_layers_and_features_tell_images_apart():
    torch.manual_seed(0)
    weights = {re.sub(r"(^|\.)(?=[a-z])(?!\w+$)", r"\1_", name): tensor
               for name, tensor in EfficientNetLite0().state_dict().items()}  # fmt: skip
    assert "_blocks.0._depthwise_conv.weight" in weights and "_bn0.running_mean" in weights
    network = EfficientNetLite0.of(weights)
    assert sum(parameter.numel() for parameter in network.parameters()) == 4_652_008
    # Larger than the first weights, which let signals fade.
    network.load_state_dict({k: 2.45 * w if w.dim() == 4 else w for k, w in network.state_dict().items()})
    images = [Image.new("RGB", (64, 64), colour) for colour in ("white", "black", "red")]
    found = network.features(images, side=32)
    assert found.shape == (3, 1280) and not np.allclose(found[0], found[1])
    assert [rows.nearest(own, found) for own in found] == [0, 1, 2]


def test_captions_are_read_back():
    records = [avatar(number, "train") for number in range(4)]
    captions = {side: [record[f"text_{side}"] for record in records] for side in ("en", "zh")}
    categories = [record["categories"] for record in records]
    phrases = rows.caption_phrases(captions, categories)
    for side, texts in captions.items():
        for text, true in zip(texts, categories, strict=True):
            assert rows.read_caption(text, phrases[side, "pixel art"]) == true
    wrong = rows.read_caption(captions["en"][0].replace("red", "blue"), phrases["en", "pixel art"])
    attributes = networks.attributes_by_style(categories)
    compared = networks.compare_attributes(wrong, categories[0], attributes)
    assert [name for name, right in compared.items() if not right] == ["shirt"]
    assert not any(networks.compare_attributes({}, categories[3], attributes).values())


def test_characters_have_probabilities_that_add_up_to_one():
    model = CharacterModel(["床前明月光。", "床前看月光。", "低头思故乡。"])
    characters = list("床前明月光看低头思故乡。")
    whole = sum(model.probability(one, "床前") for one in [*characters, "x"])
    assert whole == pytest.approx(1)
    assert model.bits("月光。", "床前明") < model.bits("故乡。", "床前明") < model.bits("xyz", "床前明")
    assert model.probability("明", "床前") > model.probability("月", "床前")


def test_the_last_season_comes_again_with_its_errors():
    past = np.tile([1.0, 2.0, 3.0], 6)
    assert seasonal_naive(past, 5, 3, [0.1, 0.5, 0.9])[:, 1].tolist() == [1, 2, 3, 1, 2]
    rising = np.arange(18.0)
    assert seasonal_naive(rising, 4, 3, [0.5])[:, 0].tolist() == [18, 19, 20, 21]
    assert seasonal_naive(np.array([2.0, 4.0]), 3, 12, [0.5])[:, 0].shape == (3,)
    cuts = [{"cut": "ab"[number % 2]} for number in range(200)]
    train = [{"numbers": {"price": 10.0 * n, "carat": float(n)}, "categories": cut} for n, cut in enumerate(cuts)]
    assert np.abs(boosted_values(train, train[50:150], "price") - np.arange(500, 1500, 10)).max() < 60


def test_words_of_a_transcript():
    assert (
        spoken_words(" Robot.") == "robot" and spoken_words("2") == "two" and spoken_words("Ice-cream!") == "ice cream"
    )
