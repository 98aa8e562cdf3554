"""Transcribes and scores speech with a trained projector; packs speech in shards.

Examples:

  python -m flax_projector transcribe runs/demo clip.wav other.flac
  python -m flax_projector evaluate runs/demo examples/demo/speech/heldout_seen_voices.jsonl
  python -m flax_projector index 'gs://BUCKET/clips/*.tar' --out gs://BUCKET/clips/train.jsonl
  python -m flax_projector index shar/recording.*.tar --texts shar/cuts.*.gz --out shar/train.jsonl
  python -m flax_projector pack clips/train.jsonl gs://BUCKET/clips
  python -m flax_projector pack hf:openslr/librispeech_asr:clean:train.100 shards --flac
"""

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import FlagCreatePairsOff, Positional

from flax_projector.config import MeshConfig
from flax_projector.logs import lines_above_bars, printable, setup_logging, start_in_utf8

if TYPE_CHECKING:  # JAX takes its time; `--help` should not
    from flax_projector.inference.listen import Listener


@dataclass(frozen=True, kw_only=True)
class _Use:
    """What the commands take that use a projector."""

    run: Positional[Annotated[str, tyro.conf.arg(metavar="RUN")]]
    """Folder of a train_tpu.py run, on a disk or in a bucket."""
    projector: Annotated[str | None, tyro.conf.arg(metavar="best|final|STEP|PATH")] = None
    """Which projector: the best or the final one of the run, that of a checkpoint, or any other
    that the converter reads. If not given: the final one or, if the run has not ended, that of its
    newest checkpoint."""
    encoder: str | None = None
    """The encoder, if it is no longer where the run found it: an HF folder, URL or hub id."""
    llm: str | None = None
    """The same for the LLM."""
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def listener(self) -> "Listener":
        """Loads the run."""
        from flax_projector.inference.listen import Listener

        return Listener(
            self.run,
            projector=self.projector,
            encoder=self.encoder,
            llm=self.llm,
            mesh=self.mesh,
        )


@dataclass(frozen=True, kw_only=True)
class Transcribe(_Use):
    """Transcribes audio files: prints one line per file, the path, a tab and the transcript."""

    audio: Positional[
        Annotated[
            tuple[str, ...], tyro.conf.arg(metavar="AUDIO ...", help_behavior_hint="(at least one)")
        ]
    ]
    """wav, flac, ogg or mp3 files, as paths or URLs."""

    def __call__(self) -> None:
        """Writes to standard output; for a file that cannot be used, the reason."""
        if not self.audio:
            raise ValueError("name at least one audio file")
        for path, text in self.listener().transcribe_files(self.audio):
            sys.stdout.write(f"{printable(path)}\t{printable(text)}\n")


@dataclass(frozen=True, kw_only=True)
class Evaluate(_Use):
    """Prints the transcripts, word error rate and loss of each manifest or data set."""

    sources: Positional[
        Annotated[
            tuple[str, ...],
            tyro.conf.arg(metavar="SOURCE ...", help_behavior_hint="(at least one)"),
        ]
    ]
    """.jsonl or .tsv manifests, or hf:NAME:SPLIT."""
    json: bool = False
    """Print one JSON object per source instead."""

    def __call__(self) -> None:
        """Writes to standard output."""
        if not self.sources:
            raise ValueError("name at least one manifest or data set")
        listener = self.listener()
        for source in self.sources:
            scores = listener.evaluate(source)
            if self.json:
                record = {"source": source, **dataclasses.asdict(scores)}
                sys.stdout.write(json.dumps(record) + "\n")
                continue
            for t in scores.transcripts:
                lines = t.id, f"  said   {t.reference}", f"  heard  {t.hypothesis}"
                sys.stdout.writelines(f"{printable(line)}\n" for line in lines)
            sys.stdout.write(
                f"{printable(source)}: WER {100 * scores.wer:.1f}% over "
                f"{len(scores.transcripts)} utterances "
                f"({scores.num_unheard} defective, {scores.num_left_out} left out), "
                f"loss {scores.loss:.3f} nats per token\n"
            )


@dataclass(frozen=True, kw_only=True)
class Index:
    """Makes a manifest of WebDataset tars (key.flac beside key.txt or key.json); copies nothing.

    What is wrong in them is left out, and listed in MANIFEST.bad.jsonl.
    """

    shards: Positional[
        Annotated[
            tuple[str, ...],
            tyro.conf.arg(metavar="SHARD ...", help_behavior_hint="(at least one)"),
        ]
    ]
    """Tars, as paths or URLs, or patterns of them. Those at URLs are read once."""
    out: Annotated[str, tyro.conf.arg(metavar="MANIFEST.jsonl")]
    """The manifest. If the shards lie below its folder, both can be moved together."""
    text_key: str = "text"
    """Where a key.json, or a line of --texts, has the transcript."""
    texts: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE ...")] = ()
    """Files of transcripts, if these are not in the shards: the manifests of NeMo's tarred data
    sets, or the cuts of Lhotse's shar."""
    overwrite: bool = False
    """Replace the manifest if it exists."""

    def __call__(self) -> None:
        """Writes the manifest."""
        from flax_projector.data.shards.index import write_index

        if not self.shards:
            raise ValueError("name at least one shard")
        write_index(
            self.shards,
            self.out,
            text_key=self.text_key,
            texts=self.texts,
            overwrite=self.overwrite,
        )


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Writes the clips of a source in tar shards, and DST/manifest.jsonl, which training reads.

    The same command continues one that was killed, and ends with the same bytes. Rows that cannot
    be used are left out, and listed in DST/manifest.bad.jsonl.
    """

    source: Positional[Annotated[str, tyro.conf.arg(metavar="SOURCE")]]
    """A .jsonl or .tsv manifest, or hf:NAME:SPLIT."""
    dst: Positional[Annotated[str, tyro.conf.arg(metavar="DST")]]
    """A new folder, on a disk or in a bucket."""
    shard_mb: int = 256
    """About how large a shard is to be, in millions of bytes."""
    flac: bool = False
    """Write what training reads, 16 kHz mono as 16-bit FLAC, and cut segments. If not given, the
    encoded clips are copied as they are."""
    hf_streaming: bool = False
    """Stream the data set, as --data.hf-streaming does."""
    hf_max_rows: int = 0
    """Take only so many rows of the data set; 0 takes all."""

    def __call__(self) -> None:
        """Writes the shards."""
        import jax

        from flax_projector.config import DataConfig
        from flax_projector.data.shards.pack import pack

        jax.config.update("jax_platforms", "cpu")  # accelerators are not needed, and may be in use
        config = DataConfig(hf_streaming=self.hf_streaming, hf_max_rows=self.hf_max_rows)
        pack(self.source, self.dst, shard_mb=self.shard_mb, flac=self.flac, config=config)


Command = (
    Annotated[Transcribe, tyro.conf.subcommand("transcribe")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
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
