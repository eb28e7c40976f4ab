"""The page: choose a scenario or ask freely, see and hear the answer, what it cost, and what was drawn before."""

from __future__ import annotations

from typing import Any

import gradio

from openm6.base.errors import OpenM6Error
from openm6.serve.playground import words
from openm6.serve.playground.answers import Shown, answer_freely, answer_scenario
from openm6.serve.playground.charts import failure
from openm6.serve.playground.inputs import make_slots, picture_input, slot_updates, values_in
from openm6.serve.scenarios.catalogue import Catalogue, Standing, read_catalogue, standing
from openm6.serve.scenarios.examples import example_fits
from openm6.serve.scenarios.scenario import Language, Output, Scenario
from openm6.serve.state import Server

KEPT = 24  # pictures in the gallery
WANTS: tuple[Output, ...] = ("text", "image", "sound")
Pictures = list[tuple[Any, str]]
# On a phone the answer, or why there is none, comes below the screen; the page takes a moment to hold it.
SHOW = """() => setTimeout(
    () => document.getElementById("note").scrollIntoView({block: "nearest", behavior: "smooth"}), 200)"""


class Page:
    """Builds the page of one server and answers its events."""

    def __init__(self, server: Server, catalogue: Catalogue | None = None) -> None:
        self.server = server
        self.catalogue = catalogue or read_catalogue()

    def build(self) -> gradio.Blocks:
        """The page as Gradio's blocks."""
        with gradio.Blocks(title="OpenM6", analytics_enabled=False, fill_width=True) as blocks:
            first = self._first()
            self._head(first)
            with gradio.Row():
                with gradio.Column(min_width=320), gradio.Tabs(selected=self._opening(first)):
                    self._scenario_tab(first)
                    self._free_tab()
                with gradio.Column(min_width=320):
                    self._answer_panel()
            self._connect(blocks)
        return blocks

    def _first(self) -> Scenario:
        """The scenario that the page opens with."""
        return self._best(list(self.catalogue.scenarios.values()))

    def _best(self, scenarios: list[Scenario]) -> Scenario:
        """The first that works at a click: ready, and with an example that fits the model; else the nearest to it."""
        return max(
            scenarios,
            key=lambda scenario: (
                self._standing(scenario).ready,
                self._standing(scenario).trained,
                self._fits(scenario, "en"),
            ),
        )

    def _opening(self, first: Scenario) -> str:
        """The tab that is shown: scenarios, unless the model can do none."""
        return "scenarios" if self._standing(first).trained else "freely"

    def _standing(self, scenario: Scenario) -> Standing:
        return standing(scenario, self.server.engine.loaded.description, self.server.scores)

    def _fits(self, scenario: Scenario, language: Language) -> bool:
        """Whether the example is shown."""
        able = self._standing(scenario)
        return not able.trained or example_fits(scenario, language, self.server.engine.loaded.description)

    def _head(self, first: Scenario) -> None:
        with gradio.Row(elem_id="head"):
            self.title = gradio.Markdown(_heading("en"), elem_id="title")
            self.language = gradio.Radio(
                words.LANGUAGE_NAMES, value="en", label=words.LANGUAGE.en, elem_id="language", min_width=250
            )

    def _scenario_tab(self, first: Scenario) -> None:
        with gradio.Tab(words.SCENARIOS.en, id="scenarios") as self.scenario_tab:
            domain = self.catalogue.domain_of(first.name)
            self.domain = gradio.Dropdown(
                self._domains("en"), value=domain, label=words.DOMAIN.en, elem_id="domain"
            )
            self.scenario = gradio.Dropdown(
                self._choices(domain, "en"), value=first.name, label=words.SCENARIO.en, elem_id="scenario"
            )
            self.state = gradio.Markdown(self._about(first, "en"), elem_id="state")
            self.slots = make_slots()
            self.seed = gradio.Number(0, label=words.SEED.en, precision=0, minimum=0, maximum=2**31 - 1)
            # Until the example has come, a click would ask with nothing given.
            self.run = gradio.Button(words.RUN.en, variant="primary", elem_id="run", interactive=False)

    def _free_tab(self) -> None:
        with gradio.Tab(words.FREELY.en, id="freely") as self.free_tab:
            self.text = gradio.Textbox(label=words.TEXT.en, lines=3, elem_id="free-text")
            self.picture = picture_input("free-picture", words.PICTURE.en)
            self.sound = gradio.Audio(label=words.SOUND.en, type="filepath", elem_id="free-sound")
            self.want = gradio.Radio(_wants("en"), value="text", label=words.WANTED.en, elem_id="want")
            self.ask = gradio.Button(words.RUN.en, variant="primary", elem_id="ask")

    def _answer_panel(self) -> None:
        self.out_text = gradio.Textbox(label=words.ANSWER.en, lines=3, elem_id="answer-text")
        self.out_picture = gradio.Image(
            label=words.PICTURE.en,
            visible=False,
            interactive=False,
            format="png",
            height=280,
            buttons=["download", "fullscreen"],
            elem_id="answer-picture",
        )
        self.out_sound = gradio.Audio(
            label=words.SOUND.en, visible=False, interactive=False, elem_id="answer-sound"
        )
        self.out_figure = gradio.HTML(visible=False, elem_id="answer-figure")
        self.note = gradio.HTML("", elem_id="note")
        self.gallery = gradio.Gallery(
            label=words.GALLERY.en, columns=4, height=150, object_fit="contain", elem_id="gallery"
        )
        self.drawn = gradio.State([])

    def _connect(self, blocks: gradio.Blocks) -> None:
        panel = [self.out_text, self.out_picture, self.out_sound, self.out_figure, self.note]
        answer = [*panel, self.gallery, self.drawn]
        self.domain.change(self.choose_domain, [self.domain, self.language], [self.scenario])
        shown = [self.state, *self.slots]
        self.scenario.change(self.choose_scenario, [self.scenario, self.language], shown)
        loaded = blocks.load(self.choose_scenario, [self.scenario, self.language], shown)
        loaded.then(lambda: gradio.update(interactive=True), None, self.run)
        self.language.change(
            self.choose_language, [self.language, self.domain, self.scenario], self._worded() + shown
        )
        asked = [self.language, self.scenario, self.seed, self.drawn, *self.slots]
        self.run.click(self.on_run, asked, answer).then(None, js=SHOW)
        free = [self.language, self.text, self.picture, self.sound, self.want, self.seed, self.drawn]
        self.ask.click(self.on_ask, free, answer).then(None, js=SHOW)

    def _worded(self) -> list[Any]:
        """Components whose words change with the language, in the order of `choose_language`."""
        return [
            self.title, self.language, self.domain, self.scenario, self.scenario_tab, self.free_tab, self.seed,
            self.run, self.ask, self.text, self.picture, self.sound, self.want, self.out_text, self.out_picture,
            self.out_sound, self.gallery,
        ]  # fmt: skip

    def choose_domain(self, domain: str, language: Language) -> Any:
        """The scenarios of a field, the first that works chosen."""
        scenarios = self.catalogue.domains[domain].scenarios
        first = self._best(scenarios)
        return gradio.update(choices=self._choices(domain, language), value=first.name)

    def choose_scenario(self, name: str, language: Language) -> list[Any]:
        """What the scenario is and its inputs, filled with the example where it fits the model."""
        scenario = self.catalogue.named(name)
        filled = self._fits(scenario, language)
        return [self._about(scenario, language), *slot_updates(scenario, language, filled)]

    def choose_language(self, language: Language, domain: str, name: str) -> list[Any]:
        """The whole page in another language."""
        labels = (words.SEED, words.TEXT, *(words.PICTURE, words.SOUND) * 2)
        seed, text, *media = (gradio.update(label=label.said(language)) for label in labels)
        # One for each component: Gradio takes an update apart when it is done with it.
        buttons = (gradio.update(value=words.RUN.said(language)) for _ in range(2))
        return [
            _heading(language),
            gradio.update(label=words.LANGUAGE.said(language)),
            gradio.update(label=words.DOMAIN.said(language), choices=self._domains(language), value=domain),
            gradio.update(
                label=words.SCENARIO.said(language), choices=self._choices(domain, language), value=name
            ),
            gradio.update(label=words.SCENARIOS.said(language)),
            gradio.update(label=words.FREELY.said(language)),
            seed,
            *buttons,
            text,
            *media[:2],
            gradio.update(label=words.WANTED.said(language), choices=_wants(language)),
            gradio.update(label=words.ANSWER.said(language)),
            *media[2:],
            gradio.update(label=words.GALLERY.said(language)),
            *self.choose_scenario(name, language),
        ]

    async def on_run(
        self, language: Language, name: str, seed: float, drawn: Pictures, *slots: Any
    ) -> list[Any]:
        """A scenario's answer in the panel."""
        scenario = self.catalogue.named(name)
        able = self._standing(scenario)
        if not able.trained:
            return _told(able.said(language), language, drawn)
        try:
            values = values_in(scenario, slots, self.server.config.limits, language)
            shown = await answer_scenario(self.server, scenario, language, values, int(seed or 0))
        except OpenM6Error as error:
            return _told(str(error), language, drawn)
        return _panel(shown, scenario.title.said(language), drawn)

    async def on_ask(
        self,
        language: Language,
        text: str,
        picture: str | None,
        sound: str | None,
        want: Output,
        seed: float,
        drawn: Pictures,
    ) -> list[Any]:
        """The answer to a free question in the panel."""
        try:
            shown = await answer_freely(
                self.server, language, text or "", picture, sound, want, int(seed or 0)
            )
        except OpenM6Error as error:
            return _told(str(error), language, drawn)
        return _panel(shown, (text or "")[:40], drawn)

    def _domains(self, language: Language) -> list[tuple[str, str]]:
        return [(domain.title.said(language), name) for name, domain in self.catalogue.domains.items()]

    def _choices(self, domain: str, language: Language) -> list[tuple[str, str]]:
        """Titles, those that need training marked by a ring."""
        return [
            (
                ("● " if self._standing(scenario).ready else "○ ") + scenario.title.said(language),
                scenario.name,
            )
            for scenario in self.catalogue.domains[domain].scenarios
        ]

    def _about(self, scenario: Scenario, language: Language) -> str:
        able = self._standing(scenario)
        state = words.READY.said(language) if able.ready else f"○ {able.said(language)}"
        own = "" if self._fits(scenario, language) else f" {words.OWN.said(language)}"
        return f"{scenario.summary.said(language)} {state}{own}"


def _told(sentence: str, language: Language, drawn: Pictures) -> list[Any]:
    """An answer panel that says why there is no answer; a raised error would cover every part of it."""
    return _panel(Shown(note=failure(words.WRONG.said(language), sentence)), "", drawn)


def _heading(language: Language) -> str:
    return f"# {words.TITLE.said(language)}\n{words.LEAD.said(language)}"


def _wants(language: Language) -> list[tuple[str, str]]:
    titles = (words.TEXT, words.PICTURE, words.SOUND)
    return [(title.said(language), want) for title, want in zip(titles, WANTS, strict=True)]


def _panel(shown: Shown, caption: str, drawn: Pictures) -> list[Any]:
    """The answer panel: what is there is shown, the rest hidden; pictures go to the gallery."""
    if shown.picture is not None:
        drawn = [(shown.picture, caption), *drawn][:KEPT]
    return [
        gradio.update(value=shown.text, visible=shown.text is not None),
        gradio.update(value=shown.picture, visible=shown.picture is not None),
        gradio.update(value=shown.sound, visible=shown.sound is not None),
        gradio.update(value=shown.figure or "", visible=shown.figure is not None),
        shown.note,
        drawn,
        drawn,
    ]
