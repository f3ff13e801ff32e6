"""A prompt with an encoded clip: from its bytes to the reference's tokens, in one process."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.actors.llm.conftest import GREEDY, MAX_TEXT_ID, Checkpoint
from tests.actors.llm.driver import PAGE_ROWS, Driver, FakeSlab, Request, make_runner
from tests.clips import make_clip
from tests.video_reference import video_processor
from vlmrt.actors.media.clip import Clip
from vlmrt.actors.media.resize import resize_frame
from vlmrt.actors.models.config import VideoProcessing
from vlmrt.actors.models.layers import TensorParallel
from vlmrt.actors.models.qwen2_vl.video import frame_choice, plan_clip
from vlmrt.actors.models.registry import load_image_processing
from vlmrt.actors.vit.engines.torch import TorchEngine
from vlmrt.runtime.config import VideoOptions
from vlmrt.runtime.messages import MediaItem, MmHash

PROCESSING = VideoProcessing(
    min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 12, patch_size=14, temporal_patch_size=2, merge_size=2
)
NUM_TOKENS = 10
CPU = torch.device("cpu")


class ClipPrompt:
    """Texts with clips between them; each clip becomes its groups' rows on one side, patches of it all on the other."""

    def __init__(self, checkpoint: Checkpoint, slab: FakeSlab, seed: int) -> None:
        self._checkpoint = checkpoint
        self._slab = slab
        self._rng = np.random.default_rng(seed)
        self._processing = load_image_processing(checkpoint.directory)
        self._engine = TorchEngine(checkpoint.tower, self._processing, CPU, 1.0)
        self.token_ids: list[int] = []
        self.media: list[MediaItem] = []
        self.pages: dict[int, tuple[int, ...]] = {}
        self._patches: list[Tensor] = []
        self._grids: list[list[int]] = []
        self._seconds: list[float] = []

    def text(self, num_tokens: int) -> None:
        self.token_ids += self._rng.integers(0, MAX_TEXT_ID, num_tokens).tolist()

    def clip(self, data: bytes, fps: float) -> None:
        config = self._checkpoint.config
        clip = Clip(data, VideoOptions())
        info = clip.info
        choice = frame_choice(PROCESSING, fps=fps, frame_limit=768)
        plan = plan_clip(
            info.width, info.height, info.num_frames, info.fps, PROCESSING, choice, config.vision.tokens_per_second
        )
        self.token_ids.append(config.vision_start_token_id)
        for group, indices in enumerate(plan.groups):
            pixels = np.stack([resize_frame(frame, plan.target_size) for frame in clip.read(indices)])
            self._add_group(group, pixels, (1, *plan.grid_thw[1:]), plan.time_offsets[group])
        self.token_ids.append(config.vision_end_token_id)
        self._add_reference(data, fps, list(plan.grid_thw))

    def _add_group(self, group: int, pixels: np.ndarray, grid: tuple[int, int, int], time_offset: int) -> None:
        run = self._engine.prepare([pixels], [grid])
        while not self._engine.run_quantum(run):
            pass
        rows = self._engine.rows(run)
        mm_hash = MmHash(f"{len(self.media)}")
        item = MediaItem(mm_hash, len(self.token_ids), len(rows), grid, time_offset=time_offset, continues=group > 0)
        pages = tuple(self._slab.free_pages.pop() for _ in range(-(-len(rows) // PAGE_ROWS)))
        for number, row in enumerate(rows):
            self._slab.tensor()[pages[number // PAGE_ROWS] * PAGE_ROWS + number % PAGE_ROWS] = row
        self.pages[len(self.media)] = pages
        self.media.append(item)
        self.token_ids += [self._checkpoint.config.video_token_id] * len(rows)

    def _add_reference(self, data: bytes, fps: float, grid: list[int]) -> None:
        """What transformers makes of the clip, from its frames on."""
        with av.open(io.BytesIO(data)) as opened:
            shown = np.stack([frame.to_ndarray(format="rgb24") for frame in opened.decode(video=0)])
            metadata = {"total_num_frames": len(shown), "fps": float(opened.streams.video[0].average_rate or 0)}
        processor = video_processor(
            min_pixels=PROCESSING.min_pixels,
            max_pixels=PROCESSING.max_pixels,
            image_mean=list(self._processing.image_mean),
            image_std=list(self._processing.image_std),
        )
        made = processor(
            [torch.from_numpy(shown).permute(0, 3, 1, 2).contiguous()],
            video_metadata=[metadata],
            fps=fps,
            return_tensors="pt",
            return_metadata=True,
        )
        assert made["video_grid_thw"].tolist() == [grid]
        self._patches.append(made["pixel_values_videos"])
        self._grids.append(grid)
        self._seconds.append(2 / made["video_metadata"][0].sampled_fps)

    def finish(self) -> tuple[Request, dict[str, Tensor]]:
        inputs = {
            "input_ids": torch.tensor([self.token_ids]),
            "pixel_values_videos": torch.cat(self._patches),
            "video_grid_thw": torch.tensor(self._grids),
        }
        if self._checkpoint.config.vision.tokens_per_second is not None:
            assert all(seconds == int(seconds) for seconds in self._seconds)  # or the reference cuts them
            inputs["second_per_grid_ts"] = torch.tensor(self._seconds)
        return Request(self.token_ids, tuple(self.media), self.pages, GREEDY), inputs


@pytest.mark.parametrize("chunk", [1000, 7])
def test_prompts_with_clips_give_the_reference_s_tokens(checkpoint: Checkpoint, chunk: int) -> None:
    slab = FakeSlab(64, PAGE_ROWS, checkpoint.config.text.hidden_size)
    driver = Driver(make_runner(checkpoint.model, checkpoint.config, TensorParallel(), slab))
    prompt = ClipPrompt(checkpoint, slab, 0)
    prompt.text(9)
    prompt.clip(make_clip(160, 96, 30, fps=10), fps=2.0)
    prompt.text(5)
    prompt.clip(make_clip(64, 120, 40, fps=5, seed=1), fps=1.0)
    prompt.text(7)
    request, inputs = prompt.finish()
    assert [item.continues for item in request.media] == [False, True, True, False, True, True, True]
    driver.admit(request)
    driver.prefill(request, chunk)
    driver.decode([request], NUM_TOKENS - 1)
    assert len(request.output_ids) == NUM_TOKENS
    assert checkpoint.reference.judge(inputs, request.output_ids).num_ties <= 1
