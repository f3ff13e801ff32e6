"""What the pages name is there: files, sections, options, metrics; and their examples can be read."""

from __future__ import annotations

import argparse
import ast
import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.docs.pages import PAGES, ROOT, anchors, blocks, links, name_of
from vlmrt.runtime.metric_table import METRICS
from vlmrt.tools.arguments import Parser
from vlmrt.tools.cli import build_parser
from vlmrt.tools.launch_command import add_arguments
from vlmrt.tools.settings import settings_of, variable_of

OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]")
METRIC = re.compile(r"\bvlmrt_[a-z0-9_]+[a-z0-9]")
OF_OTHERS = {  # options in examples that are other programs'
    "build-arg": "docker",
    "gpus": "docker",
    "ipc": "docker",
    "read-only": "docker",
    "rm": "docker",
    "shm-size": "docker",
    "stop-timeout": "docker",
    "tmpfs": "docker",
    "start-period": "Dockerfile",
    "strict": "mypy",
}
SERIES = ("_bucket", "_sum", "_count")
VARIABLE = re.compile(r"\bVLMRT_[A-Z_]*[A-Z]")
NO_OPTIONS = {  # variables that are none of `vlmrt launch`'s options
    "VLMRT_CONFIG": "its file",
    "VLMRT_URL": "of vlmrt chat",
    "VLMRT_SERVICE_HOST": "of Kubernetes",
}
CODE = re.compile(r"\b[45]\d\d `([a-z_]+)`")


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """Of a parser and all commands behind it, those that no help shows as well."""
    if isinstance(parser, Parser):
        parser.load()
    found = set()
    for action in parser._actions:
        found |= set(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            found |= {option for child in action.choices.values() for option in options_of(child)}
    return found


def options_of_benchmarks() -> set[str]:
    """And of the other programs of the repository that pages name."""
    places = ("benchmarks/**/*.py", "tests/judges/*.py", "tests/tools/bench/scripted_server.py", "tools/demo/*.py")
    programs = [file for place in places for file in ROOT.glob(place)]
    return {flag for file in programs for flag in re.findall(r"\"(--[a-z0-9-]+)\"", file.read_text())}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_to_a_file_and_a_section_of_it(page: Path) -> None:
    for file, anchor in links(page):
        assert file.exists(), f"{name_of(page)}: no {file}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{name_of(page)}: {file.name} has no section {anchor}"


def test_every_option_that_a_page_names_is_one_of_a_command() -> None:
    known = options_of(build_parser()) | options_of_benchmarks() | {f"--{name}" for name in OF_OTHERS}
    assert "--max-num-seqs" in known
    named = {(page, option) for page in PAGES for option in OPTION.findall(page.read_text())}
    unknown = {(name_of(page), option) for page, option in named if option not in known | peers_options(page)}
    assert not unknown


def peers_options(page: Path) -> set[str]:
    """Those in lines about the commands of peers, which are not ours to keep."""
    lines = [line for line in page.read_text().splitlines() if "vllm " in line or "pip install" in line]
    return {option for line in lines for option in OPTION.findall(line)}


def test_options_of_other_programs_are_named_by_a_page() -> None:
    named = {option for page in PAGES for option in OPTION.findall(page.read_text())}
    assert {f"--{name}" for name in OF_OTHERS} <= named


def test_every_variable_that_a_page_names_is_an_option_of_a_launch() -> None:
    parser = Parser(prog="vlmrt launch")
    add_arguments(parser)
    known = {variable_of(name) for name in settings_of(parser)} | set(NO_OPTIONS)
    assert {name for page in PAGES for name in VARIABLE.findall(page.read_text())} <= known


def test_every_code_of_an_error_that_a_page_names_is_in_the_source() -> None:
    named = {code for page in PAGES for code in CODE.findall(page.read_text())}
    assert {"too_many_requests", "request_timeout"} <= named
    source = "".join(file.read_text() for folder in ("actors", "runtime") for file in (ROOT / folder).rglob("*.py"))
    made = {f"too_many_{what}" for what in ("images", "videos")}  # by name, in actors/edge/chat_prompt.py
    assert {code for code in named - made if f'"{code}"' not in source} == set()


def test_every_metric_that_a_page_names_is_one() -> None:
    found = {(name_of(page), name) for page in PAGES for name in METRIC.findall(page.read_text())}
    assert len(found) > 20
    unknown = {place for place in found if not is_metric(place[1].removeprefix("vlmrt_"))}
    assert not unknown


def is_metric(name: str) -> bool:
    bases = {name.removesuffix(suffix) for suffix in SERIES if name.endswith(suffix)}
    return name in METRICS or any(base in METRICS and METRICS[base].kind == "histogram" for base in bases)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_examples_can_be_read_by_what_they_are_for(page: Path) -> None:
    for block in blocks(page):
        if block.language == "json":
            read_json(block.text)
        elif block.language == "yaml":
            assert yaml.safe_load(block.text) is not None
        elif block.language == "toml":
            assert tomllib.loads(block.text)
        elif block.language == "python":
            ast.parse(block.text)


def read_json(text: str) -> None:
    """One value, or one on each line.  Raises: ValueError."""
    try:
        json.loads(text)
    except ValueError:
        for line in text.splitlines():
            json.loads(line)
