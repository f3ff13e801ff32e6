"""A client process: loads in by stdin, replies out by stdout, until stdin ends."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import IO

import aiohttp
import uvloop

from vlmrt.tools.bench import frames
from vlmrt.tools.bench.media import Media, prepared
from vlmrt.tools.bench.player import Player

TELL_S = 0.25


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    gc.disable()  # a pause here would look like one of the server
    with os.fdopen(os.dup(1), "wb") as told, os.fdopen(os.dup(0), "rb") as heard:
        os.dup2(2, 1)  # what else is printed is no message
        try:
            while isinstance(order := frames.read_to_client(heard), frames.Prepare):
                serve(order, heard, told)
                gc.collect()
        except BrokenPipeError:  # the parent is gone
            return 1
        except Exception:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)  # a thread may still listen
    return 0


def serve(order: frames.Prepare, heard: IO[bytes], told: IO[bytes]) -> None:
    asks = [*order.load.streams, *(ask for client in order.load.clients for ask in client)]
    try:
        parts = prepared(media for ask in asks for media in ask.media)
    except (OSError, ValueError) as wrong:
        frames.write(told, frames.Unfit(str(wrong)))
        return
    frames.write(told, frames.Ready())
    if isinstance(frames.read_to_client(heard), frames.Connect):
        uvloop.run(play(order, parts, heard, told))


async def play(order: frames.Prepare, parts: dict[Media, bytes], heard: IO[bytes], told: IO[bytes]) -> None:
    """Play the load, tell what came back, wait for the parent's Stop."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    start: asyncio.Future[float] = loop.create_future()
    listener = threading.Thread(target=listen, args=(heard, loop, start, stop), name="listener", daemon=True)
    listener.start()
    connector = aiohttp.TCPConnector(limit=0, ssl=order.target.verified)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        player = Player(session, order.target, parts, order.load)
        await player.connect()
        frames.write(told, frames.Connected())
        start_s = await start
        await asyncio.sleep(start_s - time.monotonic())
        before_s, cpu_before_s = time.monotonic(), time.process_time()
        telling = loop.create_task(tell(player, told))
        await player.play(start_s, stop)
        telling.cancel()
        with suppress(asyncio.CancelledError):
            await telling
        cpu = (time.process_time() - cpu_before_s) / max(1e-6, time.monotonic() - before_s)
        frames.write(told, moving(player))
        frames.write(told, frames.Played(player.replies(), cpu))
        await stop.wait()
    listener.join()


def listen(
    heard: IO[bytes], loop: asyncio.AbstractEventLoop, start: asyncio.Future[float], stop: asyncio.Event
) -> None:
    """Wait for the parent's Start, then for its Stop; a parent that is gone ends the process at once."""
    while not isinstance(message := frames.read_to_client(heard), frames.Stop):
        if not isinstance(message, frames.Start):
            os._exit(1)
        loop.call_soon_threadsafe(start.set_result, message.start_s)
    loop.call_soon_threadsafe(stop.set)


async def tell(player: Player, told: IO[bytes]) -> None:
    while True:
        await asyncio.sleep(TELL_S)
        frames.write(told, moving(player))


def moving(player: Player) -> frames.Moving:
    now = player.standing
    return frames.Moving(now.num_done, now.num_failed, now.num_tokens, now.num_open)


if __name__ == "__main__":
    sys.exit(main())
