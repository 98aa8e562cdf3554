"""Uses a trained projector: `python -m flax_projector transcribe|evaluate RUN ...`.

Examples:

  python -m flax_projector transcribe runs/demo clip.wav other.flac
  python -m flax_projector evaluate runs/demo docs/demo/speech/heldout_seen_voices.jsonl
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from convert.load import load_projector
from flax_projector import config as configs
from flax_projector.audio import BadAudio, load_audio
from flax_projector.bad_rows import BadRow, BadRowLog
from flax_projector.config import SAMPLE_RATE
from flax_projector.data import BatchSource
from flax_projector.evaluate import Scores, Transcript
from flax_projector.manifest import ManifestRow
from flax_projector.metrics import setup_logging
from flax_projector.projector import abstract_projector
from flax_projector.run import load_model, make_evaluator, make_source, read_source, source_name
from flax_projector.sharding import make_mesh, use_mesh


class Listener:
    """A finished run, ready to transcribe with its own prompt, window and lengths."""

    def __init__(self, run: Path):
        """Loads towers and projector.

        Raises:
          ValueError: if `run` is not the folder of a finished run.
        """
        config_path = run / "config.json"
        if not config_path.is_file() or not (run / "projector").is_dir():
            raise ValueError(f"{run} is not a finished run: need config.json and projector/ in it")
        config = configs.from_json(config_path.read_text())
        data = dataclasses.replace(config.data, cache_features=False)
        self.config = dataclasses.replace(config, data=data, out=str(run))  # it may have moved
        self.loaded = load_model(self.config, make_mesh(config.mesh))
        abstract = abstract_projector(config.projector, mesh=self.loaded.mesh)
        self.projector_params = load_projector(run / "projector", config.projector, abstract)
        self._params = (self.projector_params, *self.loaded.frozen)
        self._bad_rows = BadRowLog(None, max_rate=config.data.max_bad_rate)
        self._evaluator = make_evaluator(self.loaded, self.config, self._bad_rows)

    def transcribe(self, rows: list[ManifestRow]) -> list[Transcript]:
        """Greedy transcripts, without those longer than the run allows."""
        with use_mesh(self.loaded.mesh):
            source = self._source("files", rows, [])
            return self._evaluator.transcribe(self._params, source, name="files")

    def evaluate(self, source: str) -> Scores:
        """Loss and word error rate of a manifest or data set as well."""
        rows, bad = read_source(source, self.config)
        with use_mesh(self.loaded.mesh):
            batches = self._source(source, rows, bad)
            return self._evaluator(self._params, batches, name=source_name(source))

    def _source(self, name: str, rows: list[ManifestRow], bad: list[BadRow]) -> BatchSource:
        batch_size = self.config.data.eval_batch_size
        return make_source(
            name, rows, bad, self.loaded, self.config, self._bad_rows, batch_size=batch_size
        )


def transcribe(listener: Listener, paths: list[str]) -> None:
    """Writes one line per file to standard output: path, tab, transcript or what is wrong."""
    limit = listener.config.data.bucket_secs[-1]
    rows, lines = [], {}
    for path in dict.fromkeys(paths):
        try:
            secs = len(load_audio(path)) / SAMPLE_RATE
        except BadAudio as error:
            lines[path] = f"[{error.problem.label}: {error}]"
            continue
        lines[path] = f"[longer than {limit} s]"
        if secs <= limit:
            rows.append(ManifestRow(path, path, "", secs))
    if rows:
        lines |= {t.id: t.hypothesis for t in listener.transcribe(rows)}
    for path in paths:
        sys.stdout.write(f"{path}\t{lines[path]}\n")


def evaluate(listener: Listener, sources: list[str], *, as_json: bool) -> None:
    """Writes loss, WER and every transcript of each source to standard output."""
    for source in sources:
        scores = listener.evaluate(source)
        if as_json:
            record = {"manifest": source, **dataclasses.asdict(scores)}
            sys.stdout.write(json.dumps(record) + "\n")
            continue
        for t in scores.transcripts:
            sys.stdout.write(f"{t.id}\n  said   {t.reference}\n  heard  {t.hypothesis}\n")
        sys.stdout.write(
            f"{source}: WER {100 * scores.wer:.1f}% over {len(scores.transcripts)} utterances "
            f"({scores.num_unheard} defective, {scores.num_left_out} left out), "
            f"loss {scores.loss:.3f} nats per token\n"
        )


def cli(argv: list[str] | None = None) -> None:
    """Runs one command of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m flax_projector",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("transcribe", help="print what is said in sound files")
    sub.add_argument("run", type=Path, help="run folder of train_tpu.py")
    sub.add_argument("audio", nargs="+", help="wav, flac, ogg or mp3; path or URL")
    sub = commands.add_parser("evaluate", help="print transcripts and word error rates")
    sub.add_argument("run", type=Path, help="run folder of train_tpu.py")
    sub.add_argument("manifest", nargs="+", help=".jsonl, .tsv or hf:NAME:SPLIT")
    sub.add_argument("--json", action="store_true", help="one JSON object per manifest")
    args = parser.parse_args(argv)
    setup_logging()
    try:
        if args.command == "transcribe":
            transcribe(Listener(args.run), args.audio)
        else:
            evaluate(Listener(args.run), args.manifest, as_json=args.json)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    cli()
