"""An encoded video -> its temporal groups: their frames, identity, size, tokens and places along time."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from hashlib import blake2b
from math import prod

import msgspec

from vlmrt.actors.edge.clip_prober import ClipProber
from vlmrt.actors.edge.identify import DIGEST_BYTES, LARGE_BYTES, IdentifiedClip
from vlmrt.actors.edge.media_parts import ClipOptions
from vlmrt.actors.models.config import ImageProcessing, VideoProcessing
from vlmrt.actors.models.qwen2_vl.video import ClipPlan, FrameChoice, frame_choice, plan_clip
from vlmrt.runtime.config import VideoOptions
from vlmrt.runtime.errors import RequestError
from vlmrt.runtime.frame_list import is_frame_list
from vlmrt.runtime.messages import ClipInfo, FrameGroup, MmHash


class ClipIdentifier:
    """Identifies videos for one model.  A group's key binds the clip's bytes and whatever its rows depend on."""

    def __init__(
        self,
        processing: VideoProcessing,
        patches: ImageProcessing,
        tokens_per_second: float | None,
        model_identity: str,
        options: VideoOptions,
        prober: ClipProber,
    ) -> None:
        self._processing = processing
        self._tokens_per_second = tokens_per_second
        self._options = options
        self._prober = prober
        self._key = blake2b(msgspec.msgpack.encode(("video", model_identity, patches)), digest_size=DIGEST_BYTES)

    async def identify(
        self, encoded: bytes, *, options: ClipOptions, cache_salt: str, param: str, executor: Executor
    ) -> IdentifiedClip:
        """Raises: RequestError 400 for bytes that are no video, or one out of bounds; 503 where no worker looks."""
        content = blake2b(digest_size=DIGEST_BYTES)
        if len(encoded) < LARGE_BYTES:
            content.update(encoded)
        else:
            await asyncio.get_running_loop().run_in_executor(executor, content.update, encoded)
        try:
            clip = await self._prober.probe(content.digest(), encoded)
            plan = self._plan(clip, options, is_frame_list(encoded))
        except RequestError as error:
            raise RequestError(
                f"{param}: {error.message}",
                status=error.status,
                code=error.code,
                param=param,
                retry_after_s=error.retry_after_s,
            ) from None
        groups = tuple(self._group(content.digest(), plan, indices, cache_salt) for indices in plan.groups)
        return IdentifiedClip(
            encoded,
            (clip.width, clip.height),
            plan.target_size,
            groups,
            (1, *plan.grid_thw[1:]),
            plan.num_group_tokens,
            plan.time_offsets,
        )

    def _group(self, digest: bytes, plan: ClipPlan, indices: tuple[int, ...], cache_salt: str) -> FrameGroup:
        """Two samplings of a clip share the groups in which both look at the same frames at the same size."""
        key = blake2b(digest, digest_size=DIGEST_BYTES, key=self._key.digest())
        key.update(msgspec.msgpack.encode((plan.target_size, indices, cache_salt)))
        return FrameGroup(MmHash(key.hexdigest()), indices)

    def _plan(self, clip: ClipInfo, options: ClipOptions, is_list: bool) -> ClipPlan:
        """Raises: RequestError 400."""
        fps = options.fps or clip.fps if is_list else clip.fps
        limit = self._options.max_total_pixels
        processing = self._limited(options)
        try:
            plan = plan_clip(
                clip.width,
                clip.height,
                clip.num_frames,
                fps,
                processing,
                self._list_choice(clip, options, fps) if is_list else self._choice(options),
                self._tokens_per_second,
                total_pixels=min(options.total_pixels or limit, limit),
            )
        except ValueError as error:
            raise RequestError(str(error), code="invalid_video_size") from None
        num_pixels = len(plan.groups) * prod(plan.target_size)
        if num_pixels > limit:
            message = f"the video's {len(plan.groups)} pairs of frames have {num_pixels} pixels, more than {limit}"
            raise RequestError(message, code="video_too_large")
        return plan

    def _limited(self, options: ClipOptions) -> VideoProcessing:
        """What a client asks for, never larger frames than the checkpoint's own limit."""
        known = self._processing
        max_pixels = min(options.max_pixels or known.max_pixels, known.max_pixels)
        return msgspec.structs.replace(
            known,
            max_pixels=max_pixels,
            min_pixels=min(options.min_pixels or known.min_pixels, max_pixels),
            min_frames=options.min_frames or min(known.min_frames, options.max_frames or known.min_frames),
        )

    def _choice(self, options: ClipOptions) -> FrameChoice:
        chosen = frame_choice(
            self._limited(options),
            fps=options.fps,
            num_frames=options.num_frames,
            max_frames=options.max_frames,
            frame_limit=self._options.max_frames,
        )
        if options.num_frames is not None and options.num_frames > self._options.max_frames:
            message = f"num_frames = {options.num_frames} is more than the {self._options.max_frames} of the server"
            raise RequestError(message, code="video_too_large")
        return chosen

    def _list_choice(self, clip: ClipInfo, options: ClipOptions, fps: float) -> FrameChoice | None:
        """Every frame that a client has picked itself, unless it asks for fewer."""
        if options.num_frames is not None or options.max_frames is not None:
            return self._choice(msgspec.structs.replace(options, fps=None if options.num_frames is not None else fps))
        if clip.num_frames > self._options.max_frames:
            message = f"the video has {clip.num_frames} frames, more than {self._options.max_frames}"
            raise RequestError(message, code="video_too_large")
        return None
