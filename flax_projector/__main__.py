"""Transcribes and scores speech with a trained projector, compares scores; packs speech in shards.

Examples:

  python -m flax_projector transcribe runs/demo clip.wav other.m4a
  python -m flax_projector transcribe runs/demo lecture.mp4 --format srt --out lecture.srt
  python -m flax_projector transcribe tiny-audio-checkpoint/ clip.wav --encoder ENCODER --llm LLM
  python -m flax_projector evaluate runs/demo examples/demo/speech/heldout_seen_voices.jsonl
  python -m flax_projector score runs/demo/transcripts/heldout_seen_voices-001000.jsonl
  python -m flax_projector compare scores/before/dev.jsonl scores/after/dev.jsonl
  python -m flax_projector report runs/demo
  python -m flax_projector report runs/demo runs/other --out both.html
  python -m flax_projector index 'gs://BUCKET/clips/*.tar' --out gs://BUCKET/clips/train.jsonl
  python -m flax_projector index shar/recording.*.tar --texts shar/cuts.*.gz --out shar/train.jsonl
  python -m flax_projector pack clips/train.jsonl gs://BUCKET/clips
  python -m flax_projector pack hf:openslr/librispeech_asr:clean:train.100 shards --flac
"""

import sys
from typing import Annotated

import tyro
from tyro.conf import FlagCreatePairsOff

from flax_projector.commands.evaluate import Evaluate
from flax_projector.commands.report import Report
from flax_projector.commands.scores import Compare, Score
from flax_projector.commands.shards import Index, Pack
from flax_projector.commands.transcribe import Transcribe
from flax_projector.logs import lines_above_bars, printable, setup_logging, start_in_utf8

Command = (
    Annotated[Transcribe, tyro.conf.subcommand("transcribe")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Score, tyro.conf.subcommand("score")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Index, tyro.conf.subcommand("index")]
    | Annotated[Pack, tyro.conf.subcommand("pack")]
)


def cli(argv: list[str] | None = None) -> None:
    """Runs one command; invalid input ends with a one-line error."""
    start_in_utf8()
    setup_logging()
    command = tyro.cli(
        Command,
        prog="flax-projector",
        description=__doc__,
        args=argv,
        config=(FlagCreatePairsOff,),
    )
    from flax_projector.training.compile_cache import compile_cache

    with lines_above_bars(), compile_cache("auto"):
        try:
            command()
        except (ValueError, FloatingPointError, OSError) as error:
            sys.exit(printable(f"error: {error}", keep="\n"))
        except KeyboardInterrupt:
            sys.exit(130)  # as shells have it


if __name__ == "__main__":
    cli()
