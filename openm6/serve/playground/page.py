"""The page under /playground: choose a scenario or ask freely, and see the answer, its cost and earlier images."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import gradio
from fastapi import FastAPI

from openm6.core.errors import DataError, OpenM6Error
from openm6.core.log import get_log
from openm6.inference.question import chat_prompt
from openm6.inference.sampling import MaskedSampling, Sampling
from openm6.modalities.interface import Part
from openm6.serve.middleware import PLAYGROUND, match_key
from openm6.serve.playground.parts import (
    FIGURES,
    WORDS,
    ImageInput,
    make_card,
    make_inputs,
    show_answer,
    uploaded,
    values_in,
)
from openm6.serve.requests import CodesRequest, Request, TextRequest
from openm6.serve.scenarios.run import example_fits, example_values, examples_of, scenario_request
from openm6.serve.scenarios.scenario import Language, Output, Readiness, Scenario, readiness
from openm6.serve.server import Server

MAX_GALLERY = 24
LANGUAGES = (("English", "en"), ("中文", "zh"))
OUTPUTS: tuple[Output, ...] = ("text", "image", "audio")
Images = list[tuple[Any, str]]
# On a phone the answer, or why there is none, comes below the screen; the page takes a moment to hold it.
SHOW = """() => setTimeout(
    () => document.getElementById("note").scrollIntoView({block: "nearest", behavior: "smooth"}), 200)"""
SHOW_FORM = """() => document.getElementById("state").scrollIntoView({block: "center", behavior: "smooth"})"""
CLICKED = Path(__file__).with_name("cards.js")


def add_playground(app: FastAPI) -> FastAPI:
    """Mount the page on an app that `create_app` made, before it starts; with API keys, a key is its password."""
    server = app.state.server
    assert isinstance(server, Server)
    keys = server.config.keys
    app.state.playground = True

    def login(user: str, password: str) -> bool:
        return match_key(password, keys) is not None

    return gradio.mount_gradio_app(
        app,
        Page(server).build(),
        path=PLAYGROUND,
        auth=login if keys else None,
        auth_message="Any name; the password is an API key." if keys else None,
        footer_links=[],
        max_file_size=server.limits.body_bytes,
        ssr_mode=False,
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css_paths=[Path(__file__).with_name("page.css")],
    )


class Page:
    """Builds the page of one server and answers its events."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.library = server.library
        # Components whose label changes with the language, each with the key of its words.
        self.labels: list[tuple[gradio.components.Component | gradio.Tab, str]] = []
        # Answers to the model's examples, by language, made for the first visitor.
        self.cards: dict[Language, list[str]] = {"en": [], "zh": []}
        self.making = asyncio.Lock()

    def build(self) -> gradio.Blocks:
        """Return the page as Gradio's blocks."""
        with gradio.Blocks(title="OpenM6", analytics_enabled=False, fill_width=True) as blocks:
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
            self.ask.click(self.on_ask, free, self.panel).then(None, js=SHOW)
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
        """Return the domain, the scenario and the example of a card."""
        domain = self.library.domain_of[event.name]
        choices = self._choices(domain, language)
        return [domain, gradio.update(choices=choices, value=event.name), (event.name, int(event.index))]

    def choose_domain(self, domain: str, language: Language) -> Any:
        """Return the scenarios of a domain, the first that works chosen."""
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
        """Return a scenario's answer in the panel."""
        able = self._readiness(scenario)
        if not able.trained:
            return _failed(able.text(language), language, drawn)
        try:
            values = values_in(scenario, contents, self.server.limits, language)
            request = scenario_request(scenario, language, values, int(seed or 0))
            series = scenario.kind_of("series")
            shown = await show_answer(self.server, request, language, values[series]["values"] if series else ())
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
        """Return the answer to a free question in the panel."""
        text, number, uploads = (text or "").strip(), int(seed or 0), (("image", image), ("audio", audio))
        try:
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
        """Return what a scenario does, and whether the model can do it."""
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
