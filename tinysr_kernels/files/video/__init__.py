"""Films on disk: opened by content, upscaled frame by frame, written whole with their audio, times and metadata."""

from tinysr_kernels.files.video.encoding import VIDEO_SUFFIXES
from tinysr_kernels.files.video.muxing import output_suffix
from tinysr_kernels.files.video.opening import probe_video
from tinysr_kernels.files.video.upscale import VideoReport, upscale_video

__all__ = ["VIDEO_SUFFIXES", "VideoReport", "output_suffix", "probe_video", "upscale_video"]
