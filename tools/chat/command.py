"""`vlmrt chat`: a chat on the terminal, or one question."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vlmrt.tools.argument_types import number, whole_number

if TYPE_CHECKING:
    from vlmrt.tools.chat.chat import Chat
    from vlmrt.tools.chat.client import Server

URL = "http://127.0.0.1:8000"
DEMO = "demo"
SETTINGS = ("temperature", "top_p", "max_tokens", "seed")
STATUSES = {"answered": 0, "failed": 1, "stopped": 130}
MAX_STDIN_BYTES = 16 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Chat with the model of a running server, or of one that this command starts. With QUESTION, or with text on "
        "standard input, one answer is printed. At the prompt, /help lists the commands; paths of pictures and clips "
        "may stand in a line."
    )
    parser.add_argument("question", nargs="*", metavar="QUESTION", help="asked at once, then the command ends")
    server = parser.add_argument_group("server")
    one = server.add_mutually_exclusive_group()
    one.add_argument("--url", metavar="URL", help=f"of a server with OpenAI's API; default: $VLMRT_URL, else {URL}")
    one.add_argument(
        "--model",
        metavar="DIR|HUB_ID",
        help="start a server for this chat alone, which ends with it; demo: of the demo model",
    )
    server.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="its first key is sent; default: that of VLMRT_API_KEY, if it is set",
    )
    asking = parser.add_argument_group("asking")
    asking.add_argument("--system", metavar="TEXT", help="what the model is told before everything")
    asking.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE|URL",
        help="shown with the first question; may be repeated",
    )
    asking.add_argument("--video", action="append", default=[], metavar="FILE|URL", help="a clip, as --image")
    asking.add_argument("--temperature", type=number, metavar="F", help="0: greedy; default: the server's")
    asking.add_argument("--top-p", type=number, metavar="F", help="only the likeliest tokens that make up this much")
    asking.add_argument("--max-tokens", type=whole_number, metavar="N", help="default: as much as the context holds")
    asking.add_argument("--seed", type=whole_number, metavar="N", help="the same draws again")
    asking.add_argument("--stats", action="store_true", help="figures of the answer to QUESTION, on standard error")


def run(arguments: argparse.Namespace) -> int:
    import asyncio

    from vlmrt.runtime.errors import VlmrtError
    from vlmrt.tools.chat.attachments import AttachmentError
    from vlmrt.tools.chat.chat import Chat
    from vlmrt.tools.chat.client import ChatError, first_model
    from vlmrt.tools.chat.conversation import Conversation
    from vlmrt.tools.displayed import displayed

    settings = {name: getattr(arguments, name) for name in SETTINGS if getattr(arguments, name) is not None}
    conversation = Conversation(arguments.system, settings)
    question = _question(arguments.question)
    if question == "":
        print("vlmrt chat: error: neither QUESTION nor standard input says anything", file=sys.stderr)
        return 2
    try:
        for image in arguments.image:
            conversation.attach("image", image)
        for video in arguments.video:
            conversation.attach("video", video)
        with _server(arguments) as server:
            model = asyncio.run(first_model(server))
            notices = sys.stdout if question is None else sys.stderr
            chat = Chat(server, model, conversation, sys.stdout, notices)
            if question is None:
                _talk(chat, model, server)
                return 0
            outcome = chat.ask(question)
            if arguments.stats:
                chat.handle("/stats")
            return STATUSES[outcome]
    except (ChatError, AttachmentError, VlmrtError, OSError) as error:
        print(f"vlmrt chat: error: {displayed(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _question(words: list[str]) -> str | None:
    """What is asked without a prompt: the command line's words, and what a pipe brings; None: somebody will type."""
    asked = " ".join(words)
    if sys.stdin.isatty():
        return asked or None
    piped = sys.stdin.buffer.read(MAX_STDIN_BYTES).decode(errors="replace").strip()
    return "\n\n".join(text for text in (asked, piped) if text)


@contextlib.contextmanager
def _server(arguments: argparse.Namespace) -> Iterator[Server]:
    """The one that is named, or one that lives as long as the block.  Raises: VlmrtError where it does not start."""
    from vlmrt.tools.api_keys import first_key
    from vlmrt.tools.chat.client import Server

    if arguments.model is None:
        url = (arguments.url or os.environ.get("VLMRT_URL") or URL).rstrip("/").removesuffix("/v1")
        yield Server(url, first_key(arguments.api_key_file, os.environ))
        return
    from vlmrt.tools.offline.engine import Engine
    from vlmrt.tools.offline.options import command_line

    words = command_line(None if arguments.model == DEMO else arguments.model, {"preset": "interactive"})
    with contextlib.closing(Engine(words)) as engine:
        yield Server(engine.url)


def _talk(chat: Chat, model: str, server: Server) -> None:
    from vlmrt.tools.chat.lines import history_file, read_lines
    from vlmrt.tools.displayed import displayed

    where = "a server of this chat's own" if server.url.startswith("unix:") else server.url
    print(f"{displayed(model)} at {where}; /help lists commands, Ctrl-D ends")
    for line in read_lines(chat.commands, history_file(os.environ)):
        if not chat.handle(line):
            return
