"""A console for a stream: bars and colours on a terminal, plain lines elsewhere, as NO_COLOR and FORCE_COLOR say."""

from __future__ import annotations

import os
from typing import TextIO

from rich.console import Console

from vlmrt.runtime.logs import wants_colour


def console_for(stream: TextIO) -> Console:
    """Its `is_terminal` is that of the stream: FORCE_COLOR colours a pipe's lines, and makes no bars in it."""
    is_terminal = stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    in_colour = wants_colour(stream, os.environ)
    return Console(
        file=stream,
        highlight=False,
        soft_wrap=True,
        force_terminal=is_terminal,
        no_color=not in_colour,
        color_system="auto" if in_colour and is_terminal else "standard" if in_colour else None,
    )
