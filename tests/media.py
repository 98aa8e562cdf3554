"""Sound files of other formats, as FFmpeg writes them; and speech."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np

from flax_projector.data.audio import load_audio
from flax_projector.data.manifest import read_manifest

SPEECH = Path(__file__).parents[1] / "examples/demo/speech/heldout_seen_voices.jsonl"
CODECS = {  # of some formats
    "ipod": "aac",
    "mp4": "aac",
    "avi": "libmp3lame",
    "asf": "wmav2",
    "adts": "aac",
    "webm": "libopus",
    "matroska": "aac",
    "mpegts": "aac",
}


def encode(
    samples: np.ndarray, rate: int, form: str, *, channels: int = 1, has_video: bool = False
) -> bytes:
    """Sound in one of FFmpeg's formats, perhaps beside a picture.

    Args:
      samples: f32[N].
      rate: in Hz.
      form: FFmpeg's name of the format.
      channels: how many have the same samples.
      has_video: whether there is a picture.
    """
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        sound: Any = container.add_stream(CODECS[form], rate=rate)
        layout = "mono" if channels == 1 else "stereo"
        sound.layout, sound.bit_rate = layout, 64_000
        if has_video:
            add_video(container)
        planes = np.repeat(samples[None].astype(np.float32), channels, axis=0)
        frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout=layout)
        frame.sample_rate = rate
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    return file.getvalue()


def add_video(container: Any) -> None:
    """Two seconds of a grey picture."""
    stream = container.add_stream("mpeg4", rate=5)
    stream.width = stream.height = 32
    stream.pix_fmt = "yuv420p"
    picture = np.full((32, 32, 3), 99, np.uint8)
    for _ in range(10):
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    container.mux(stream.encode(None))


def mute_video() -> bytes:
    """A video without sound."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        add_video(container)
    return file.getvalue()


def tone(secs: float, rate: int) -> np.ndarray:
    """f32[N], 440 Hz."""
    return 0.3 * np.sin(2 * np.pi * 440 * np.arange(round(secs * rate)) / rate).astype(np.float32)


def clips(count: int) -> list[np.ndarray]:
    """Real speech: f32[N] at 16 kHz each, of one to three seconds."""
    return [load_audio(row.audio) for row in read_manifest(SPEECH)[0][:count]]


def spoken(
    clips: Sequence[np.ndarray], pause_secs: float
) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Clips with a pause of faint noise behind each; and where each begins and ends, in seconds."""
    rng, parts, spans, count = np.random.default_rng(0), [], [], 0
    for clip in clips:
        pause = 1e-4 * rng.standard_normal(round(16_000 * pause_secs))
        spans.append((count / 16_000, (count + len(clip)) / 16_000))
        parts += [clip, pause.astype(np.float32)]
        count += len(clip) + len(pause)
    return np.concatenate(parts), spans
