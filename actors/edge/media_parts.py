"""Parts of a message, pictures and videos among them: their Structs and every check that needs no bytes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, cast

from msgspec import Meta, Struct

from vlmrt.actors.edge.refusals import refuse, short
from vlmrt.actors.edge.request_fields import PRINTABLE

MAX_UUID_CHARS = 128
MAX_LISTED_FRAMES = 4096
KNOWN_PARTS = "text, image_url, image, video_url, video"

Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Rate = Annotated[float, Meta(gt=0)]


class ImageUrl(Struct, frozen=True, gc=False):
    url: str | None = None
    detail: Literal["auto", "low", "high"] | None = None
    min_pixels: Positive | None = None
    max_pixels: Positive | None = None


class VideoUrl(Struct, frozen=True, gc=False):
    """The options are those of ClipOptions."""

    url: str | None = None
    fps: Rate | None = None
    num_frames: Positive | None = None
    min_frames: Positive | None = None
    max_frames: Positive | None = None
    min_pixels: Positive | None = None
    max_pixels: Positive | None = None
    total_pixels: Positive | None = None


class ContentPart(Struct, frozen=True, gc=False):
    """One part of a message; `type` says which of the other fields counts."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: ImageUrl | str | None = None
    image: str | None = None
    video_url: VideoUrl | str | None = None
    video: str | list[str] | None = None  # a list: its frames, as pictures
    # of a picture or a video, here or in image_url or video_url
    min_pixels: Positive | None = None
    max_pixels: Positive | None = None
    # of a video, here or in video_url
    fps: Rate | None = None
    num_frames: Positive | None = None
    min_frames: Positive | None = None
    max_frames: Positive | None = None
    total_pixels: Positive | None = None
    uuid: str | None = None  # the client's name for a picture: where the server knows it, the bytes may be left out

    @property
    def url(self) -> str | None:
        """Of a picture, as it stands; None or empty: the part has no bytes."""
        if isinstance(self.image_url, ImageUrl):
            return self.image_url.url
        return self.image_url if self.image_url is not None else self.image


class PixelSize(Struct, frozen=True, forbid_unknown_fields=True):
    """The same limits by the names that newer processors have for them."""

    shortest_edge: Positive | None = None
    longest_edge: Positive | None = None


class PixelLimits(Struct, frozen=True):
    """What a client asks of a picture's size after resizing; None: the server's own limits."""

    min_pixels: int | None = None
    max_pixels: int | None = None
    low_detail: bool = False


class ClipOptions(Struct, frozen=True):
    """What a client asks of a video's frames, how many and how large; None: the checkpoint's choice."""

    fps: float | None = None  # frames to look at, of a second; of a list of frames: how many were taken from a second
    num_frames: int | None = None  # in place of fps
    min_frames: int | None = None
    max_frames: int | None = None
    min_pixels: int | None = None  # of one frame after resizing
    max_pixels: int | None = None
    total_pixels: int | None = None  # of all frames that are looked at

    def over(self, others: ClipOptions) -> ClipOptions:
        """These, and what they leave open as in the others; a rate and a number of frames replace each other."""
        chosen = self if self.fps is not None or self.num_frames is not None else others
        return ClipOptions(
            fps=chosen.fps,
            num_frames=chosen.num_frames,
            min_frames=self.min_frames or others.min_frames,
            max_frames=self.max_frames or others.max_frames,
            min_pixels=self.min_pixels or others.min_pixels,
            max_pixels=self.max_pixels or others.max_pixels,
            total_pixels=self.total_pixels or others.total_pixels,
        )


class ProcessorOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """mm_processor_kwargs: for every picture and video that does not say it itself."""

    min_pixels: Positive | None = None
    max_pixels: Positive | None = None
    size: PixelSize | None = None
    fps: Rate | None = None
    num_frames: Positive | None = None
    min_frames: Positive | None = None
    max_frames: Positive | None = None
    total_pixels: Positive | None = None

    @property
    def limits(self) -> PixelLimits:
        size = self.size or PixelSize()
        return PixelLimits(self.min_pixels or size.shortest_edge, self.max_pixels or size.longest_edge)


class MediaDefaults(Struct, frozen=True):
    """For parts that do not say it themselves."""

    limits: PixelLimits = PixelLimits()
    clip: ClipOptions = ClipOptions()


class ImageSource(Struct, frozen=True):
    """Where a picture of the prompt comes from, and the field that says so."""

    url: str  # empty: from what the server knows under its uuid
    param: str
    limits: PixelLimits = PixelLimits()
    uuid: str = ""


class VideoSource(Struct, frozen=True):
    """Where a video of the prompt comes from, and the field that says so."""

    url: str
    param: str
    options: ClipOptions = ClipOptions()
    frame_urls: tuple[str, ...] = ()  # of its frames, in place of a URL


MediaSource = ImageSource | VideoSource


def media_defaults(processor: ProcessorOptions | None) -> MediaDefaults:
    """Raises: RequestError 400."""
    if processor is None:
        return MediaDefaults()
    limits, clip = processor.limits, _clip_options(processor)
    clip = clip.over(ClipOptions(min_pixels=limits.min_pixels, max_pixels=limits.max_pixels))
    _check_limits(limits, "mm_processor_kwargs")
    _check_clip_options(clip, "mm_processor_kwargs")
    return MediaDefaults(limits, clip)


def check_part(part: ContentPart, param: str) -> None:
    """Raises: RequestError 400 naming field, value and bound."""
    match part.type:
        case "text":
            refuse(part.text is None, f"{param}.text", " is required", "missing_field")
        case "refusal":
            refuse(part.refusal is None, f"{param}.refusal", " is required", "missing_field")
        case "image_url" | "image":
            _check_uuid(part.uuid, f"{param}.uuid")
            _check_limits(_part_limits(part), param)
            if part.uuid is None:
                absent = part.image_url is None and (part.type == "image_url" or part.image is None)
                refuse(absent, f"{param}.{part.type}", " is required", "missing_field")
                refuse(part.url is None, f"{param}.image_url.url", " is required", "missing_field")
        case "video_url" | "video":
            _check_video(part, param)
        case _:
            problem = f" = {short(part.type)!r} is not supported (supported: {KNOWN_PARTS})"
            refuse(True, f"{param}.type", problem, "unsupported_part")


def _check_video(part: ContentPart, param: str) -> None:
    named = ": videos cannot be named, the server knows them again by their bytes"
    refuse(part.uuid is not None, f"{param}.uuid", named, "unsupported_value")
    _check_clip_options(_part_clip_options(part), param)
    absent = part.video_url is None and (part.type == "video_url" or part.video is None)
    refuse(absent, f"{param}.{part.type}", " is required", "missing_field")
    no_url = isinstance(part.video_url, VideoUrl) and part.video_url.url is None
    refuse(no_url, f"{param}.video_url.url", " is required", "missing_field")
    if isinstance(part.video, list) and part.video_url is None:
        count = len(part.video)
        refuse(not count, f"{param}.video", " is an empty list: at least one frame is needed")
        too_many = count > MAX_LISTED_FRAMES
        refuse(too_many, f"{param}.video", f" has {count} frames, more than {MAX_LISTED_FRAMES}")


def _check_limits(limits: PixelLimits, param: str) -> None:
    low, high = limits.min_pixels or 1, limits.max_pixels
    refuse(high is not None and low > high, f"{param}.min_pixels", f" = {low} is above max_pixels = {high}")


def _check_clip_options(options: ClipOptions, param: str) -> None:
    both = options.fps is not None and options.num_frames is not None
    refuse(both, f"{param}.num_frames", f" = {options.num_frames} and fps = {options.fps} exclude each other")
    low, high = options.min_frames or 1, options.max_frames
    refuse(high is not None and low > high, f"{param}.min_frames", f" = {low} is above max_frames = {high}")
    _check_limits(PixelLimits(options.min_pixels, options.max_pixels), param)


def _check_uuid(uuid: str | None, param: str) -> None:
    if uuid is not None:
        refuse(not uuid, param, " is empty: it needs at least 1 character")
        refuse(len(uuid) > MAX_UUID_CHARS, param, f" has {len(uuid)} characters, more than {MAX_UUID_CHARS}")
        refuse(not PRINTABLE.fullmatch(uuid), param, " may hold printable ASCII without spaces only")


def part_sources(parts: Sequence[ContentPart], param: str, defaults: MediaDefaults) -> list[MediaSource]:
    """The pictures and videos of a message, in their order."""
    sources: list[MediaSource] = []
    for index, part in enumerate(parts):
        if is_image(part):
            sources.append(_image_source(part, f"{param}[{index}]", defaults.limits))
        elif is_video(part):
            sources.append(_video_source(part, f"{param}[{index}]", defaults.clip))
    return sources


def is_image(part: ContentPart) -> bool:
    return part.type in ("image_url", "image")


def is_video(part: ContentPart) -> bool:
    return part.type in ("video_url", "video")


def _image_source(part: ContentPart, param: str, limits: PixelLimits) -> ImageSource:
    uuid, low = part.uuid or "", False
    if uuid and not part.url:
        return ImageSource("", f"{param}.uuid", uuid=uuid)
    if isinstance(part.image_url, ImageUrl):
        param, low = f"{param}.image_url.url", part.image_url.detail == "low"
    else:
        param = f"{param}.image" if part.image_url is None else f"{param}.image_url"
    asked = _part_limits(part)
    limits = PixelLimits(asked.min_pixels or limits.min_pixels, asked.max_pixels or limits.max_pixels, low)
    return ImageSource(cast(str, part.url), param, limits, uuid)


def _part_limits(part: ContentPart) -> PixelLimits:
    """Those within image_url win."""
    inner = part.image_url if isinstance(part.image_url, ImageUrl) else ImageUrl()
    return PixelLimits(inner.min_pixels or part.min_pixels, inner.max_pixels or part.max_pixels)


def _video_source(part: ContentPart, param: str, defaults: ClipOptions) -> VideoSource:
    options = _part_clip_options(part).over(defaults)
    match part.video_url, part.video:
        case VideoUrl(url=url), _:
            return VideoSource(url or "", f"{param}.video_url.url", options)
        case str(url), _:
            return VideoSource(url, f"{param}.video_url", options)
        case _, list(frames):
            return VideoSource("", f"{param}.video", options, tuple(frames))
    return VideoSource(cast(str, part.video), f"{param}.video", options)


def _part_clip_options(part: ContentPart) -> ClipOptions:
    """Those within video_url win."""
    beside = _clip_options(part)
    return _clip_options(part.video_url).over(beside) if isinstance(part.video_url, VideoUrl) else beside


def _clip_options(fields: VideoUrl | ContentPart | ProcessorOptions) -> ClipOptions:
    return ClipOptions(
        fps=fields.fps,
        num_frames=fields.num_frames,
        min_frames=fields.min_frames,
        max_frames=fields.max_frames,
        min_pixels=fields.min_pixels,
        max_pixels=fields.max_pixels,
        total_pixels=fields.total_pixels,
    )
