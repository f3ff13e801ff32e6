"""The vision tower and the language model do not wait for each other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.pictures import picture
from tests.system.server import Server, launch

NUM_TOKENS = 200


def stream_text(server: Server, index: int) -> int:
    """The tokens of one text stream, to its end."""
    stream = server.chat(
        f"Count to {index}.",
        max_tokens=NUM_TOKENS,
        temperature=1.0,
        seed=index,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    num_tokens: int = [chunk.usage.completion_tokens for chunk in stream if chunk.usage is not None][-1]
    return num_tokens


def test_text_streams_run_to_their_end_while_the_tower_is_blocked(run_root: Path) -> None:
    with launch("--fault-hooks", run_root=run_root) as server, ThreadPoolExecutor(9) as pool:
        (run_dir,) = run_root.iterdir()
        gate = run_dir / "hold-vit.encode"
        gate.touch()
        question = [picture(0).part, {"type": "text", "text": "What is in the image?"}]
        blocked = pool.submit(server.chat, question, max_tokens=20)
        first = [pool.submit(stream_text, server, index) for index in range(4)]
        assert [future.result(120) for future in first] == [NUM_TOKENS] * 4
        later = [pool.submit(stream_text, server, index) for index in range(4, 8)]  # new requests start as well
        assert [future.result(120) for future in later] == [NUM_TOKENS] * 4
        assert not blocked.done()
        gate.unlink()
        assert blocked.result(60).choices[0].message.content
