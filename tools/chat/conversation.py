"""What has been said, what is attached to the next question, and how answers are asked for; no input and no output."""

from __future__ import annotations

import json
from typing import Any

from vlmrt.tools.arguments import did_you_mean
from vlmrt.tools.chat.attachments import Kind, Part, attach, parts_of

SETTINGS = (  # of /set: fields of a request
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "max_tokens",
    "seed",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


class Conversation:
    def __init__(self, system: str | None = None, settings: dict[str, Any] | None = None) -> None:
        self.system = system
        self.settings: dict[str, Any] = dict(settings or {})
        self._messages: list[dict[str, Any]] = []
        self._attached: list[Part] = []

    @property
    def num_attached(self) -> int:
        return len(self._attached)

    def attach(self, kind: Kind, source: str) -> None:
        """Show this with the next question.  Raises: AttachmentError."""
        self._attached.append(attach(kind, source))

    def ask(self, line: str) -> None:
        """Add a question, with what is attached to it and the files that it names.  Raises: AttachmentError."""
        parts: list[Part] = [
            {"type": "text", "text": part} if isinstance(part, str) else attach(*part) for part in parts_of(line)
        ]
        content: str | list[Part] = [*self._attached, *parts]
        if not self._attached and all(part["type"] == "text" for part in parts):
            content = line
        self._messages.append({"role": "user", "content": content})
        self._attached = []

    def answered(self, text: str) -> None:
        """The answer, or as much of it as came; without any the question is taken back."""
        if text:
            self._messages.append({"role": "assistant", "content": text})
        else:
            self._messages.pop()

    def take_back(self) -> bool:
        """Forget the last answer, so that its question may be asked again; False where there is none."""
        if not self._messages:
            return False
        self._messages.pop()
        return True

    def clear(self) -> None:
        """Forget what was said and attached; the system text and the settings stay."""
        self._messages.clear()
        self._attached.clear()

    def body(self, model: str) -> dict[str, Any]:
        """The request for the next answer."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return {
            "model": model,
            "messages": [*system, *self._messages],
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.settings,
        }

    def set(self, name: str, text: str) -> str:
        """Change a setting; `default` leaves it to the server.  Returns an error in one line, or nothing."""
        name = name.replace("-", "_")
        if name not in SETTINGS:
            return f"no such setting: {name}{did_you_mean(name, SETTINGS) or '; there are ' + ', '.join(SETTINGS)}"
        if text == "default":
            self.settings.pop(name, None)
            return ""
        try:
            self.settings[name] = json.loads(text)
        except ValueError:
            if name != "stop":
                return f"{name}: {text!r} is not a number"
            self.settings[name] = text
        return ""
