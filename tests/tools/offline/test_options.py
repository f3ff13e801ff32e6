"""Keyword options are the command line's, by name, check and default; the package itself stays light."""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import Any

import pytest

import vlmrt
from vlmrt.tools.cli import build_parser
from vlmrt.tools.engine_options import add_engine
from vlmrt.tools.offline.options import EngineOptions, command_line, engine_options


def test_every_engine_option_of_the_command_line_is_a_keyword() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    add_engine(parser)
    assert set(EngineOptions.__annotations__) | {"model", "fault_hooks"} == set(vars(parser.parse_args([])))


def test_options_are_parsed_as_the_launch_command_would() -> None:
    words = command_line(
        "some/model",
        {
            "tp": 2,
            "kv_cache_gib": 0.5,
            "max_model_len": None,
            "no_prefix_caching": True,
            "no_embedding_caching": False,
            "allowed_media_domains": ["example.org", "10.0.0.0/8"],
        },
    )
    launched = build_parser().parse_args(["launch", *words])
    assert (launched.model, launched.tp, launched.kv_cache_gib, launched.max_model_len) == ("some/model", 2, 0.5, None)
    assert (launched.no_prefix_caching, launched.no_embedding_caching) == (True, False)
    assert launched.allowed_media_domains == ["example.org", "10.0.0.0/8"]


def test_the_generate_command_passes_all_of_its_options_on() -> None:
    given = ["--model", "m", "--max-num-seqs", "3", "--device", "cpu", "--served-model-name", "a", "b"]
    generating = build_parser().parse_args(["generate", "--prompt", "x", *given])
    words = command_line(generating.model, engine_options(generating))
    launched = vars(build_parser().parse_args(["launch", *words]))
    assert {name: launched[name] for name in EngineOptions.__annotations__} == engine_options(generating)
    assert launched["preset"] == "throughput"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_gib": 0}, "--kv-cache-gib: 0 is not a positive number"),
        ({"device": "tpu"}, "--device: invalid choice: 'tpu'"),
        ({"tp": -1}, "--tp: -1 is not at least 1"),
    ],
)
def test_a_wrong_value_is_refused_in_the_words_of_the_command_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command_line(None, options)


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(TypeError, match="'port' is no option"):
        command_line(None, {"port": 8000})


@pytest.mark.parametrize(
    ("program", "absent"),
    [
        ("import vlmrt", "msgspec aiohttp PIL rich zmq torch numpy"),
        ("from vlmrt import SamplingParams", "aiohttp PIL rich zmq torch numpy"),
        ("from vlmrt import LLM", "torch transformers numba triton zmq"),
        ("import vlmrt.tools.cli", "msgspec aiohttp PIL rich zmq torch numpy"),
        ("import vlmrt.tools.offline.generate, vlmrt.tools.offline.service", "torch transformers numba triton"),
    ],
)
def test_imports_stay_light(program: str, absent: str) -> None:
    check = f"import sys; {program}; print([name for name in {absent.split()} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_can_be_imported() -> None:
    for name in vlmrt.__all__:
        assert getattr(vlmrt, name).__name__ == name
    assert set(vlmrt.__all__) <= set(dir(vlmrt))
    with pytest.raises(AttributeError, match="no attribute 'LLMS'"):
        _ = vlmrt.LLMS
