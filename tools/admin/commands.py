"""What each sub-command of `vlmrt admin` asks and prints."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path

import msgspec

from vlmrt.runtime.admin_keys import ClientKeys, client_keys, make_key_files
from vlmrt.runtime.admin_messages import (
    MAX_ACTOR_LENGTH,
    MAX_ID_LENGTH,
    BeginDrain,
    BeginProfile,
    CachesReply,
    CancelOne,
    CancelReply,
    ConfigReply,
    DrainReply,
    EndDrain,
    EndProfile,
    GetCaches,
    GetConfig,
    GetDrain,
    GetRequests,
    GetStats,
    GetTrace,
    LevelReply,
    ProfileReply,
    RequestsReply,
    ResetCaches,
    SetLevel,
    StatsReply,
    TraceReply,
)
from vlmrt.runtime.errors import StartupError
from vlmrt.runtime.questions import CacheKind
from vlmrt.tools.admin.client import AdminClient, AdminError, ServiceSilent, check_keys
from vlmrt.tools.admin.config_view import config_lines, config_rows
from vlmrt.tools.admin.discovery import find_address
from vlmrt.tools.admin.figures import plural
from vlmrt.tools.admin.text_views import caches_lines, requests_lines, stats_lines
from vlmrt.tools.admin.trace_view import named_timeline, trace_lines

POLL_S = 0.5  # of drain --wait
PROFILE_TIMEOUT_S = 130.0  # what was recorded on a GPU takes long to write
CACHES: Mapping[str, tuple[CacheKind, ...]] = {
    "prefix": ("prefix",),
    "embedding": ("embedding",),
    "all": ("prefix", "embedding"),
}


def run_command(arguments: argparse.Namespace) -> int:
    """Returns the exit status: 0 done, 1 an error said in one line, 130 interrupted."""
    try:
        if arguments.admin_command == "keygen":
            return _keygen(Path(arguments.directory))
        keys = client_keys(arguments.keys, arguments.token_file)
        if arguments.admin_command == "top":
            from vlmrt.tools.admin.top.app import run_top

            return run_top(arguments.address, arguments.pid, keys)
        address = find_address(arguments.address, arguments.pid)
        return asyncio.run(_connected(arguments, address, keys))
    except (AdminError, StartupError) as error:
        print(f"vlmrt admin: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


async def _connected(arguments: argparse.Namespace, address: str, keys: ClientKeys | None) -> int:
    check_keys(address, keys)
    async with AdminClient(address, keys, arguments.timeout) as client:
        await COMMANDS[arguments.admin_command](client, arguments)
    return 0


async def _stats(client: AdminClient, arguments: argparse.Namespace) -> None:
    while True:
        reply = await client.ask(GetStats(), StatsReply)
        if arguments.json:
            _say([msgspec.json.encode(reply.stats).decode()])
        else:
            _say(stats_lines(reply))
        if not arguments.watch:
            return
        await asyncio.sleep(arguments.interval)
        if not arguments.json:
            _say([""])


async def _requests(client: AdminClient, arguments: argparse.Namespace) -> None:
    reply = await client.ask(GetRequests(), RequestsReply)
    _say([msgspec.json.encode(row).decode() for row in reply.rows] if arguments.json else requests_lines(reply))


async def _cancel(client: AdminClient, arguments: argparse.Namespace) -> None:
    reply = await client.ask(CancelOne(_id(arguments)), CancelReply)
    _say([f"cancelled {plural(reply.num_answers, 'request')}"])


async def _trace(client: AdminClient, arguments: argparse.Namespace) -> None:
    reply = await client.ask(GetTrace(_id(arguments)), TraceReply)
    if arguments.json:
        _say([json.dumps(named_timeline(reply))])
    else:
        blocks = "█" if (sys.stdout.encoding or "").lower().startswith("utf") else "#"
        _say(trace_lines(reply, shutil.get_terminal_size().columns, bar=blocks))


async def _cache(client: AdminClient, arguments: argparse.Namespace) -> None:
    question = GetCaches() if arguments.action == "show" else ResetCaches(CACHES[arguments.kind])
    _say(caches_lines(await client.ask(question, CachesReply)))


async def _drain(client: AdminClient, arguments: argparse.Namespace) -> None:
    reply = await client.ask(BeginDrain(stop=arguments.stop), DrainReply)
    _say([_drain_text(reply)])
    shown = reply.num_open
    while arguments.wait and reply.num_open != 0:
        await asyncio.sleep(POLL_S)
        try:
            reply = await client.ask(GetDrain(), DrainReply)
        except ServiceSilent:
            if not arguments.stop:
                raise
            _say(["the service has ended"])
            return
        if not reply.draining:
            raise AdminError("the drain was taken back: new requests are taken")
        if reply.num_open != shown:
            shown = reply.num_open
            _say([_drain_text(reply)])


async def _undrain(client: AdminClient, arguments: argparse.Namespace) -> None:
    _say([_drain_text(await client.ask(EndDrain(), DrainReply))])


async def _config(client: AdminClient, arguments: argparse.Namespace) -> None:
    reply = await client.ask(GetConfig(), ConfigReply)
    rows = config_rows(reply.values, reply.origins)
    if arguments.json:
        _say([json.dumps({row.name: {"value": row.value, "origin": row.origin} for row in rows})])
    else:
        _say(config_lines(rows))


async def _log_level(client: AdminClient, arguments: argparse.Namespace) -> None:
    actor = _told("--actor", arguments.actor, MAX_ACTOR_LENGTH) if arguments.actor else ""
    reply = await client.ask(SetLevel(arguments.level, actor), LevelReply)
    _say([f"{', '.join(reply.actors) or 'nobody that is up'} from now on: {arguments.level}"])


async def _profile(client: AdminClient, arguments: argparse.Namespace) -> None:
    actor = _told("ACTOR", arguments.actor, MAX_ACTOR_LENGTH)
    if arguments.action == "start":
        begun = await client.ask(BeginProfile(actor, arguments.seconds), ProfileReply, PROFILE_TIMEOUT_S)
        _say(
            [
                f"recording {actor} for {arguments.seconds:g} s, into {begun.profile.path}",
                f"`vlmrt admin profile stop {actor}` ends it earlier",
            ]
        )
    else:
        ended = await client.ask(EndProfile(actor), ProfileReply, PROFILE_TIMEOUT_S)
        _say([f"written: {ended.profile.path}"])


def _id(arguments: argparse.Namespace) -> str:
    return _told("ID", arguments.id, MAX_ID_LENGTH)


def _told(name: str, text: str, max_length: int) -> str:
    """What a service would drop as no request, and never answer, is an error here."""
    if not (text.isascii() and 1 <= len(text) <= max_length):
        raise AdminError(f"{name} {text!a}: must be 1 to {max_length} ASCII characters")
    return text


Run = Callable[[AdminClient, argparse.Namespace], Awaitable[None]]
COMMANDS: Mapping[str, Run] = {
    "stats": _stats,
    "requests": _requests,
    "cancel": _cancel,
    "trace": _trace,
    "cache": _cache,
    "drain": _drain,
    "undrain": _undrain,
    "config": _config,
    "log-level": _log_level,
    "profile": _profile,
}


def _drain_text(reply: DrainReply) -> str:
    if not reply.draining:
        return "new requests are taken"
    count = "an edge does not say how many are" if reply.num_open is None else f"{reply.num_open}"
    end = "the service ends when none is" if reply.stops else "`vlmrt admin undrain` takes it back"
    return f"draining: new requests are refused, {count} open; {end}"


def _keygen(directory: Path) -> int:
    try:
        server, client = make_key_files(directory)
    except OSError as error:
        raise AdminError(f"{directory}: {error.strerror}") from None
    _say(
        [
            f"for the service:  --admin-keys {server}",
            f"for operators:    --keys {client}  (a secret; more of them: their client.public in {server}/clients/)",
        ]
    )
    return 0


def _say(lines: Iterable[str]) -> None:
    """On standard output, at once: somebody may be reading along."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()
