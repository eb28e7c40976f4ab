"""The page under /playground: choose a scenario or ask freely, see and hear the answer, its cost and earlier images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio
from fastapi import FastAPI

from openm6.core.errors import OpenM6Error
from openm6.serve.middleware import PLAYGROUND, match_key
from openm6.serve.playground import inputs as words
from openm6.serve.playground.answers import Shown, answer_freely, answer_scenario, failure_box
from openm6.serve.playground.inputs import image_input, make_slots, slot_updates, values_in
from openm6.serve.scenarios.ask import example_fits
from openm6.serve.scenarios.scenario import (
    Bilingual,
    Language,
    Output,
    Readiness,
    Scenario,
    read_library,
    readiness,
)
from openm6.serve.server import Server

STYLE = Path(__file__).with_name("page.css")
MAX_GALLERY = 24
OUTPUTS: tuple[Output, ...] = ("text", "image", "audio")
Images = list[tuple[Any, str]]
# On a phone the answer, or why there is none, comes below the screen; the page takes a moment to hold it.
SHOW = """() => setTimeout(
    () => document.getElementById("note").scrollIntoView({block: "nearest", behavior: "smooth"}), 200)"""


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
        theme=gradio.themes.Default(
            font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
        css_paths=[STYLE],
    )


class Page:
    """Builds the page of one server and answers its events."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.library = read_library()
        # Components whose label changes with the language.
        self.labels: list[tuple[gradio.components.Component | gradio.Tab, Bilingual]] = []

    def build(self) -> gradio.Blocks:
        """Return the page as Gradio's blocks."""
        with gradio.Blocks(title="OpenM6", analytics_enabled=False, fill_width=True) as blocks:
            first = self.first_scenario()
            with gradio.Row(elem_id="head"):
                self.title = gradio.Markdown(_heading("en"), elem_id="title")
                self.language = gradio.Radio(
                    words.LANGUAGE_NAMES,
                    value="en",
                    label=words.LANGUAGE.en,
                    elem_id="language",
                    min_width=250,
                )
                self.labels.append((self.language, words.LANGUAGE))
            with gradio.Row():
                with gradio.Column(min_width=320), gradio.Tabs(selected=self.opening_tab(first)):
                    self._scenario_tab(first)
                    self._free_tab()
                with gradio.Column(min_width=320):
                    self._answer_panel()
            self._connect(blocks)
        return blocks

    def first_scenario(self) -> Scenario:
        """Return the scenario that the page opens with."""
        return self._best(list(self.library.scenarios.values()))

    def opening_tab(self, first: Scenario) -> str:
        """Return the tab that is shown: scenarios, unless the model can do none."""
        return "scenarios" if self._readiness(first).trained else "freely"

    def _best(self, scenarios: list[Scenario]) -> Scenario:
        """The first that works at a click: ready, and with an example that fits the model; else the nearest to it."""

        def rank(scenario: Scenario) -> tuple[bool, bool, bool]:
            found = self._readiness(scenario)
            return found.ready, found.trained, self._fits(scenario, "en")

        return max(scenarios, key=rank)

    def _readiness(self, scenario: Scenario) -> Readiness:
        return readiness(scenario, self.server.loaded.description, self.server.scores)

    def _fits(self, scenario: Scenario, language: Language) -> bool:
        """Whether the example is shown."""
        trained = self._readiness(scenario).trained
        return not trained or example_fits(scenario, language, self.server.loaded.description)

    def _scenario_tab(self, first: Scenario) -> None:
        with gradio.Tab(words.SCENARIOS.en, id="scenarios") as tab:
            domain = self.library.domain_of[first.name]
            self.domain = gradio.Dropdown(
                self._domains("en"), value=domain, label=words.DOMAIN.en, elem_id="domain"
            )
            self.scenario = gradio.Dropdown(
                self._choices(domain, "en"), value=first.name, label=words.SCENARIO.en, elem_id="scenario"
            )
            self.state = gradio.Markdown(self._about(first, "en"), elem_id="state")
            self.slots = make_slots()
            self.seed = gradio.Number(0, label=words.SEED.en, precision=0, minimum=0, maximum=2**31 - 1)
            # Until the example has come, a click would ask with empty inputs.
            self.run = gradio.Button(words.RUN.en, variant="primary", elem_id="run", interactive=False)
        self.labels += [(tab, words.SCENARIOS), (self.seed, words.SEED)]

    def _free_tab(self) -> None:
        with gradio.Tab(words.FREELY.en, id="freely") as tab:
            self.text = gradio.Textbox(label=words.TEXT.en, lines=3, elem_id="free-text")
            self.image = image_input("free-image", words.IMAGE.en)
            self.audio = gradio.Audio(label=words.AUDIO.en, type="filepath", elem_id="free-audio")
            self.output = gradio.Radio(_outputs("en"), value="text", label=words.OUTPUT.en, elem_id="output")
            self.ask = gradio.Button(words.RUN.en, variant="primary", elem_id="ask")
        self.labels += [
            (tab, words.FREELY),
            (self.text, words.TEXT),
            (self.image, words.IMAGE),
            (self.audio, words.AUDIO),
        ]

    def _answer_panel(self) -> None:
        out_text = gradio.Textbox(label=words.ANSWER.en, lines=3, elem_id="answer-text")
        out_image = gradio.Image(
            label=words.IMAGE.en,
            visible=False,
            interactive=False,
            format="png",
            height=280,
            buttons=["download", "fullscreen"],
            elem_id="answer-image",
        )
        out_audio = gradio.Audio(
            label=words.AUDIO.en, visible=False, interactive=False, elem_id="answer-audio"
        )
        out_figure = gradio.HTML(visible=False, elem_id="answer-figure")
        note = gradio.HTML("", elem_id="note")
        gallery = gradio.Gallery(
            label=words.GALLERY.en, columns=4, height=150, object_fit="contain", elem_id="gallery"
        )
        self.drawn = gradio.State([])
        self.panel = [out_text, out_image, out_audio, out_figure, note, gallery, self.drawn]
        self.labels += [
            (out_text, words.ANSWER),
            (out_image, words.IMAGE),
            (out_audio, words.AUDIO),
            (gallery, words.GALLERY),
        ]

    def _connect(self, blocks: gradio.Blocks) -> None:
        self.domain.change(self.choose_domain, [self.domain, self.language], [self.scenario])
        shown = [self.state, *self.slots]
        self.scenario.change(self.choose_scenario, [self.scenario, self.language], shown)
        loaded = blocks.load(self.choose_scenario, [self.scenario, self.language], shown)
        loaded.then(lambda: gradio.update(interactive=True), None, self.run)
        worded: list[Any] = [self.title, self.domain, self.scenario, self.output, self.run, self.ask]
        worded += [component for component, _ in self.labels]
        self.language.change(
            self.choose_language, [self.language, self.domain, self.scenario], worded + shown
        )
        asked = [self.language, self.scenario, self.seed, self.drawn, *self.slots]
        self.run.click(self.on_run, asked, self.panel).then(None, js=SHOW)
        free = [self.language, self.text, self.image, self.audio, self.output, self.seed, self.drawn]
        self.ask.click(self.on_ask, free, self.panel).then(None, js=SHOW)

    def choose_domain(self, domain: str, language: Language) -> Any:
        """Return the scenarios of a domain, the first that works chosen."""
        first = self._best(self.library.domains[domain].scenarios)
        return gradio.update(choices=self._choices(domain, language), value=first.name)

    def choose_scenario(self, name: str, language: Language) -> list[Any]:
        """Return what the scenario is and its inputs, filled with the example if it fits the model."""
        scenario = self.library.named(name)
        filled = self._fits(scenario, language)
        return [self._about(scenario, language), *slot_updates(scenario, language, filled)]

    def choose_language(self, language: Language, domain: str, name: str) -> list[Any]:
        """Return the whole page in another language, in the order of `_connect`."""
        choices = self._choices(domain, language)
        return [
            _heading(language),
            gradio.update(label=words.DOMAIN.text(language), choices=self._domains(language), value=domain),
            gradio.update(label=words.SCENARIO.text(language), choices=choices, value=name),
            gradio.update(label=words.OUTPUT.text(language), choices=_outputs(language)),
            # One for each component: Gradio takes an update apart when it is done with it.
            *(gradio.update(value=words.RUN.text(language)) for _ in range(2)),
            *(gradio.update(label=label.text(language)) for _, label in self.labels),
            *self.choose_scenario(name, language),
        ]

    async def on_run(
        self, language: Language, name: str, seed: float, drawn: Images, *slots: Any
    ) -> list[Any]:
        """Return a scenario's answer in the panel."""
        scenario = self.library.named(name)
        able = self._readiness(scenario)
        if not able.trained:
            return _failed(able.text(language), language, drawn)
        try:
            values = values_in(scenario, slots, self.server.limits, language)
            shown = await answer_scenario(self.server, scenario, language, values, int(seed or 0))
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
        text = text or ""
        try:
            shown = await answer_freely(self.server, language, text, image, audio, output, int(seed or 0))
        except OpenM6Error as error:
            return _failed(str(error), language, drawn)
        return _panel(shown, text[:40], drawn)

    def _domains(self, language: Language) -> list[tuple[str, str]]:
        return [(domain.title.text(language), name) for name, domain in self.library.domains.items()]

    def _choices(self, domain: str, language: Language) -> list[tuple[str, str]]:
        """Titles, those that need training marked by a ring."""
        return [
            (
                ("● " if self._readiness(scenario).ready else "○ ") + scenario.title.text(language),
                scenario.name,
            )
            for scenario in self.library.domains[domain].scenarios
        ]

    def _about(self, scenario: Scenario, language: Language) -> str:
        able = self._readiness(scenario)
        state = words.READY.text(language) if able.ready else f"○ {able.text(language)}"
        own = "" if self._fits(scenario, language) else f" {words.OWN.text(language)}"
        return f"{scenario.summary.text(language)} {state}{own}"


def _heading(language: Language) -> str:
    return f"# {words.TITLE.text(language)}\n{words.LEAD.text(language)}"


def _outputs(language: Language) -> list[tuple[str, str]]:
    titles = (words.TEXT, words.IMAGE, words.AUDIO)
    return [(title.text(language), output) for title, output in zip(titles, OUTPUTS, strict=True)]


def _failed(sentence: str, language: Language, drawn: Images) -> list[Any]:
    """An answer panel with why there is no answer; a raised error would cover every part of it."""
    return _panel(Shown(note=failure_box(words.WRONG.text(language), sentence)), "", drawn)


def _panel(shown: Shown, caption: str, drawn: Images) -> list[Any]:
    """The answer panel: parts without content are hidden; images go to the gallery."""
    if shown.image is not None:
        drawn = [(shown.image, caption), *drawn][:MAX_GALLERY]
    return [
        gradio.update(value=shown.text, visible=shown.text is not None),
        gradio.update(value=shown.image, visible=shown.image is not None),
        gradio.update(value=shown.audio, visible=shown.audio is not None),
        gradio.update(value=shown.figure or "", visible=shown.figure is not None),
        shown.note,
        drawn,
        drawn,
    ]
