"""A service without actors: `python -m tests.tools.offline.fake_service REPORT_FD PARENT_PID LIFE [FOLDER]`.

Its chat completions do what the last message says: hang, die, refuse, or else it is repeated.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

from aiohttp import web

from vlmrt.tools.offline.reports import Loading, ServiceFailed, ServiceNews, ServiceReady, encode_report


def report(fd: int, *reports: Loading | ServiceFailed | ServiceNews | ServiceReady) -> None:
    os.write(fd, b"".join(encode_report(one) + b"\n" for one in reports))


def completion(text: str, usage: tuple[int, int] = (3, 2)) -> dict[str, Any]:
    return {
        "id": "chatcmpl-fake",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"content": text}, "token_ids": [7, 8]}],
        "usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1]},
        "prompt_token_ids": [1, 2, 3],
    }


async def chat(request: web.Request) -> web.Response:
    said = (await request.json())["messages"][-1]["content"]
    folder: Path = request.app["folder"]
    match said:
        case "hang":
            (folder / "hanging").touch()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                (folder / "cancelled").touch()
                raise
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "refuse":
            error = {"message": "refused", "type": "invalid_request_error", "param": "messages", "code": "no"}
            return web.json_response({"error": error}, status=400)
    return web.json_response(completion(said))


async def serve(report_fd: int, folder: Path) -> int:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    app = web.Application()
    app["folder"] = folder
    app.add_routes([web.post("/v1/chat/completions", chat)])
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    path = folder / "http.sock"
    await web.UnixSite(runner, path).start()
    report(report_fd, Loading("llm:0", "loading weights", 1, 2), ServiceReady(f"unix:{path}", 4), ServiceNews("news"))
    await stop.wait()
    await runner.cleanup()
    path.unlink(missing_ok=True)
    return 0


def main(arguments: list[str]) -> int:
    report_fd, life = int(arguments[0]), arguments[2]
    match life:
        case "serve":
            return asyncio.run(serve(report_fd, Path(arguments[3])))
        case "refuse":
            report(report_fd, ServiceFailed("--tp 9: too many"))
            return 1
        case "stay silent":
            (Path(arguments[3]) / "started").touch()
            signal.pause()
    return 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
