"""Transcribes and scores speech with a trained projector, compares scores; packs speech in shards.

Examples:

  python -m flax_projector transcribe runs/demo clip.wav other.flac
  python -m flax_projector evaluate runs/demo examples/demo/speech/heldout_seen_voices.jsonl
  python -m flax_projector score runs/demo/transcripts/heldout_seen_voices-001000.jsonl
  python -m flax_projector compare scores/before/dev.jsonl scores/after/dev.jsonl
  python -m flax_projector index 'gs://BUCKET/clips/*.tar' --out gs://BUCKET/clips/train.jsonl
  python -m flax_projector index shar/recording.*.tar --texts shar/cuts.*.gz --out shar/train.jsonl
  python -m flax_projector pack clips/train.jsonl gs://BUCKET/clips
  python -m flax_projector pack hf:openslr/librispeech_asr:clean:train.100 shards --flac
"""

import dataclasses
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import FlagCreatePairsOff, Positional

from flax_projector.config import BadClipsName, MeshConfig, NormalizerName
from flax_projector.logs import lines_above_bars, printable, setup_logging, start_in_utf8

if TYPE_CHECKING:  # JAX takes its time; `--help` should not
    from flax_projector.inference.listen import Listener
    from flax_projector.storage import AnyPath


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
class _Show:
    """What the commands take that show scores."""

    bad_clips: BadClipsName = "wrong"
    """What is done with clips that could not be read: they count as wrong, or are excluded."""
    worst: Annotated[int, tyro.conf.arg(metavar="N")] = 10
    """How many utterances to show at most, worst first."""

    def __post_init__(self) -> None:
        if self.worst < 0:
            raise ValueError(f"--worst {self.worst}: must be at least 0")


@dataclass(frozen=True, kw_only=True)
class Evaluate(_Use, _Show):
    """Prints the error rates and loss of each manifest or data set, after its worst transcripts."""

    sources: Positional[
        Annotated[
            tuple[str, ...],
            tyro.conf.arg(metavar="SOURCE ...", help_behavior_hint="(at least one)"),
        ]
    ]
    """.jsonl or .tsv manifests, or hf:NAME:SPLIT."""
    normalizer: Annotated[NormalizerName | None, tyro.conf.arg(metavar="english|basic|none")] = None
    """What is done to texts before errors are counted. If not given: what the run does, see
    --data.eval-normalizers."""
    silence: bool = False
    """Replace every clip by silence of its length, for what the LLM guesses without hearing."""
    out: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Write every transcript with its errors to FOLDER/SET.jsonl, for `score` and `compare`."""
    json: bool = False
    """Print one JSON object per source instead."""

    def __call__(self) -> None:
        """Writes to standard output."""
        from flax_projector.data.sources import set_names
        from flax_projector.files import write_atomically
        from flax_projector.inference.score_table import number_of, score_table
        from flax_projector.training.score_files import to_lines
        from flax_projector.training.scores import summarize

        if not self.sources:
            raise ValueError("name at least one manifest or data set")
        suffix = "-silence" if self.silence else ""
        names = {f"{name}{suffix}": source for name, source in set_names(self.sources).items()}
        files = self._files(names)
        listener = self.listener()
        for name, source in names.items():
            scores = listener.evaluate(
                source, name=name, normalizer=self.normalizer, silence=self.silence
            )
            if name in files:
                write_atomically(files[name], to_lines(scores.transcripts))
            summary = summarize(scores.transcripts, bad_clips=self.bad_clips)
            if self.json:
                record = {"source": source, "loss": scores.loss, "wer": summary.wer}
                record |= {"cer": summary.cer, "num_left_out": scores.num_left_out}
                sys.stdout.write(json.dumps(record | dataclasses.asdict(summary)) + "\n")
                continue
            more = [f"loss {scores.loss:.3f} nats per token"]
            if scores.num_left_out:
                more.append(f"{number_of(scores.num_left_out, 'row')} left out")
            _print(score_table(name, scores.transcripts, summary, worst=self.worst, more=more))

    def _files(self, names: Iterable[str]) -> "dict[str, AnyPath]":
        """Where each set's transcripts are to be written; checked before anything slow."""
        from flax_projector.files import any_path

        if self.out is None:
            return {}
        folder = any_path(self.out)
        above = next(path for path in (folder, *folder.parents) if path.exists())
        if isinstance(folder, Path) and not (above.is_dir() and os.access(above, os.W_OK)):
            raise ValueError(f"--out {folder}: {above} is no folder that can be written to")
        files = {name: folder / f"{name}.jsonl" for name in names}
        if found := [str(file) for file in files.values() if file.exists()]:
            raise ValueError(f"--out: {' and '.join(found)} exist already: choose another folder")
        return files


@dataclass(frozen=True, kw_only=True)
class Score(_Show):
    """Prints the error rates of files that an evaluation wrote, after their worst transcripts."""

    files: Positional[
        Annotated[
            tuple[str, ...], tyro.conf.arg(metavar="FILE ...", help_behavior_hint="(at least one)")
        ]
    ]
    """RUN/transcripts/SET-STEP.jsonl, or what `evaluate --out` wrote."""

    def __call__(self) -> None:
        """Writes to standard output."""
        from flax_projector.inference.score_table import score_table
        from flax_projector.training.score_files import read_scores
        from flax_projector.training.scores import summarize

        if not self.files:
            raise ValueError("name at least one file")
        for path, transcripts in [(path, read_scores(path)) for path in self.files]:
            summary = summarize(transcripts, bad_clips=self.bad_clips)
            title = summary.set if len(self.files) == 1 else f"{path}, {summary.set}"
            _print(score_table(printable(title), transcripts, summary, worst=self.worst))


@dataclass(frozen=True, kw_only=True)
class Compare(_Show):
    """Prints the difference between two files that evaluations of one set wrote.

    With its 95% interval by a bootstrap over utterances, after the utterances that changed most.
    """

    a: Positional[Annotated[str, tyro.conf.arg(metavar="A")]]
    """A file as `score` takes it."""
    b: Positional[Annotated[str, tyro.conf.arg(metavar="B")]]
    """Another one, of the same set: the difference is B - A."""

    def __call__(self) -> None:
        """Writes to standard output."""
        from flax_projector.inference.compare import compare, comparison_table
        from flax_projector.training.score_files import read_scores

        found = compare(read_scores(self.a), read_scores(self.b), bad_clips=self.bad_clips)
        _print(comparison_table((self.a, self.b), found, worst=self.worst))


def _print(lines: Iterable[str]) -> None:
    sys.stdout.writelines(f"{line}\n" for line in lines)


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
    | Annotated[Score, tyro.conf.subcommand("score")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
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
