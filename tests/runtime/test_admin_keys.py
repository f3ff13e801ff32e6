"""Who may administer over TCP: tokens, key files, and everybody else."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import zmq

from tests.runtime.admin_world import AdminWorld, admin_world
from vlmrt.runtime.admin_keys import ClientKeys, client_keys, make_key_files, server_keys
from vlmrt.runtime.admin_messages import GetStats, StatsReply
from vlmrt.runtime.config import AdminOptions
from vlmrt.runtime.errors import StartupError
from vlmrt.tools.admin.client import AdminClient, ServiceSilent

ANY_PORT = "tcp://127.0.0.1:0"
REFUSED_S = 0.5  # no answer comes, however long one waits


def token_file(folder: Path, token: str, name: str = "token") -> str:
    path = folder / name
    path.write_text(token + "\n")
    return str(path)


def tcp_address(world: AdminWorld) -> str:
    assert world.server is not None
    return world.server.addresses[1]


async def is_refused(address: str, keys: ClientKeys | None) -> bool:
    async with AdminClient(address, keys) as client:
        with pytest.raises(ServiceSilent):
            await client.ask(GetStats(), StatsReply, REFUSED_S)
    return True


async def test_whoever_knows_the_token_is_let_in_and_nobody_else(short_dir: Path, tmp_path: Path) -> None:
    options = AdminOptions(ANY_PORT, token_file=token_file(tmp_path, "correct horse battery"))
    async with admin_world(short_dir, tcp_address=ANY_PORT, keys=server_keys(options)) as world:
        address = tcp_address(world)
        assert address.startswith("tcp://127.0.0.1:")
        right = client_keys(None, options.token_file)
        async with AdminClient(address, right) as client:
            assert (await client.ask(GetStats(), StatsReply)).model == "test-model"
        assert await is_refused(address, client_keys(None, token_file(tmp_path, "correct horse batterz", "wrong")))
        assert await is_refused(address, None)


async def test_a_key_that_the_server_does_not_know_is_refused_and_counted(short_dir: Path, tmp_path: Path) -> None:
    server, client = make_key_files(tmp_path / "keys")
    keys = server_keys(AdminOptions(ANY_PORT, keys=str(server)))
    async with admin_world(short_dir, tcp_address=ANY_PORT, keys=keys) as world:
        address = tcp_address(world)
        right = client_keys(str(client), None)
        assert right is not None
        async with AdminClient(address, right) as known:
            await known.ask(GetStats(), StatsReply)
        assert world.bad_frames() == 0
        public, secret = zmq.curve_keypair()
        assert await is_refused(address, ClientKeys(right.server, public, secret))
        assert world.bad_frames() >= 1
        async with AdminClient(world.address) as local:  # the run directory's own socket needs none
            await local.ask(GetStats(), StatsReply)


def test_key_files_are_private_and_are_not_overwritten(tmp_path: Path) -> None:
    server, client = make_key_files(tmp_path / "keys")
    for folder in (server, client):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*.*")} == {0o600}
    with pytest.raises(FileExistsError):
        make_key_files(tmp_path / "keys")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (AdminOptions(ANY_PORT), "whoever reaches it could steer the service; give --admin-keys DIR"),
        (AdminOptions(ANY_PORT, keys="/a", token_file="/b"), "one of them"),
        (AdminOptions(keys="/a"), "--admin-keys /a: is for --admin-address"),
        (AdminOptions(token_file="/b"), "--admin-token-file /b: is for --admin-address"),
        (AdminOptions("tcp://localhost", token_file="/b"), "must be tcp://HOST:PORT"),
        (AdminOptions("http://localhost:1", token_file="/b"), "must be tcp://HOST:PORT"),
        (AdminOptions("tcp://localhost:99999", token_file="/b"), "must be tcp://HOST:PORT"),
        (AdminOptions("ipc:///tmp/x", token_file="/b"), "must be tcp://HOST:PORT"),
        (AdminOptions("tcp://me@localhost:1", token_file="/b"), "must be tcp://HOST:PORT"),
        (AdminOptions("tcp://127.0.0.1:1/x", token_file="/b"), "must be tcp://HOST:PORT"),
        (AdminOptions(ANY_PORT, token_file="/nowhere"), "--admin-token-file /nowhere: No such file"),
        (AdminOptions(ANY_PORT, keys="/nowhere"), "--admin-keys: /nowhere/server.secret: No such file"),
    ],
)
def test_options_that_would_leave_a_door_open_or_shut_are_refused(options: AdminOptions, message: str) -> None:
    with pytest.raises(StartupError, match=message.replace("(", r"\(")):
        server_keys(options)


def test_a_short_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="a token of 15 bytes; at least 16"):
        server_keys(AdminOptions(ANY_PORT, token_file=token_file(tmp_path, "x" * 15)))


@pytest.mark.parametrize("text", ["", "short", "x" * 39 + " y", "\xff" * 40])
def test_a_file_that_holds_no_key_is_named(text: str, tmp_path: Path) -> None:
    server, _ = make_key_files(tmp_path / "keys")
    (server / "server.secret").write_text(text)
    with pytest.raises(StartupError, match=r"server\.secret holds no CURVE key"):
        server_keys(AdminOptions(ANY_PORT, keys=str(server)))


def test_keys_without_a_client_are_refused(tmp_path: Path) -> None:
    server, _ = make_key_files(tmp_path / "keys")
    (server / "clients" / "client.public").unlink()
    with pytest.raises(StartupError, match="no client's key"):
        server_keys(AdminOptions(ANY_PORT, keys=str(server)))


async def test_an_address_in_use_ends_the_start_with_its_name(short_dir: Path, tmp_path: Path) -> None:
    options = AdminOptions(ANY_PORT, token_file=token_file(tmp_path, "correct horse battery"))
    async with admin_world(short_dir, tcp_address=ANY_PORT, keys=server_keys(options)) as world:
        taken = tcp_address(world)
        world.stop()
        world.start(taken, server_keys(options))
        (short_dir / "other").mkdir()
        with pytest.raises(StartupError, match="cannot listen there: Address already in use"):
            async with admin_world(short_dir / "other", tcp_address=taken, keys=server_keys(options)):
                raise AssertionError("unreachable")
