"""The report: complete, self-contained, bounded in size, and safe against markup in data."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from openm6.codecs.registry import codec_scores
from openm6.core.errors import OutputError
from openm6.evaluate.report import (
    MEDIA_BYTES,
    MediaBudget,
    _inputs,
    card,
    codec_rows,
    report_environment,
    report_html,
    report_json,
    sample_data,
    shorten,
    write_report,
)
from openm6.evaluate.results import EvalReport, Sample
from openm6.modalities.histogram import Histogram
from openm6.modalities.interface import Part
from openm6.modalities.text import MASK_CHARACTER
from tests.evaluate import example_report as example

VOID = {"meta", "img", "br", "hr"}


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, text, and whether every tag closes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.stack: list[str] = []
        self.feed(html)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] != "style":
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def classes(self) -> set[str]:
        return {name for _, attributes in self.elements for name in (attributes.get("class") or "").split()}


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Page:
    run = example.run_folder(tmp_path_factory.mktemp("run"))
    write_report(run, example.eval_report(), example.facts())
    return Page((run.path / "report.html").read_text(encoding="utf-8"))


def page_of(path: Path, report: EvalReport) -> Page:
    return Page(report_html(example.run_folder(path), report, example.facts()))


def test_data_cannot_become_markup(page: Page) -> None:
    names = {name for name, _ in page.elements}
    assert not names & {"script", "iframe", "object", "link", "form", "base"}
    assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on")]
    assert "".join(page.text).count("<script>alert('1')</script>") >= 8  # shown as text wherever it came from
    assert "\x00" not in "".join(page.text)


@given(st.text(alphabet=st.characters(exclude_categories=[]), max_size=100))
def test_text_is_escaped_once_and_reads_the_same(text: str) -> None:
    html_text = report_environment().from_string('<b title="{{ text }}">{{ text }}</b>').render(text=text)
    html_text.encode("utf-8")  # no lone surrogates, which no file could contain
    expected = re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", text)
    page = Page(html_text)
    assert page.elements == [("b", {"title": expected})]
    assert "".join(page.text) == expected


def test_long_text_is_shortened() -> None:
    assert shorten("x" * 900) == "x" * 259 + "…" and shorten("星" * 900) == "星" * 129 + "…"
    assert shorten("short") == "short"


def test_nothing_is_fetched(page: Page) -> None:
    addresses = [
        value for _, attributes in page.elements for key, value in attributes.items() if key in ("src", "href")
    ]
    assert addresses
    assert all(re.match(r"data:(image/png|audio/wav);base64,|#[a-z0-9-]+$", value or "") for value in addresses)
    policies = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policies and "default-src 'none'" in (policies[0] or "")


def test_the_style_sheet_fetches_nothing(tmp_path: Path) -> None:
    html = report_html(example.run_folder(tmp_path), example.eval_report(), example.facts())
    style = html.split("<style>")[1].split("</style>")[0]
    assert "prefers-color-scheme: dark" in style
    assert "url(" not in style and "@import" not in style


def test_every_link_leads_somewhere(page: Page) -> None:
    places = {attributes.get("id") for _, attributes in page.elements}
    links = {(attributes["href"] or "").removeprefix("#") for attributes in page.all("a")}
    assert len(links) >= 12
    assert links <= places


def test_summary_tells_size_tokens_and_time(page: Page) -> None:
    text = "".join(page.text)
    for said in (
        "5.12 million parameters",
        "2.03 million are active per token",
        "3.51 million tokens",
        "6.5 minutes",
        "Output modalities: text, image, audio and numbers",
    ):
        assert said in text
    assert "its information gain is significant in 6 of 8 tasks" in text
    assert "it beats the baseline, in score and in information, in 2 of 8" in text


def test_pairs_are_coloured_by_their_interval(page: Page) -> None:
    entries = [attributes["class"] for attributes in page.all("div") if "entry" in (attributes.get("class") or "")]
    assert sorted(entries) == ["entry negative", "entry none"] + ["entry positive"] * 6
    text = "".join(page.text)
    assert "+1.00 bits [+0.50, +1.50]" in text
    assert "−2.00 bits [−3.00, −1.00]" in text
    assert "Information gain" in text
    assert text.count("not trained") == 9  # eight results in seven of sixteen pairs


def test_images_are_shown_whole_and_large(page: Page) -> None:
    images = [image for image in page.all("img") if not (image["alt"] or "").startswith("spectrogram")]
    assert len(images) == 6  # given; drawn and real; given with its hole, drawn and real
    for image in images:
        content = base64.b64decode((image["src"] or "").removeprefix("data:image/png;base64,"))
        assert Image.open(io.BytesIO(content)).size in ((64, 64), (32, 32))
        assert int(image["width"] or 0) == int(image["height"] or 0) == 128
        assert image["class"] == "enlarged"


def test_masked_box_and_span_are_covered(page: Page) -> None:
    masks = [attributes["style"] for attributes in page.all("span") if attributes.get("class") == "mask"]
    assert masks == [
        "left:25.00%;top:50.00%;width:50.00%;height:50.00%",
        "left:25.00%;top:0.00%;width:25.00%;height:100.00%",
    ]


def test_audio_clips_can_be_played_and_the_gap_is_silent(page: Page) -> None:
    players = {player["aria-label"]: player["src"] or "" for player in page.all("audio")}
    assert len(page.all("audio")) == 5  # model and real; given, model and real
    content = base64.b64decode(players["input, 1.0 s"].removeprefix("data:audio/wav;base64,"))
    samples, rate = soundfile.read(io.BytesIO(content))
    assert (rate, len(samples)) == (
        16_000,
        16_000,
    )  # half a second of audio, padded to the second that was asked for
    assert np.abs(samples[:4000]).max() > 0.2
    assert np.abs(samples[4000:8000]).max() == 0


def test_the_gap_of_a_long_audio_clip_ends_with_its_picture(tmp_path: Path) -> None:
    """Only the first eight seconds are shown."""
    given = Part("audio", example.audio(12.0), {"mask_span": (0.5, 1.0)})
    task = example.result(
        "audio_inpainting", ("audio", "audio"), "bits_per_code",
        [Sample([given], example.audio(12.0), example.audio(12.0), "1")],
    )  # fmt: skip
    spans = page_of(tmp_path, EvalReport([task], 1.0, "x")).all("span")
    masks = [attributes["style"] for attributes in spans if attributes.get("class") == "mask"]
    assert masks == ["left:75.00%;top:0.00%;width:25.00%;height:100.00%"]


def test_numbers_show_median_interval_and_truth(page: Page) -> None:
    text = "".join(page.text)
    assert "10 (80 %: 7.44 to 12.6)" in text
    assert "10.5" in text and "inside" in text
    assert "3 of 3 steps inside the 80 % interval" in text
    assert {"shape", "interval", "median", "truth", "fan", "past"} <= page.classes()


def test_a_value_outside_its_interval_is_called_so(tmp_path: Path) -> None:
    given = [Part("text", "how much?")]
    task = example.result(
        "tabular_regression",
        ("text", "numbers"),
        "mae",
        [Sample(given, example.histogram(), {"price": 99.0}, "1")],
    )
    text = "".join(page_of(tmp_path, EvalReport([task], 1.0, "x")).text)
    assert "outside" in text and "inside" not in text


def test_dates_and_missing_values_among_the_inputs_are_shown() -> None:
    given = Part("numbers", {"sold": "2024-01-03", "size": 3.5, "price": None})
    shown = sample_data(Sample([given], "yes", None, "1"), MediaBudget(0))
    assert shown["inputs"][0]["columns"] == {"sold": "2024-01-03", "size": "3.5", "price": "missing"}


def test_a_gap_in_a_text_is_seen(tmp_path: Path) -> None:
    """Its own sign shows as nothing; nor does a truth that begins with a line break stand a line lower."""
    sample = Sample([Part("text", f"Restore: a {MASK_CHARACTER} cup")], "a red cup", "\na red cup", "r1")
    result = dataclasses.replace(example.eval_report().results[0], samples=[sample])
    html = report_html(example.run_folder(tmp_path), EvalReport([result], 1.0, "x"), example.facts())
    assert (
        "Restore: a ____ cup" in html
        and ">a red cup<" in html
        and MASK_CHARACTER not in html
        and ">\na red cup" not in html
    )


def test_training_curves_by_modality(page: Page) -> None:
    charts = [attributes["class"] or "" for attributes in page.all("figure") if "chart" in (attributes["class"] or "")]
    assert charts[0] == "chart tone-text" and charts[1] == "chart tone-numbers"  # the report's order
    text = "".join(page.text)
    assert "expert load CV" in text and "tokens per second" in text
    assert "11 → 1.26" in text  # 1 + 100/10 at first, the mean of the last four lines at the end
    assert len([path for path in page.all("path") if path.get("class") == "fine"]) == 2  # one line a layer


def test_a_run_without_metrics_still_has_a_report(tmp_path: Path) -> None:
    run = example.run_folder(tmp_path)
    run.metrics.unlink()
    write_report(run, EvalReport([], 0.0, "none"), example.facts())
    text = "".join(Page((tmp_path / "report.html").read_text(encoding="utf-8")).text)
    assert "No curves" in text and "No task was evaluated." in text


def test_weights_that_were_chosen_and_an_early_end_are_reported(tmp_path: Path) -> None:
    facts = dataclasses.replace(example.facts(), weights_of_step=1500, held_out_loss=2.125, stopped_at=1800)
    html = report_html(example.run_folder(tmp_path), EvalReport([], 0.0, "none"), facts)
    for text in (html, card(EvalReport([], 0.0, "none"), facts)):
        assert "Training ended early: the held-out loss no longer fell at step 1,800." in text
        assert "The weights are those of step 1,500, whose held-out loss was the lowest, 2.125." in text
    assert "held-out" not in card(EvalReport([], 0.0, "none"), example.facts())


def test_a_card_is_markdown_without_escapes() -> None:
    facts = dataclasses.replace(example.facts(), name="R&D | one")
    text = card(EvalReport([], 0.0, "none"), facts)
    assert text.startswith("---\nlibrary_name: openm6\n") and "\n---\n\n# R&D / one\n\nA model of OpenM6" in text
    assert "\n## Scores\n\nIt was not evaluated.\n\n## Energy\n" in text and text.endswith("rely on it.\n")


@pytest.mark.filterwarnings("error")
def test_lines_of_metrics_without_a_speed_make_no_warning(tmp_path: Path) -> None:
    run = example.run_folder(tmp_path)
    run.metrics.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0, "tokens_per_second": null}\n')
    assert "tokens per second" in report_html(run, EvalReport([], 0.0, "none"), example.facts())


@pytest.mark.parametrize(
    ("part", "answer"),
    [
        (Part("image", b"not an image"), "ship"),
        (Part("audio", b"not an audio clip", {"seconds": 1.0}), "ship"),
        (Part("text", "draw"), Image.new("RGB", (8, 8))),
        (Part("text", "say"), np.array([np.nan, 0.0], np.float32)),
        (Part("text", "how much"), Histogram(np.full((1, 160), np.nan), np.array([[0.0, 1.0]]))),
    ],
)
def test_broken_data_never_stops_the_report(tmp_path: Path, part: Part, answer) -> None:
    truth = {"x": None} if isinstance(answer, Histogram) else b"broken"
    task = example.result("text_to_image", ("text", "image"), "bits_per_code", [Sample([part], answer, truth, "1")])
    page = page_of(tmp_path, EvalReport([task], 1.0, "x"))
    drawn = "".join(str(attributes.get("d", "")) for attributes in page.all("path"))
    assert "nan" not in drawn and "sample" in page.classes()


def test_size_is_bounded(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (480, 400, 3), dtype=np.uint8))
    long = rng.normal(0, 0.1, 16_000 * 29).astype(np.float32)
    wordy = [Part("text", "word " * 5000)]
    drawings = example.result(
        "text_to_image", ("text", "image"), "bits_per_code", [Sample(wordy, noise, noise, "1")] * 40
    )
    sayings = example.result(
        "text_to_speech", ("text", "audio"), "bits_per_code", [Sample(wordy, long, long, "1")] * 40
    )
    many = [dataclasses.replace(task, source=f"s{i}") for i in range(6) for task in (drawings, sayings)]
    html = report_html(example.run_folder(tmp_path, steps=5_000), EvalReport(many, 1.0, "x"), example.facts())
    assert len(html) < 1.4 * MEDIA_BYTES + 1_500_000
    assert "left out to keep this page small" in html


def test_json_holds_what_its_schema_says(tmp_path: Path) -> None:
    run = example.run_folder(tmp_path)
    write_report(run, example.eval_report(), example.facts())
    content = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert set(content) == {"seconds", "params", "tokens", "steps", "weights_of_step", "tasks", "codecs", "energy"}
    assert content["params"] == {"total": 5_123_456, "active": 2_034_567}
    assert (content["seconds"], content["tokens"], content["steps"]) == (391.0, 3_512_000, 2140)
    task = content["tasks"]["text_to_image/things"]
    assert (task["value"], task["baseline"], task["information_ci"]) == (0.625, 0.25, [-1.0, 2.0])
    assert set(task) == {
        "input_modality", "output_modality", "metric", "value", "value_ci", "baseline", "baseline_name", "better",
        "advantage_ci", "beats_baseline", "information_gain", "information_ci", "significant", "null_predictor",
        "answer_entropy", "n", "n_answered", "n_left_out", "metrics",
    }  # fmt: skip
    assert (task["input_modality"], task["output_modality"]) == ("text", "image")
    assert task["metrics"] == {"bits_per_code": 0.625, "knn_accuracy": 0.5}  # a float32 of numpy among them


def test_json_says_null_for_what_is_not_finite() -> None:
    task = dataclasses.replace(example.results()[0], baseline=float("nan"), information_interval=(float("-inf"), 1.0))
    content = json.loads(report_json(EvalReport([task], 1.0, "x"), example.facts()))
    entry = content["tasks"]["image_classification/things"]
    assert entry["baseline"] is None and entry["information_ci"] == [None, 1.0]


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch) -> None:
    run = example.run_folder(tmp_path)
    write_report(run, example.eval_report(), example.facts())
    old = (tmp_path / "report.html").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("openm6.core.files.os.replace", full)
    with pytest.raises(OutputError, match="report.json could not be written .No space"):
        write_report(run, EvalReport([], 0.0, "x"), example.facts())
    assert (tmp_path / "report.html").read_bytes() == old
    assert not list(tmp_path.glob(".*.partial"))


def test_scores_of_codecs_are_grouped_by_their_records() -> None:
    scores = {"digits_32 psnr": 31.3, "digits_32 bits": 35.2, "digits log_mel_l1": 0.58, "psnr": 20.0}
    assert codec_rows(scores) == {
        "digits, 32 pixels": {"psnr": 31.3, "bits": 35.2},
        "digits": {"log_mel_l1": 0.58},
        "all": {"psnr": 20.0},
    }


def test_each_codec_has_a_table(tmp_path: Path) -> None:
    codecs = {name: codec_scores(name) for name in ("image-64", "audio")}
    facts = dataclasses.replace(example.facts(), codecs={**codecs, "x": {"a psnr": 30.0, "b ssim": 0.9}})
    html = report_html(example.run_folder(tmp_path), EvalReport([], 1.0, "x"), facts)
    tables = html.split('id="codecs"')[1].split("</section>")[0]
    assert tables.count("<table") == 3 and tables.count("<td></td>") == 2  # measures that one record lacks
    assert "digits, 64 pixels" in tables and "log-mel L1" in tables and tables.count("dB</td>") == 7


def test_the_words_of_a_chat_template_are_not_shown() -> None:
    words = "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    parts = [Part("text", words[0]), Part("text", " What is this?" + words[1])]
    assert _inputs(parts, MediaBudget(0)) == ["What is this?"]
