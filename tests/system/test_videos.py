"""Clips through the running server: the reference's tokens, right answers, work done once, and wrong files refused."""

from __future__ import annotations

import asyncio
import base64
import http.server
import io
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import av
import httpx
import numpy as np
import pytest
import torch

from tests.clips import make_clip, make_sound
from tests.pictures import Picture, encode, noise, picture
from tests.reference import Reference
from tests.system.server import Server, launch
from tests.video_reference import video_processor
from vlmrt.actors.models.registry import load_model_config, load_video_processing
from vlmrt.tools.checkpoint import make_checkpoint
from vlmrt.tools.demo.evaluate import ask_server, questions, scenery, summary

NUM_TOKENS = 24
QUESTION = {"type": "text", "text": "What happens in the video?"}


def data_url(data: bytes, mime: str = "video/mp4") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


class Film(NamedTuple):
    """A clip, and frames to take from a second of it."""

    data: bytes
    fps: float

    @property
    def part(self) -> dict[str, Any]:
        return {"type": "video_url", "video_url": {"url": data_url(self.data), "fps": self.fps}}


# ---------------------------------------------------------------- the reference's tokens


SHORT = Film(make_clip(160, 96, 30, fps=10), 2.0)
LONG = Film(make_clip(64, 120, 40, fps=5, seed=1), 1.0)
DIALOGUES: tuple[tuple[Film | Picture | str, ...], ...] = (
    (LONG, "what moves in this video"),
    ("before", SHORT, "between the two", LONG),
    (picture(3), "a picture, then", LONG, picture(4), "and which one of them is red"),
    (LONG, SHORT, LONG, "twice the same"),
)


class ClipReference(Reference):
    """transformers, with clips."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint)
        processing, self._config = load_video_processing(checkpoint), load_model_config(checkpoint)
        self._processor = video_processor(
            min_pixels=processing.min_pixels,
            max_pixels=processing.max_pixels,
            image_mean=self.processor.image_mean,
            image_std=self.processor.image_std,
        )

    def of(self, parts: tuple[Film | Picture | str, ...]) -> dict[str, torch.Tensor]:
        inputs = self.inputs(
            [{"role": "user", "content": content(parts)}], [p for p in parts if isinstance(p, Picture)]
        )
        made = [self._processed(part) for part in parts if isinstance(part, Film)]
        ids = inputs["input_ids"][0].tolist()
        video = self._config.video_token_id
        counts = iter([int(one["video_grid_thw"].prod()) // 4 for one in made])
        inputs["input_ids"] = torch.tensor(
            [[id for token in ids for id in ([token] * next(counts) if token == video else [token])]]
        )
        inputs["pixel_values_videos"] = torch.cat([one["pixel_values_videos"] for one in made])
        inputs["video_grid_thw"] = torch.cat([one["video_grid_thw"] for one in made])
        if self._config.vision.tokens_per_second is not None:
            seconds = [2 / one["video_metadata"][0].sampled_fps for one in made]
            assert all(value == int(value) for value in seconds)  # or the reference cuts them
            inputs["second_per_grid_ts"] = torch.tensor(seconds)
        return inputs

    def _processed(self, film: Film) -> Any:
        with av.open(io.BytesIO(film.data)) as opened:
            shown = np.stack([frame.to_ndarray(format="rgb24") for frame in opened.decode(video=0)])
            metadata = {"total_num_frames": len(shown), "fps": float(opened.streams.video[0].average_rate or 0)}
        clip = torch.from_numpy(shown).permute(0, 3, 1, 2).contiguous()
        options = {"video_metadata": [metadata], "fps": film.fps, "return_metadata": True}
        return self._processor([clip], return_tensors="pt", **options)


def content(parts: tuple[Film | Picture | str, ...]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": part} if isinstance(part, str) else part.part for part in parts]


@pytest.mark.parametrize("preset", ["test-qwen2-vl", "test-qwen2.5-vl"])
def test_greedy_tokens_about_clips_equal_the_reference(preset: str, tmp_path: Path, run_root: Path) -> None:
    """Every question twice: the second time from the caches."""
    checkpoint = make_checkpoint(tmp_path / "model", preset, dtype="float32")
    fields = {"ignore_eos": True, "return_token_ids": True, "repetition_penalty": 1.0}
    with launch("--model", str(checkpoint), "--max-num-batched-tokens", "64", run_root=run_root) as server:
        answers = [
            server.chat(content(parts), max_tokens=NUM_TOKENS, temperature=0, extra_body=fields).model_dump()
            for parts in DIALOGUES * 2
        ]
    reference = ClipReference(checkpoint)
    num_tokens = 0
    for index, answer in enumerate(answers):
        inputs = reference.of(DIALOGUES[index % len(DIALOGUES)])
        assert answer["prompt_token_ids"] == inputs["input_ids"][0].tolist()
        verdict = reference.judge(inputs, answer["choices"][0]["token_ids"])
        num_tokens += verdict.num_argmax + verdict.num_ties
    assert num_tokens == len(answers) * NUM_TOKENS


# ---------------------------------------------------------------- answers, and work done once


def test_the_demo_model_says_what_moves_where(demo_server: Server) -> None:
    dialogues = questions(24, ["motion"], scenery(None))
    report = summary(asyncio.run(ask_server(f"{demo_server.url}/v1", None, dialogues, 4, stream=True)))
    assert report["all"]["percent"] >= 93, report


WORK = ("vlmrt_video_probes_total", "vlmrt_frames_decoded_total", "vlmrt_images_encoded_total")


def test_a_clip_seen_before_is_neither_decoded_nor_encoded(demo_server: Server) -> None:
    film = Film(make_clip(128, 96, 24, fps=8, seed=77), 2.0)
    before = demo_server.counted(WORK)
    first = demo_server.chat([film.part, QUESTION], max_tokens=8, temperature=0)
    after_first = demo_server.counted(WORK)
    again = demo_server.chat([{"type": "text", "text": "Well."}, film.part, QUESTION], max_tokens=8, temperature=0)
    same = demo_server.chat([film.part, QUESTION], max_tokens=8, temperature=0)
    after_again = demo_server.counted(WORK)
    done = {name: after_first[name] - before[name] for name in WORK}
    assert done == dict(zip(WORK, (1, 6, 3), strict=True))  # three pairs of frames
    done = {name: after_again[name] - after_first[name] for name in WORK}
    assert done == dict(zip(WORK, (0, 0, 0), strict=True))
    assert same.choices == first.choices
    assert same.usage.prompt_tokens_details.cached_tokens > 0
    assert again.usage.prompt_tokens_details.video_tokens == first.usage.prompt_tokens_details.video_tokens > 0


def test_several_clips_and_pictures_in_one_message_are_answered(demo_server: Server) -> None:
    frames = [encode(noise(96, 64, seed), "PNG", "frame").part["image_url"]["url"] for seed in range(5)]
    listed = {"type": "video", "video": frames}
    parts = [SHORT.part, picture(1).part, {"type": "text", "text": "and"}, LONG.part, listed, picture(2).part, QUESTION]
    answer = demo_server.chat(parts, max_tokens=8)
    assert answer.choices[0].message.content
    details = answer.usage.prompt_tokens_details
    assert details.image_tokens > 0
    assert details.video_tokens > 0
    tokenized = demo_server.http.post("/tokenize", json={"messages": [{"role": "user", "content": parts}]})
    assert tokenized.json()["count"] == answer.usage.prompt_tokens


# ---------------------------------------------------------------- wrong files

CLIP = make_clip()
AVI = make_clip(container="avi", codec="mpeg4")
PNG = picture(0).data


def with_rate(clip: bytes, rate: int) -> bytes:
    """An AVI clip whose header says so many frames a second."""
    at = clip.index(b"strh") + 8 + 20
    return clip[:at] + struct.pack("<II", 1, rate) + clip[at + 8 :]


WRONG: dict[str, dict[str, Any]] = {
    "truncated": {"url": data_url(CLIP[: len(CLIP) // 2])},
    "header alone": {"url": data_url(CLIP[:40])},
    "empty": {"url": "data:video/mp4;base64,"},
    "zeros": {"url": data_url(bytes(4096))},
    "audio only": {"url": data_url(make_sound())},
    "a picture": {"url": data_url(PNG)},
    "a picture by its type": {"url": data_url(PNG, "image/png")},
    "a text": {"url": data_url(b"hello, this is text")},
    "a playlist": {"url": data_url(b"#EXTM3U\nfile:///etc/passwd\n")},
    "10^9 frames in the header": {"url": data_url(AVI.replace(struct.pack("<I", 30), struct.pack("<I", 10**9)))},
    "too long": {"url": data_url(make_clip(32, 32, 40, fps=0.01))},
    "too thin": {"url": data_url(make_clip(4000, 16, 2))},
    "more frames than are looked at": {"url": data_url(CLIP), "num_frames": 10**6},
    "a broken frame list": {"url": data_url(PNG, "video/jpeg") + "," + data_url(b"no picture").partition(",")[2]},
    "0 fps": {"url": data_url(CLIP), "fps": 0},
    "-1 frames": {"url": data_url(CLIP), "num_frames": -1},
    "fetching is off": {"url": "http://example.org/a.mp4"},
    "private address": {"url": "http://169.254.169.254/a.mp4"},
    "files are off": {"url": "file:///etc/passwd"},
    "not base64": {"url": "data:video/mp4;base64,@@@"},
}


def post(server: Server, video: dict[str, Any]) -> httpx.Response:
    content = [{"type": "video_url", "video_url": video}, QUESTION]
    body = {"model": "model", "messages": [{"role": "user", "content": content}], "max_tokens": 4}
    return server.http.post("/v1/chat/completions", json=body)


def check_refused(answer: httpx.Response, status: int = 400) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert 10 < len(error["message"]) < 500
    assert "Traceback" not in error["message"]


def test_wrong_clips_are_refused_and_every_actor_lives_on(demo_server: Server) -> None:
    before = {actor.name: actor.process.pid for actor in demo_server.actors()}
    for name, video in WRONG.items():
        print(name)
        check_refused(post(demo_server, video))
    for rate in (0, 2**31):  # what such a header says is refused, or not believed
        answer = post(demo_server, {"url": data_url(with_rate(AVI, rate))})
        assert answer.status_code in (200, 400), answer.text
    assert post(demo_server, {"url": data_url(CLIP)}).status_code == 200
    assert {actor.name: actor.process.pid for actor in demo_server.actors()} == before


@contextmanager
def file_server(files: dict[str, bytes]) -> Iterator[str]:
    """The URL of a web server on this machine."""

    class Files(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = files.get(self.path)
            self.send_response(404 if data is None else 200)
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_clips_are_fetched_within_the_policy_and_their_limits(tmp_path: Path, run_root: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(CLIP)
    (tmp_path / "large.mp4").write_bytes(bytes(2 << 20))
    with file_server({"/clip.mp4": CLIP, "/large.mp4": bytes(2 << 20)}) as url:
        host = url.removeprefix("http://")
        limits = ["--max-video-mib", "1", "--limit-videos", "1", "--max-video-s", "5"]
        policy = ["--allowed-media-domains", host, "--allowed-media-root", str(tmp_path)]
        with launch(*limits, *policy, run_root=run_root) as server:
            assert post(server, {"url": f"{url}/clip.mp4"}).status_code == 200
            assert post(server, {"url": f"file://{tmp_path}/clip.mp4"}).status_code == 200
            check_refused(post(server, {"url": f"{url}/large.mp4"}), 413)
            check_refused(post(server, {"url": f"file://{tmp_path}/large.mp4"}), 413)
            check_refused(post(server, {"url": data_url(bytes(2 << 20))}), 413)
            check_refused(post(server, {"url": f"{url}/none.mp4"}))
            check_refused(post(server, {"url": f"file://{tmp_path}/none.mp4"}))
            too_long = post(server, {"url": data_url(make_clip(32, 32, 60, fps=10))})
            check_refused(too_long)
            assert "5 seconds" in too_long.json()["error"]["message"]
