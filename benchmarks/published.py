"""What our figures stand beside: a peer's, the floor of the machine, and our aims.

Machine: one H100 80 GB, bf16, greedy, fixed output length. Peer: vLLM 0.26.0 on random weights of the same shapes, on
the same kind of machine. Floors are computed from what that machine reaches (3.02 TB/s copied, 785 TFLOP/s in bf16).
"""

from __future__ import annotations

from typing import NamedTuple

PEER = "vLLM 0.26.0"
FLOPS_PER_MS = 785e9
PIXELS_PER_PATCH = 14 * 14
TOWER_MS_PER_PATCH = 14.9 / (8 * 1024)  # FLOP floor of the whole tower, 8 images of 1,024 patches
PROMPT_TOKENS = 40  # of a workload's template and text, about


class Shape(NamedTuple):
    """Of a language model, what its floors follow from."""

    step_ms: float  # weights read once: a decode step of a small batch
    prefill_parameters: float  # multiplied with every token of a prompt

    @property
    def prompt_token_ms(self) -> float:
        return 2 * self.prefill_parameters / FLOPS_PER_MS


SHAPE_2B = Shape(step_ms=1.02, prefill_parameters=1.31e9)
SHAPE_7B = Shape(step_ms=4.68, prefill_parameters=6.53e9)
SHAPES = {"qwen2-vl-2b": SHAPE_2B, "qwen2-vl-7b": SHAPE_7B, "qwen2.5-vl-7b": SHAPE_7B}

Table = dict[str, dict[tuple[str, str], float]]  # preset -> (workload, figure) -> value

PEER_FIGURES: Table = {
    "qwen2-vl-2b": {
        ("start", "first_answer_s"): 130.0,  # the better end of 130-180
        ("text-stream", "itl_p50_ms"): 2.52,
        ("two-images-same", "requests_per_s"): 12.6,
        ("two-images-same", "itl_p50_ms"): 2.7,
        ("two-images-fresh", "requests_per_s"): 9.3,  # tuned; 9.0 as it comes
        ("two-images-fresh", "ttft_p50_ms"): 323.0,  # tuned; 384 as it comes
        ("burst", "images_per_s"): 52.0,
        ("eight-images", "images_per_s"): 33.0,
        ("stall", "itl_p50_ms"): 3.2,
        ("stall", "itl_max_ms"): 293.0,
        ("stall", "image_ttft_p50_ms"): 661.0,
        ("stall", "image_ttft_p99_ms"): 1123.0,
        ("dialogue", "requests_per_s"): 21.2,
        ("dialogue", "ttft_later_p50_ms"): 60.0,  # the better end of 60-97 over both models
    },
    "qwen2-vl-7b": {
        ("start", "first_answer_s"): 166.0,
        ("text-stream", "itl_p50_ms"): 6.21,
        ("two-images-same", "requests_per_s"): 5.6,
        ("two-images-same", "itl_p50_ms"): 6.4,
        ("two-images-fresh", "requests_per_s"): 4.65,
        ("two-images-fresh", "ttft_p50_ms"): 385.0,
        ("burst", "images_per_s"): 41.0,
        ("stall", "itl_p50_ms"): 7.6,
        ("stall", "itl_max_ms"): 264.0,
        ("stall", "image_ttft_p50_ms"): 579.0,
        ("stall", "image_ttft_p99_ms"): 973.0,
        ("dialogue", "requests_per_s"): 10.6,
        ("dialogue", "ttft_later_p50_ms"): 60.0,  # as above
    },
}

ONCE = {  # no picture is done twice, whatever the model
    (workload, figure): 1.0
    for workload in ("dialogue", "dialogue-crowd", "sliding-window")
    for figure in ("decodes_per_picture", "encodes_per_picture")
}

AIMS: Table = {
    "qwen2-vl-2b": {
        ("start", "first_answer_s"): 25.0,
        ("text-stream", "itl_p50_ms"): 1.4,
        ("two-images-same", "requests_per_s"): 20.0,
        ("two-images-fresh", "requests_per_s"): 15.0,
        ("two-images-fresh", "ttft_p50_ms"): 120.0,
        ("burst", "images_per_s"): 120.0,
        ("eight-images", "images_per_s"): 60.0,
        ("stall", "itl_p50_times_quiet"): 1.7,
        ("stall", "itl_max_ms"): 40.0,
        ("stall", "last_image_s"): 1.5 + 1.5,  # the last burst arrives 1.5 s after the first
        ("dialogue", "requests_per_s"): 34.0,
        ("dialogue", "ttft_later_p50_ms"): 20.0,
        **ONCE,
    },
    "qwen2-vl-7b": {
        ("start", "first_answer_s"): 25.0,
        ("text-stream", "itl_p50_ms"): 5.2,
        ("two-images-same", "requests_per_s"): 6.6,
        ("two-images-fresh", "requests_per_s"): 5.6,
        ("two-images-fresh", "ttft_p50_ms"): 120.0,
        ("burst", "images_per_s"): 58.0,
        ("stall", "itl_p50_times_quiet"): 1.7,
        ("stall", "itl_max_ms"): 40.0,
        ("stall", "last_image_s"): 1.5 + 3.0,
        ("dialogue", "requests_per_s"): 12.5,
        ("dialogue", "ttft_later_p50_ms"): 25.0,
        **ONCE,
    },
}


def image_ms(shape: Shape, width: int, height: int) -> float:
    """Floor of one fresh image: tower and prefill, whose tokens are a quarter of the patches."""
    patches = width * height / PIXELS_PER_PATCH
    return patches * TOWER_MS_PER_PATCH + patches / 4 * shape.prompt_token_ms


def floors(preset: str) -> dict[tuple[str, str], float]:
    """The least time of the work, one piece after the other and nothing between; none for other presets.

    A decode step serves all 10 clients for one reading of the weights.
    """
    shape = SHAPES.get(preset)
    if shape is None:
        return {}
    image = image_ms(shape, 640, 480)
    prompt = PROMPT_TOKENS * shape.prompt_token_ms
    answer = 256 * shape.step_ms / 10  # twice that of a dialogue's turn, of which one in 5 has an image
    return {
        ("text-stream", "itl_p50_ms"): shape.step_ms,
        ("two-images-same", "requests_per_s"): 1e3 / answer,
        ("two-images-fresh", "requests_per_s"): 1e3 / (2 * image + prompt + answer),
        ("burst", "images_per_s"): 1e3 / (image + prompt),
        ("dialogue", "requests_per_s"): 1e3 / (image / 5 + prompt + answer / 2),
        ("eight-images", "images_per_s"): 8 * 1e3 / (8 * image + prompt + answer),
    }
