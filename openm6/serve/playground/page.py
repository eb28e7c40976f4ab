"""The page under /playground: choose a scenario or ask freely, and see the answer, its cost and earlier images.

First the components of inputs and the figures of answers, then the page and its events.
"""

from __future__ import annotations

import asyncio
import io
import math
import re
from abc import ABCMeta
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio
import jinja2
import soundfile
from fastapi import FastAPI
from PIL import Image as Pillow

from openm6.core.config import build, read_yaml
from openm6.core.errors import DataError, OpenM6Error
from openm6.core.log import get_log
from openm6.evaluate.report import MediaBudget, sample_data
from openm6.inference.question import chat_prompt
from openm6.inference.sampling import MaskedSampling, Sampling
from openm6.modalities.audio import RATE
from openm6.modalities.dates import is_date
from openm6.modalities.histogram import Histogram
from openm6.modalities.interface import Part
from openm6.modalities.series import NumberSeries
from openm6.serve.config import Limits
from openm6.serve.content import CHECKS, pcm
from openm6.serve.errors import BadRequestError
from openm6.serve.requests import (
    CodesRequest,
    DeadlineExceededError,
    EngineUnavailableError,
    QueueFullError,
    Request,
    TextRequest,
)
from openm6.serve.routes.scenarios import COVERAGE, check_size, decoded
from openm6.serve.scenarios.run import (
    MEDIA,
    Example,
    example_fits,
    example_values,
    examples_of,
    sample_of,
    scenario_request,
)
from openm6.serve.scenarios.scenario import Bilingual, InputKind, Language, Output, Readiness, Scenario, readiness
from openm6.serve.schemas import coverage_of, distribution_of
from openm6.serve.server import PLAYGROUND, Server, match_key

_WORDS = read_yaml(Path(__file__).with_name("words.yaml"))
WORDS = {name: build(Bilingual, words, name) for name, words in _WORDS.items()}


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


def make_inputs(scenario: Scenario, language: Language, example: Mapping[str, Any]) -> list[Any]:
    """Return a component for each input of a scenario, with what the example gives or empty."""
    found = []
    for name, declared in scenario.inputs.items():
        kind, label = declared.kind, declared.label.text(language)
        hint = WORDS.get(f"{kind}_hint")
        if hint is not None:
            label = f"{label} ({hint.text(language)})"
        # Without `interactive`, Gradio disables a component with a value that is made while the page is rendered.
        form: Any = {"label": label, "elem_id": f"input-{name}", "interactive": True}
        if kind == "image":
            image = Pillow.open(io.BytesIO(example[name])).convert("RGBA") if name in example else None
            found.append(ImageInput(image, type="filepath", format="png", height=200, **form))
        elif kind == "audio":
            # The rate first.
            audio = soundfile.read(io.BytesIO(example[name]), dtype="int16")[::-1] if name in example else None
            found.append(gradio.Audio(audio, type="filepath", **form))
        else:
            found.append(gradio.Textbox(write_typed(kind, example[name]) if name in example else "", lines=2, **form))
    return found


def values_in(
    scenario: Scenario, contents: tuple[Any, ...], limits: Limits, language: Language = "en"
) -> dict[str, Any]:
    """Return what the components of `make_inputs` hold, by name.

    DataError: something cannot be read; BadRequestError: it is over a limit.
    """
    found: dict[str, Any] = {}
    for (name, given), value in zip(scenario.inputs.items(), contents, strict=True):
        if value in (None, ""):
            continue
        if given.kind in MEDIA:
            found[name] = uploaded(given.kind, value, limits, language)
            continue
        check_size(name, value, limits)  # a long text takes long to parse
        found[name] = read_typed(given.kind, value)
        if given.kind != "series":
            check_size(name, found[name], limits)
    return found


def uploaded(kind: str, path: str, limits: Limits, language: Language) -> bytes:
    """Return the bytes of an upload; raise DataError, in the language of the page, if it is broken or too large."""
    data = Path(path).read_bytes()
    try:
        return CHECKS[kind](data, limits, kind)
    except BadRequestError:
        limit = limits.pixels if kind == "image" else limits.audio_seconds
        raise DataError(WORDS[f"bad_{kind}"].text(language).format(limit=limit)) from None


def read_typed(kind: InputKind, text: str) -> Any:
    """Return the value that was typed into a text box. Raise DataError if it cannot be read as this kind."""
    text = text.strip()
    if kind == "numbers":
        return dict(_column(line) for line in text.replace(";", "\n").splitlines() if line.strip())
    if kind == "series":
        name, _, values = text.replace("：", ":").rpartition(":")
        return {"name": name.strip() or "value", "values": _numbers(values)}
    if kind == "candidates":
        return [line.strip() for line in text.splitlines() if line.strip()]
    return _numbers(text) if kind in ("box", "span") else text


def _column(line: str) -> tuple[str, float | str | None]:
    # Names of columns may have a colon, and times do.
    mark = "=" if "=" in line else "[：:]"
    name, *values = (part.strip() for part in re.split(mark, line, maxsplit=1))
    if not name or not values:
        raise DataError(f"{line.strip()!r} must look like mass = 3.5")
    return name, values[0] if is_date(values[0]) else _number(values[0])


def _numbers(text: str) -> list[float | None]:
    return [_number(word) for word in text.replace("，", ",").split(",")]


def _number(word: str) -> float | None:
    try:
        number = float(word) if word.strip() else None
    except ValueError:
        raise DataError(f"{word.strip()!r} is not a number: write it as 3.5") from None
    if number is not None and math.isinf(number):
        raise DataError(f"{word.strip()!r} is not finite: leave it empty, or write a number")
    return None if number is None or math.isnan(number) else number


def write_typed(kind: InputKind, value: Any) -> str:
    if kind == "numbers":
        return "\n".join(f"{name} = {_plain(number)}" for name, number in value.items())
    if kind == "series":
        return f"{value['name']}: {', '.join(map(_plain, value['values']))}"
    if kind == "candidates":
        return "\n".join(value)
    return ", ".join(map(_plain, value)) if kind in ("box", "span") else str(value)


def _plain(number: float | str | None) -> str:
    return "" if number is None else number if isinstance(number, str) else f"{number:.15g}"


# As clients of the engine; the answers of the gallery do not wait before those to a visitor.
CLIENT, GALLERY = "playground", "gallery"
CARD_BYTES = 2**18  # of the images and audio of a card
WIDTH, HEIGHT, EDGE = 560, 180, 34
FIGURES: Any = (
    jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    .from_string(Path(__file__).with_name("figures.html").read_text(encoding="utf-8"))
    .make_module({"WIDTH": WIDTH, "HEIGHT": HEIGHT, "EDGE": EDGE})
)


async def show_answer(server: Server, request: Request, language: Language) -> dict[str, Any]:
    """Return the parts of the answer panel for a request; raise as `Engine.ask_all`."""
    [handle] = await server.engine.ask_all([request], CLIENT, server.limits.seconds)
    answer = await handle.answer()
    server.metrics.add(CLIENT, answer)
    energy = WORDS["unmeasured"].text(language)
    if answer.joules is not None:
        estimated = answer.energy_source == "estimate"
        energy = f"{answer.joules:.3g} J ({WORDS['estimate'].text(language) if estimated else answer.energy_source})"
    coverage = coverage_of(request, answer, server.loaded.description)
    note = str(FIGURES.note(coverage.message(language), f"{energy} · {answer.seconds:.2f} s"))
    found = await asyncio.to_thread(decoded, request, answer, server.loaded)
    match found:
        case {"audio": samples}:
            found = {"audio": (RATE, pcm(samples))}
        case {"numbers": numbers}:
            [(name, distribution)] = numbers.items()
            found = {"figure": str(FIGURES.chart(name, distribution, past_of(request.parts)))}
        case {"ranking": ranking}:
            found = {"figure": str(FIGURES.ranking(ranking))}
        case {"embedding": vector}:
            found = {"figure": str(FIGURES.vector(vector))}
    return {**found, "note": note}


def past_of(parts: Iterable[Part]) -> Sequence[float | None]:
    """Return the values of the series that a request continues, if it holds one."""
    return next((part.raw.values for part in parts if isinstance(part.raw, NumberSeries)), ())


async def make_card(server: Server, example: Example) -> str:
    """Return the answer to an example as a card of the gallery; empty if there will be none, now or later.

    Raise QueueFullError, EngineUnavailableError or DeadlineExceededError, after which another visitor may get it.
    """
    try:
        [handle] = await server.engine.ask_all([example.request], GALLERY, server.limits.seconds)
        answer = await handle.answer()
    except (QueueFullError, EngineUnavailableError, DeadlineExceededError):
        raise
    except OpenM6Error:
        return ""
    server.metrics.add(GALLERY, answer)
    sample = await asyncio.to_thread(sample_of, example.request, answer, server.loaded)
    shown = await asyncio.to_thread(sample_data, sample, MediaBudget(CARD_BYTES))
    title, figure = example.scenario.title.text(example.language), ""
    if isinstance(sample.answer, Histogram):
        found = distribution_of(sample.answer, COVERAGE)
        figure = FIGURES.chart(example.scenario.column or title, found, past_of(sample.inputs))
    return str(FIGURES.card(example.scenario.name, example.number, title, shown, figure))


MAX_GALLERY = 24
LANGUAGES = (("English", "en"), ("中文", "zh"))
OUTPUTS: tuple[Output, ...] = ("text", "image", "audio")
Images = list[tuple[Any, str]]
# On a phone the answer, or why there is none, comes below the screen; the page takes a moment to hold it.
SHOW = """() => setTimeout(
    () => document.getElementById("note").scrollIntoView({block: "nearest", behavior: "smooth"}), 200)"""
SHOW_FORM = """() => document.getElementById("state").scrollIntoView({block: "center", behavior: "smooth"})"""
CLICKED = Path(__file__).with_name("cards.js")


async def _refuse_address(url: str, cache_dir: str) -> str:
    """In place of Gradio's download, which has no limit of size or time."""
    raise gradio.Error("addresses are not fetched: upload the file")


def add_playground(app: FastAPI) -> FastAPI:
    """Mount the page on an app that `create_app` made, before it starts; with API keys, a key is its password."""
    server = app.state.server
    assert isinstance(server, Server)
    keys = server.config.keys
    app.state.playground = True
    blocks = Page(server).build()
    # Gradio checks the paths in a request only of a page that was launched, and mounting does not say so.
    blocks.has_launched = True
    gradio.processing_utils.async_ssrf_protected_download = _refuse_address
    return gradio.mount_gradio_app(
        app,
        blocks,
        path=PLAYGROUND,
        auth=(lambda _, password: match_key(password, keys) is not None) if keys else None,
        auth_message="Any name; the password is an API key." if keys else None,
        footer_links=[],
        max_file_size=server.limits.body_bytes,
        ssr_mode=False,
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css_paths=[Path(__file__).with_name("page.css")],
    )


class Page:
    def __init__(self, server: Server) -> None:
        self.server = server
        self.library = server.library
        # Components whose label changes with the language, each with the key of its words.
        self.labels: list[tuple[gradio.components.Component | gradio.Tab, str]] = []
        # Answers to the model's examples, by language, made for the first visitor.
        self.cards: dict[Language, list[str]] = {"en": [], "zh": []}
        self.making = asyncio.Lock()

    def build(self) -> gradio.Blocks:
        # Files of visitors and answers are deleted after a day; the pair is in seconds, how often and how old.
        kept = (3600, 86_400)
        with gradio.Blocks(title="OpenM6", analytics_enabled=False, fill_width=True, delete_cache=kept) as blocks:
            first = self.best(list(self.library.scenarios.values()))
            with gradio.Row(elem_id="head"):
                self.title = gradio.Markdown(_heading("en"), elem_id="title")
                self.language = gradio.Radio(
                    LANGUAGES, value="en", label=WORDS["language"].en, elem_id="language", min_width=250
                )
            cards = gradio.HTML("", elem_id="cards", js_on_load=CLICKED.read_text("utf-8"))
            self.picked = gradio.State((None, 0))
            with gradio.Row():
                tab = "scenarios" if self._readiness(first).trained else "freely"
                with gradio.Column(min_width=320), gradio.Tabs(selected=tab):
                    self._scenario_tab(first)
                    self._free_tab()
                with gradio.Column(min_width=320):
                    self._answer_panel()
            # By `change`, a card would be replaced by the first scenario of its domain.
            self.domain.input(self.choose_domain, [self.domain, self.language], [self.scenario])
            self.labels.append((self.language, "language"))
            # The gallery of the language that was chosen last, also if another one is being shown.
            gradio.on(
                [blocks.load, self.language.change], self.show_cards, self.language, cards, show_progress="hidden",
                concurrency_limit=None, trigger_mode="always_last",
            )  # fmt: skip
            chosen = [self.domain, self.scenario, self.picked]
            cards.click(self.choose_card, [self.language], chosen, show_progress="hidden").then(None, js=SHOW_FORM)
            worded: list[Any] = [self.title, self.domain, self.scenario, self.output, self.ask]
            worded += [component for component, _ in self.labels]
            self.language.change(self.choose_language, [self.language, self.domain, self.scenario], worded)
            free = [self.language, self.text, self.image, self.audio, self.output, self.seed, self.drawn]
            # The engine batches questions; by default, gradio would ask them one after the other.
            self.ask.click(self.on_ask, free, self.panel, concurrency_limit=None).then(None, js=SHOW)
        return blocks

    def best(self, scenarios: list[Scenario]) -> Scenario:
        """The first that works at a click: ready, and with an example that fits the model; else the nearest to it."""
        able = [(self._readiness(scenario), self.fits(scenario, "en"), scenario) for scenario in scenarios]
        return max(able, key=lambda one: (one[0].ready, one[0].trained, one[1]))[2]

    def _readiness(self, scenario: Scenario) -> Readiness:
        return readiness(scenario, self.server.loaded.description, self.server.scores)

    def fits(self, scenario: Scenario, language: Language) -> bool:
        """Whether the example is shown, if there is one."""
        untrained = bool(scenario.examples) and not self._readiness(scenario).trained
        return untrained or example_fits(scenario, language, self.server.loaded.description)

    def _scenario_tab(self, first: Scenario) -> None:
        with gradio.Tab(WORDS["scenarios"].en, id="scenarios") as tab:
            domain = self.library.domain_of[first.name]
            self.domain = gradio.Dropdown(self._domains("en"), value=domain, label=WORDS["domain"].en, elem_id="domain")
            self.scenario = gradio.Dropdown(
                self._choices(domain, "en"), value=first.name, label=WORDS["scenario"].en, elem_id="scenario"
            )
            gradio.render([self.scenario, self.language, self.picked])(self._show_scenario)
            self.seed = gradio.Number(0, label=WORDS["seed"].en, precision=0, minimum=0, maximum=2**31 - 1)
        self.labels += [(tab, "scenarios"), (self.seed, "seed")]

    def _show_scenario(self, name: str, language: Language, picked: tuple[str | None, int] = (None, 0)) -> None:
        """Add what a scenario is, its inputs, filled with the picked example or the first that fits, and its button."""
        scenario = self.library.scenarios[name]
        gradio.Markdown(self.about(scenario, language), elem_id="state")
        index = picked[1] if picked[0] == name else 0
        example = example_values(scenario, language, index) if self.fits(scenario, language) else {}
        inputs = make_inputs(scenario, language, example)
        run = gradio.Button(WORDS["run"].text(language), variant="primary", elem_id="run")
        # Not by the name in the dropdown: these inputs are of this scenario, and text must not be read as a path.
        asked = [self.language, self.seed, self.drawn, *inputs]
        run.click(partial(self.on_run, scenario), asked, self.panel).then(None, js=SHOW)

    def _free_tab(self) -> None:
        with gradio.Tab(WORDS["freely"].en, id="freely") as tab:
            self.text = gradio.Textbox(label=WORDS["text"].en, lines=3, elem_id="free-text")
            self.image = ImageInput(
                type="filepath", format="png", height=200, label=WORDS["image"].en, elem_id="free-image"
            )
            self.audio = gradio.Audio(label=WORDS["audio"].en, type="filepath", elem_id="free-audio")
            self.output = gradio.Radio(_outputs("en"), value="text", label=WORDS["output"].en, elem_id="output")
            self.ask = gradio.Button(WORDS["run"].en, variant="primary", elem_id="ask")
        self.labels += [(tab, "freely"), (self.text, "text"), (self.image, "image"), (self.audio, "audio")]

    def _answer_panel(self) -> None:
        text = gradio.Textbox(label=WORDS["answer"].en, lines=3, elem_id="answer-text")
        image = gradio.Image(
            label=WORDS["image"].en,
            visible=False,
            interactive=False,
            format="png",
            height=280,
            buttons=["download", "fullscreen"],
            elem_id="answer-image",
        )
        audio = gradio.Audio(label=WORDS["audio"].en, visible=False, interactive=False, elem_id="answer-audio")
        figure = gradio.HTML(visible=False, elem_id="answer-figure")
        note = gradio.HTML("", elem_id="note")
        gallery = gradio.Gallery(
            label=WORDS["gallery"].en, columns=4, height=150, object_fit="contain", elem_id="gallery"
        )
        self.drawn = gradio.State([])
        self.panel = [text, image, audio, figure, note, gallery, self.drawn]
        self.labels += [(text, "answer"), (image, "image"), (audio, "audio"), (gallery, "gallery")]

    async def show_cards(self, language: Language) -> AsyncIterator[str]:
        """Yield the gallery each time that one more answer is there; each is made once, one after the other."""
        cards, description = self.cards[language], self.server.loaded.description
        try:
            found = examples_of(self.library, description, self.server.scores, [language])
            examples = await asyncio.to_thread(list, found)  # files are read
            while len(cards) < len(examples):
                async with self.making:
                    if len(cards) < len(examples):
                        cards.append(await make_card(self.server, examples[len(cards)]))
                yield "".join(cards)
        except OpenM6Error as error:
            get_log().warning(f"gallery: {error}; the next visitor may get the rest")
        yield "".join(cards)

    def choose_card(self, language: Language, event: gradio.EventData) -> list[Any]:
        domain = self.library.domain_of[event.name]
        choices = self._choices(domain, language)
        return [domain, gradio.update(choices=choices, value=event.name), (event.name, int(event.index))]

    def choose_domain(self, domain: str, language: Language) -> Any:
        first = self.best(self.library.domains[domain].scenarios)
        return gradio.update(choices=self._choices(domain, language), value=first.name)

    def choose_language(self, language: Language, domain: str, name: str) -> list[Any]:
        """Return the fixed parts of the page in another language, in the order of `build`."""
        words = {key: word.text(language) for key, word in WORDS.items()}
        choices = self._choices(domain, language)
        return [
            _heading(language),
            gradio.update(label=words["domain"], choices=self._domains(language), value=domain),
            gradio.update(label=words["scenario"], choices=choices, value=name),
            gradio.update(label=words["output"], choices=_outputs(language)),
            gradio.update(value=words["run"]),
            *(gradio.update(label=words[key]) for _, key in self.labels),
        ]

    async def on_run(
        self, scenario: Scenario, language: Language, seed: float, drawn: Images, *contents: Any
    ) -> list[Any]:
        able = self._readiness(scenario)
        if not able.trained:
            return _failed(able.text(language), language, drawn)
        try:
            values = values_in(scenario, contents, self.server.limits, language)
            request = scenario_request(scenario, language, values, int(seed or 0), self.server.limits.tokens)
            shown = await show_answer(self.server, request, language)
        except OpenM6Error as error:
            return _failed(str(error), language, drawn)
        return _panel(shown, scenario.title.text(language), drawn)

    async def on_ask(
        self,
        language: Language,
        text: str,
        image: str | None,
        audio: str | None,
        output: Output,
        seed: float,
        drawn: Images,
    ) -> list[Any]:
        text, number, uploads = (text or "").strip(), int(seed or 0), (("image", image), ("audio", audio))
        try:
            check_size("text", text, self.server.limits)
            found = [Part(kind, uploaded(kind, path, self.server.limits, language)) for kind, path in uploads if path]
            found += [Part("text", text)] if text else []
            parts = tuple(chat_prompt([("user", found)], self.server.loaded))
            if not parts:
                raise DataError(WORDS["empty"].text(language))
            request: Request = TextRequest(parts=parts, sampling=Sampling(seed=number))
            if output == "image" or output == "audio":
                request = CodesRequest(parts=parts, modality=output, sampling=MaskedSampling(seed=number))
            shown = await show_answer(self.server, request, language)
        except OpenM6Error as error:
            return _failed(str(error), language, drawn)
        return _panel(shown, text[:40], drawn)

    def _domains(self, language: Language) -> list[tuple[str, str]]:
        return [(domain.title.text(language), name) for name, domain in self.library.domains.items()]

    def _choices(self, domain: str, language: Language) -> list[tuple[str, str]]:
        """Titles, those that need training marked by a ring."""
        return [
            (f"{'●' if self._readiness(one).ready else '○'} {one.title.text(language)}", one.name)
            for one in self.library.domains[domain].scenarios
        ]

    def about(self, scenario: Scenario, language: Language) -> str:
        able = self._readiness(scenario)
        state = WORDS["ready"].text(language) if able.ready else f"○ {able.text(language)}"
        own = "" if self.fits(scenario, language) else f" {WORDS['own'].text(language)}"
        return f"{scenario.summary.text(language)} {state}{own}"


def _heading(language: Language) -> str:
    return f"# {WORDS['title'].text(language)}\n{WORDS['lead'].text(language)}"


def _outputs(language: Language) -> list[tuple[str, str]]:
    return [(WORDS[output].text(language), output) for output in OUTPUTS]


def _failed(sentence: str, language: Language, drawn: Images) -> list[Any]:
    """An answer panel with why there is no answer; a raised error would cover every part of it."""
    return _panel({"note": str(FIGURES.failure(WORDS["failed"].text(language), sentence))}, "", drawn)


def _panel(shown: dict[str, Any], caption: str, drawn: Images) -> list[Any]:
    """The answer panel: parts without content are hidden; images go to the gallery."""
    if "image" in shown:
        drawn = [(shown["image"], caption), *drawn][:MAX_GALLERY]
    parts = ("text", "image", "audio", "figure")
    updates = [gradio.update(value=shown.get(part), visible=part in shown) for part in parts]
    return [*updates, shown["note"], drawn, drawn]
