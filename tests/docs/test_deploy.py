"""The files of docs/deploy fit the server: its options, routes, times and users."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
import yaml

from tests.docs.pages import DEPLOY, ROOT
from vlmrt.actors.edge.openapi import openapi_document
from vlmrt.runtime import supervisor
from vlmrt.runtime.config import ServerOptions
from vlmrt.tools.arguments import Parser
from vlmrt.tools.launch_command import add_arguments
from vlmrt.tools.settings import settings_of, variable_of

DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
NGINX = (DEPLOY / "nginx.conf").read_text()
TO_THE_END_S = 2 * supervisor._EXIT_MARGIN_S + supervisor._OTHERS_GRACE_S  # beyond the grace time, before SIGKILL


def launch_parser() -> Parser:
    parser = Parser(prog="vlmrt launch")
    add_arguments(parser)
    return parser


def launched(words: list[str]) -> argparse.Namespace:
    """The options of `vlmrt launch ...`; one that it does not have ends the test."""
    assert words[0] == "launch"
    return launch_parser().parse_args(words[1:])


def routes() -> set[str]:
    return set(json.loads(openapi_document(ServerOptions(admin_routes=True)))["paths"])


# ---------------------------------------------------------------- the image


def instructions() -> Iterator[tuple[str, str]]:
    lines = [line for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]
    for instruction in "\n".join(lines).replace("\\\n", " ").splitlines():
        name, _, rest = instruction.partition(" ")
        yield name, " ".join(rest.split())


def last(name: str) -> str:
    return [rest for found, rest in instructions() if found == name][-1]


def test_the_image_runs_the_command_as_a_user_without_rights_and_hands_it_signals() -> None:
    user = last("USER").partition(":")[0]
    assert user.isdigit()
    assert int(user) > 0
    assert json.loads(last("ENTRYPOINT")) == ["tini", "--", "vlmrt"]  # no shell between a signal and its receiver
    launched(json.loads(last("CMD")))


def test_every_base_of_the_image_has_a_tag_that_does_not_move_to_another_python() -> None:
    bases = [rest.split()[0] for name, rest in instructions() if name == "FROM"]
    assert bases
    assert all(re.fullmatch(r"python:\$\{PYTHON\}-slim-\w+", base) for base in bases)
    assert re.fullmatch(r"PYTHON=3\.\d+", next(rest for name, rest in instructions() if name == "ARG"))


def test_the_image_is_made_of_all_folders_of_the_package_and_of_nothing_that_its_context_leaves_out() -> None:
    copied = {rest.split()[0] for name, rest in instructions() if name == "COPY" and not rest.startswith("--from")}
    files = {word for name, rest in instructions() if name == "COPY" for word in rest.split()[:-1]}
    files = {word for word in files if not word.startswith(("--", "/"))}
    packages = {link.name for link in (ROOT / "src" / "vlmrt").iterdir() if link.is_symlink()}
    assert packages | {"src"} <= copied
    assert all((ROOT / file).exists() for file in files)
    kept = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert files == {line[1:] for line in kept if line.startswith("!")}


def test_variables_of_the_image_are_options_of_a_launch() -> None:
    variables = {variable_of(name) for name in settings_of(launch_parser())}
    environment = dict(pair.split("=", 1) for pair in last("ENV").split())
    ours = {name for name in environment if name.startswith("VLMRT_")}
    assert ours
    assert ours <= variables
    assert environment["VLMRT_PORT"] == last("EXPOSE")


@pytest.mark.parametrize(("status", "is_healthy"), [(200, True), (503, False)])
def test_the_health_check_of_the_image_is_about_the_status_of_a_route(status: int, is_healthy: bool) -> None:
    asked = []

    class Edge(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    _, _, command = last("HEALTHCHECK").partition(" CMD ")
    program, *words = json.loads(command)
    assert program == "python"
    with HTTPServer(("127.0.0.1", 0), Edge) as server:
        server.timeout = 60
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        environment = {**os.environ, "VLMRT_PORT": str(server.server_port), "no_proxy": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-S", *words], env=environment, timeout=60, stderr=subprocess.DEVNULL, check=False
        )
        thread.join(timeout=60)
    assert (done.returncode == 0) is is_healthy
    assert asked == ["/health/ready"]
    assert asked[0] in routes()


# ---------------------------------------------------------------- Kubernetes


@pytest.fixture(scope="module")
def manifest() -> dict[str, dict[str, Any]]:
    objects = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    return {found["kind"]: found for found in objects}


@pytest.fixture(scope="module")
def pod(manifest: dict[str, dict[str, Any]]) -> dict[str, Any]:
    spec: dict[str, Any] = manifest["Deployment"]["spec"]["template"]["spec"]
    return spec


def test_probes_ask_routes_of_the_edge_on_the_port_that_it_is_given(pod: dict[str, Any]) -> None:
    container = pod["containers"][0]
    port = {entry["name"]: entry["containerPort"] for entry in container["ports"]}["http"]
    assert launched(container["args"]).port == port
    for probe, path in {
        "startupProbe": "/health/live",
        "livenessProbe": "/health/live",  # a restart of one process must not become one of all
        "readinessProbe": "/health/ready",
    }.items():
        asked = container[probe]["httpGet"]
        assert asked == {"path": path, "port": "http"}
        assert path in routes()


def test_a_pod_is_given_the_time_that_an_end_in_order_takes(pod: dict[str, Any]) -> None:
    container = pod["containers"][0]
    _, before_s = container["lifecycle"]["preStop"]["exec"]["command"]
    grace_s = launched(container["args"]).shutdown_grace_s
    assert pod["terminationGracePeriodSeconds"] >= float(before_s) + grace_s + TO_THE_END_S


def test_a_pod_has_the_user_of_the_image_and_writes_to_its_volumes_only(pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" == last("USER")
    container = pod["containers"][0]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounted) == {volume["name"] for volume in pod["volumes"]}
    assert {"/cache", "/tmp"} <= set(mounted.values())
    assert launched(container["args"]).api_key_file.startswith(f"{mounted['keys']}/")


def test_the_service_finds_the_pods(manifest: dict[str, dict[str, Any]]) -> None:
    labels = manifest["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert manifest["Service"]["spec"]["selector"].items() <= labels.items()
    assert manifest["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert manifest["Service"]["spec"]["ports"][0]["targetPort"] == "http"


# ---------------------------------------------------------------- systemd and nginx


def unit() -> dict[str, str]:
    lines = (DEPLOY / "vlmrt.service").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def test_the_unit_launches_with_options_that_exist_and_is_given_the_time_to_end() -> None:
    settings = unit()
    program, *words = shlex.split(settings["ExecStart"])
    assert program.endswith("/vlmrt")
    assert float(settings["TimeoutStopSec"]) >= launched(words).shutdown_grace_s + TO_THE_END_S
    assert settings["KillMode"] == "mixed"
    assert settings["OOMPolicy"] == "continue"
    assert settings["User"] not in ("", "root")


def test_the_proxy_passes_streams_on_and_waits_as_long_as_a_request_may_take() -> None:
    defaults = launch_parser().parse_args([])
    settings = dict(re.findall(r"^\s+(\w+) ([^;{]+);", NGINX, re.MULTILINE))
    assert settings["proxy_buffering"] == "off"
    assert int(settings["proxy_read_timeout"].removesuffix("s")) > defaults.request_timeout_s
    assert settings["client_max_body_size"] == f"{defaults.max_body_mib}m"


def test_what_the_proxy_keeps_from_strangers_are_routes() -> None:
    kept = re.search(r"\^/\(([\w|]+)\)\$", NGINX)
    assert kept is not None
    assert {f"/{name}" for name in kept[1].split("|")} <= routes()
