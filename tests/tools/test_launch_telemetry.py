"""What `vlmrt launch` is told about metrics and spans ends up in the config, or is refused in one line."""

from __future__ import annotations

import pytest

from vlmrt.runtime.config import ServerOptions
from vlmrt.runtime.errors import StartupError
from vlmrt.tools.arguments import Parser
from vlmrt.tools.launch import server_options
from vlmrt.tools.launch_command import add_arguments


def options(*words: str) -> ServerOptions:
    parser = Parser(prog="vlmrt launch")
    add_arguments(parser)
    return server_options(parser.parse_args(words))


def test_neither_is_on_unless_asked_for() -> None:
    assert (options().metrics_compat, options().otlp_endpoint) == ("none", "")


def test_both_are_handed_on() -> None:
    found = options("--metrics-compat", "vllm", "--otlp-endpoint", "http://127.0.0.1:4318")
    assert (found.metrics_compat, found.otlp_endpoint) == ("vllm", "http://127.0.0.1:4318")


def test_an_endpoint_that_is_no_url_ends_the_start() -> None:
    with pytest.raises(StartupError, match=r"^--otlp-endpoint 'collector:4318' is no http or https URL"):
        options("--otlp-endpoint", "collector:4318")
