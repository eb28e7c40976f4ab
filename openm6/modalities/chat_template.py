"""The chat template of an imported tokenizer: turns with roles as the text that its model was trained on."""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from openm6.core.errors import ConfigError
from openm6.modalities.interface import Part

# Of a prompt in the words of a template: the system message, and what opens and closes a turn. None of it is shown.
TURNS = re.compile(r"<\|im_start\|>system.*?<\|im_end\|>|<\|\w+\|>(?:user|assistant)?", re.DOTALL)
# In rendered text, what stands for part n of the prompt that is no text: two characters that no text may hold.
FIRST, COUNT = 0xFDD0, 32
_MARK = f"[{chr(FIRST)}-{chr(FIRST + COUNT - 1)}]"


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


class _Generation(Extension):
    """`{% generation %}` marks what `transformers` trains on; rendered, its content is as without the marks."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(16)
def _compiled(template: str) -> Template:
    """A template of someone else's, which can neither reach nor change anything but its variables."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    # As in transformers: Jinja's own escapes letters for HTML.
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(template)


class TemplatedChat:
    """The parts of a prompt, in which each turn begins with a part that has a `role`, through a template.

    `tokens` are texts of special tokens that templates name, such as `bos_token`; `special` are those of all special
    tokens, which the tokenizer would find in a text, so that a user could end the own turn.
    """

    def __init__(
        self, parts: Sequence[Part], template: str, tokens: Mapping[str, str], special: Sequence[str] = ()
    ) -> None:
        self.template, self.tokens, self.special = template, tokens, special
        self.media: list[Part] = []
        self.messages: list[dict[str, str]] = []
        self.learned: list[list[Part]] = [[]]  # of each turn: targets that are learned beside it, which stand before it
        for part in parts:
            if part.options.get("learned"):
                self.learned[-1].append(part)
                continue
            if "role" in part.options or not self.messages:
                self.messages.append({"role": part.options.get("role", "user"), "content": ""})
                self.learned.append([])
            self.messages[-1]["content"] += self._as_text(part)

    def parts(self) -> list[Part]:
        """The prompt as text and all else, with the learned parts where they were."""
        if not any(self.learned):
            return self._split(self._opened()[0])
        found: list[Part] = []
        done = ""
        for index, learned in enumerate(self.learned[:-1]):
            found += learned
            shown = self._render(self.messages[: index + 1])
            if not shown.startswith(done):
                raise ConfigError("the chat template of this model rewrites earlier turns, so chats cannot be trained")
            found += self._split(shown[len(done) :])
            done = shown
        return [*found, *self.learned[-1]]

    def opening(self) -> str:
        """What the template puts before an answer."""
        return self._opened()[1]

    def _opened(self) -> tuple[str, str]:
        """The chat, and what opens an answer; the latter is empty if the chat is written otherwise before an answer."""
        chat, whole = self._render(self.messages), self._render(self.messages, answer=True)
        return (chat, whole[len(chat) :]) if whole.startswith(chat) else (whole, "")

    def _as_text(self, part: Part) -> str:
        if part.modality == "text":
            text = re.sub(_MARK, "", part.raw)
            return functools.reduce(lambda left, token: left.replace(token, " "), self.special, text)
        self.media.append(part)
        high, low = divmod(len(self.media) - 1, COUNT)
        return chr(FIRST + high) + chr(FIRST + low)

    def _split(self, text: str) -> list[Part]:
        found: list[Part] = []
        for index, chunk in enumerate(re.split(f"({_MARK}{{2}})", text)):
            if index % 2:
                found.append(self.media[(ord(chunk[0]) - FIRST) * COUNT + ord(chunk[1]) - FIRST])
            elif chunk:
                found.append(Part("text", chunk))
        return found

    def _render(self, messages: Sequence[Mapping[str, str]], answer: bool = False) -> str:
        # Templates ask whether there are tools: without the name, `is not none` holds.
        values: dict[str, Any] = {"messages": messages, "tools": None, "documents": None, **self.tokens}
        values["add_generation_prompt"] = answer
        try:
            return _compiled(self.template).render(values)
        # A template of someone else's may raise anything.
        except Exception as error:
            raise ConfigError(f"the chat template of this model does not take these messages: {error}") from None
