"""A chat: lines in, answers and notices out.  A line that begins with / is a command."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Literal, TextIO

from vlmrt.tools.arguments import did_you_mean
from vlmrt.tools.chat.attachments import AttachmentError, Kind
from vlmrt.tools.chat.client import ChatError, Figures, Server, stream_answer
from vlmrt.tools.chat.conversation import Conversation
from vlmrt.tools.displayed import displayed

HELP = """\
/image FILE|URL    show a picture with the next question; its path in a line does too
/video FILE|URL    show a clip
/clear             forget what was said and attached
/system TEXT       what the model is told before everything; without TEXT: nothing
/set NAME VALUE    temperature, top_p, max_tokens, seed ...; VALUE default: the server's; without NAME: what is set
/retry             ask the last question again
/stats             figures of the last answer
/help              this
/quit              end, as Ctrl-D; Ctrl-C ends an answer
\"\"\"                begins and ends a text of several lines
"""

Outcome = Literal["answered", "failed", "stopped"]


class Chat:
    """One conversation with one server."""

    def __init__(self, server: Server, model: str, conversation: Conversation, out: TextIO, notices: TextIO) -> None:
        """Answers are written to `out`, all else to `notices`."""
        self._server = server
        self._model = model
        self._conversation = conversation
        self._out = out
        self._notices = notices
        self._figures: Figures | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": lambda source: self._attach("image", source),
            "/video": lambda source: self._attach("video", source),
            "/clear": self._clear,
            "/system": self._system,
            "/set": self._set,
            "/retry": self._retry,
            "/stats": self._stats,
            "/help": lambda _: self._tell(HELP.rstrip()),
        }

    @property
    def commands(self) -> list[str]:
        return [*self._commands, "/quit"]

    def handle(self, line: str) -> bool:
        """Do what a line says.  Returns False where it ends the chat."""
        line = line.strip()
        word, _, rest = line.partition(" ")
        if word in ("/quit", "/exit", "/bye"):
            return False
        if word in self._commands:
            self._commands[word](rest.strip())
        elif re.fullmatch(r"/[a-z]*", word):
            self._tell(f"no such command: {word}{did_you_mean(word, self.commands) or '; /help lists them'}")
        elif line:
            self.ask(line)
        return True

    def ask(self, line: str) -> Outcome:
        """What went wrong is told."""
        try:
            self._conversation.ask(line)
        except AttachmentError as error:
            self._tell(f"error: {error}")
            return "failed"
        return self._answer()

    def _answer(self) -> Outcome:
        pieces: list[str] = []

        def show(text: str) -> None:
            pieces.append(text)
            self._out.write(displayed(text))
            self._out.flush()

        notice = ""
        outcome: Outcome = "answered"
        try:
            with asyncio.Runner() as runner:
                self._figures = runner.run(stream_answer(self._server, self._conversation.body(self._model), show))
            if self._figures.finish_reason == "length":
                notice = "[cut: the longest answer that was asked for, or that the context holds]"
        except ChatError as error:
            notice, outcome = f"error: {error}", "failed"
        except KeyboardInterrupt:
            notice, outcome = "[stopped]", "stopped"
        if pieces and not pieces[-1].endswith("\n"):
            print(file=self._out, flush=True)
        if notice:
            self._tell(notice)
        self._conversation.answered("".join(pieces))
        return outcome

    # ------------------------------------------------------------ commands

    def _attach(self, kind: Kind, source: str) -> None:
        if not source:
            self._tell(f"/{kind} FILE|URL")
            return
        try:
            self._conversation.attach(kind, source.strip("'\""))
        except AttachmentError as error:
            self._tell(f"error: {error}")
            return
        number = self._conversation.num_attached
        self._tell(f"{number} file{'s' if number > 1 else ''} will be shown with the next question")

    def _clear(self, _: str) -> None:
        self._conversation.clear()
        self._tell("what was said is forgotten")

    def _system(self, text: str) -> None:
        self._conversation.system = text or None
        self._tell("the system text is set" if text else "there is no system text")

    def _set(self, words: str) -> None:
        name, _, value = words.replace("=", " ", 1).partition(" ")
        if not name:
            settings = self._conversation.settings
            self._tell("\n".join(f"{key} {json.dumps(set_)}" for key, set_ in settings.items()) or "nothing is set")
        elif not value.strip():
            self._tell("/set NAME VALUE")
        elif error := self._conversation.set(name, value.strip()):
            self._tell(f"error: {error}")

    def _retry(self, _: str) -> None:
        if self._conversation.take_back():
            self._answer()
        else:
            self._tell("nothing was asked yet")

    def _stats(self, _: str) -> None:
        self._tell("there is no answer yet" if self._figures is None else figures_text(self._figures))

    def _tell(self, text: str) -> None:
        print(displayed(text), file=self._notices, flush=True)


def figures_text(figures: Figures) -> str:
    """One line."""
    cached = f" ({figures.cached_tokens} cached)" if figures.cached_tokens else ""
    words = [f"{figures.prompt_tokens} prompt tokens{cached}", f"{figures.output_tokens} output tokens"]
    if figures.ttft_s is not None:
        words.append(f"first token after {figures.ttft_s:.2f} s")
    if figures.output_tokens > 1 and figures.decode_s > 0:
        words.append(f"then {(figures.output_tokens - 1) / figures.decode_s:.1f} tokens/s")
    return ", ".join([*words, f"{figures.total_s:.2f} s in all"])
