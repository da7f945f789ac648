"""Videos without torchvision: each frame is prepared as a picture, by PIL."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import BatchFeature, CLIPImageProcessorPil, Qwen2VLImageProcessorPil, SmolVLMImageProcessorPil
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as resized_frame
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as resized_video
from transformers.video_utils import VideoMetadata, make_batched_videos

Frames = list[Image.Image]
Arrays = dict[str, np.ndarray]


class VideoFrames(ImageProcessingMixin):
    """Stands in for a checkpoint's video processor. A video is its frames, ``(frames, height, width, 3)`` or a list of
    pictures, already sampled; ``settings`` are the checkpoint's for videos.

    Sizes, frame counts and placeholders are those of transformers' video processors; pixels differ a little, because
    PIL and torchvision resize differently.
    """

    def __init__(self, processor_name: str, image_processor: Any, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self._settings = dict(settings)
        self.num_frames: int | None = settings.get("num_frames")
        self.fps: float | None = settings.get("fps")
        self.merge_size: int = settings.get("merge_size", 2)
        self.temporal_patch_size: int = settings.get("temporal_patch_size", 2)
        self._prepare: Callable[[list[Frames]], Arrays]
        if isinstance(image_processor, Qwen2VLImageProcessorPil):
            self._prepare = _Patches(image_processor, settings, whole="Qwen3" in processor_name)
        elif isinstance(image_processor, SmolVLMImageProcessorPil):
            self._prepare = _Tiles(image_processor)
        else:
            self._prepare = _Pictures(image_processor, settings)

    def to_dict(self) -> dict[str, Any]:
        """The checkpoint's settings for videos."""
        return dict(self._settings)

    def __call__(
        self,
        videos: Any,
        *,
        video_metadata: Sequence[VideoMetadata | Mapping[str, Any]] | None = None,
        do_sample_frames: bool | None = None,
        return_tensors: str | None = None,
        **_: Any,
    ) -> BatchFeature:
        """``video_metadata`` tells the frame rate (``fps``) of each video, for the models that are told it."""
        if do_sample_frames:
            raise ValueError("do_sample_frames=True needs torchvision; sample the frames first and pass those to keep")
        frames = [[Image.fromarray(np.asarray(frame)) for frame in video] for video in make_batched_videos(videos)]
        told = video_metadata or [{} for _ in frames]
        metadata = [
            VideoMetadata(**{"total_num_frames": len(video), "frames_indices": list(range(len(video))), **one})
            for video, one in zip(frames, told, strict=True)
        ]
        features = BatchFeature(self._prepare(frames), tensor_type=return_tensors)
        features["video_metadata"] = metadata
        return features


class _Pictures:
    """``(videos, frames, channels, height, width)``: every frame in one size."""

    def __init__(self, image_processor: Any, settings: Mapping[str, Any]) -> None:
        own = image_processor.to_dict()
        names = ("size", "crop_size", "resample", "image_mean", "image_std", "rescale_factor", "do_center_crop")
        chosen = {name: settings.get(name, own.get(name)) for name in names}
        self._processor = CLIPImageProcessorPil(**{name: value for name, value in chosen.items() if value is not None})
        self._processor.do_center_crop = bool(chosen["do_center_crop"])

    def __call__(self, videos: list[Frames]) -> Arrays:
        if len({len(video) for video in videos}) > 1:
            raise ValueError(
                f"the videos of a batch have {[len(video) for video in videos]} frames; this model needs equally many"
            )
        return {
            "pixel_values_videos": np.stack(
                [self._processor(video, return_tensors="np")["pixel_values"] for video in videos]
            )
        }


class _Patches:
    """Qwen: ``(patches, pixels)``, each patch over consecutive frames, and the grid ``(t, h, w)`` of every video."""

    def __init__(self, image_processor: Any, settings: Mapping[str, Any], *, whole: bool) -> None:
        self._processor = image_processor
        self._size = settings.get("size") or {
            "shortest_edge": settings.get("min_pixels") or image_processor.size["shortest_edge"],
            "longest_edge": settings.get("max_pixels") or image_processor.size["longest_edge"],
        }
        self._whole = whole  # the bounds on pixels are the whole video's, not a frame's

    def __call__(self, videos: list[Frames]) -> Arrays:
        prepared = [self._patches(video) for video in videos]
        return {
            "pixel_values_videos": np.concatenate([patches for patches, _ in prepared]),
            "video_grid_thw": np.array([grid for _, grid in prepared]),
        }

    def _patches(self, video: Frames) -> tuple[np.ndarray, list[int]]:
        depth = self._processor.temporal_patch_size
        width, height = self._resized(video)
        resample = Image.Resampling(self._processor.resample)
        smaller = [frame.resize((width, height), resample=resample) for frame in video]
        smaller += smaller[-1:] * (-len(video) % depth)
        features = self._processor(smaller, do_resize=False, return_tensors="np")
        _, rows, columns = features["image_grid_thw"][0].tolist()
        # A picture's patch repeats it along time; a video's takes each of its moments from another frame.
        side = self._processor.patch_size
        repeated = features["pixel_values"].reshape(-1, depth, rows * columns, 3, depth, side, side)
        moments = np.stack([repeated[:, moment, :, :, moment] for moment in range(depth)], axis=3)
        times = len(smaller) // depth
        return moments.reshape(times * rows * columns, -1), [times, rows, columns]

    def _resized(self, video: Frames) -> tuple[int, int]:
        width, height = video[0].size
        bounds = {
            "factor": self._processor.patch_size * self._processor.merge_size,
            "min_pixels": self._size["shortest_edge"],
            "max_pixels": self._size["longest_edge"],
        }
        if self._whole:
            count, depth = max(len(video), self._processor.temporal_patch_size), self._processor.temporal_patch_size
            height, width = resized_video(count, height, width, temporal_factor=depth, **bounds)
        else:
            height, width = resized_frame(height, width, **bounds)
        return width, height


class _Tiles:
    """SmolVLM: every frame is a picture of one tile, ``(videos, frames, channels, height, width)``."""

    def __init__(self, image_processor: Any) -> None:
        self._processor = image_processor

    def __call__(self, videos: list[Frames]) -> Arrays:
        features = self._processor(videos, do_image_splitting=False, return_tensors="np")
        return {name: features[name] for name in ("pixel_values", "pixel_attention_mask")}
