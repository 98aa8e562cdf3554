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
from flax_projector.config import SAMPLE_RATE
from flax_projector.data import BatchSource, ManifestRow, load_audio, read_manifest
from flax_projector.evaluate import Scores, Transcript
from flax_projector.metrics import setup_logging
from flax_projector.projector import abstract_projector
from flax_projector.run import load_model, make_evaluator, make_source
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
        self.config = dataclasses.replace(config, data=data)
        self.loaded = load_model(self.config, make_mesh(config.mesh))
        abstract = abstract_projector(config.projector, mesh=self.loaded.mesh)
        self.projector_params = load_projector(run / "projector", config.projector, abstract)
        self._params = (self.projector_params, *self.loaded.frozen)
        self._evaluator = make_evaluator(self.loaded, self.config)

    def transcribe(self, rows: list[ManifestRow]) -> list[Transcript]:
        """Greedy transcripts, without those longer than the run allows."""
        with use_mesh(self.loaded.mesh):
            source = self._source("files", rows)
            return self._evaluator.transcribe(self._params, source, name="files")

    def evaluate(self, name: str, rows: list[ManifestRow]) -> Scores:
        """Loss and word error rate as well."""
        with use_mesh(self.loaded.mesh):
            return self._evaluator(self._params, self._source(name, rows), name=name)

    def _source(self, name: str, rows: list[ManifestRow]) -> BatchSource:
        batch_size = self.config.data.eval_batch_size
        return make_source(name, rows, self.loaded, self.config, batch_size=batch_size)


def transcribe(listener: Listener, paths: list[Path]) -> None:
    """Writes one line per file to standard output: path, tab, transcript."""
    rows = [ManifestRow(str(p), p, "", len(load_audio(p)) / SAMPLE_RATE) for p in paths]
    heard = {t.id: t.hypothesis for t in listener.transcribe(rows)}
    limit = listener.config.data.bucket_secs[-1]
    for path in paths:
        sys.stdout.write(f"{path}\t{heard.get(str(path), f'[longer than {limit} s]')}\n")


def evaluate(listener: Listener, manifests: list[Path], *, as_json: bool) -> None:
    """Writes loss, WER and every transcript of each manifest to standard output."""
    for path in manifests:
        scores = listener.evaluate(path.stem, read_manifest(path))
        if as_json:
            record = {"manifest": str(path), **dataclasses.asdict(scores)}
            sys.stdout.write(json.dumps(record) + "\n")
            continue
        for t in scores.transcripts:
            sys.stdout.write(f"{t.id}\n  said   {t.reference}\n  heard  {t.hypothesis}\n")
        count = len(scores.transcripts)
        sys.stdout.write(
            f"{path}: WER {100 * scores.wer:.1f}% over {count} utterances, "
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
    sub.add_argument("audio", type=Path, nargs="+", help="wav, flac, ogg or mp3")
    sub = commands.add_parser("evaluate", help="print transcripts and word error rates")
    sub.add_argument("run", type=Path, help="run folder of train_tpu.py")
    sub.add_argument("manifest", type=Path, nargs="+", help=".jsonl or .tsv")
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
