"""A finished run, ready to use."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from convert.load import load_projector_params
from flax_projector.data.audio import BadAudio, load_audio
from flax_projector.data.bad_rows import BadRowLog
from flax_projector.data.manifest import ManifestRow
from flax_projector.data.sources import source_name
from flax_projector.lengths import SAMPLE_RATE
from flax_projector.models.projector import abstract_projector
from flax_projector.run import load_model
from flax_projector.run_folder import RunFolder
from flax_projector.sharding import make_mesh, use_mesh
from flax_projector.training.evaluate import Scores, Transcript


class Listener:
    """Transcribes and scores with a run's projector, prompt, window and limits.

    Attributes:
      config: the run's config.
      loaded: the loaded towers and prompt.
      projector_params: the projector's parameters.
    """

    def __init__(self, run: str | Path):
        """Loads the towers and the projector.

        Args:
          run: folder of a finished run.

        Raises:
          ValueError: if it is not that of a finished run.
        """
        folder = RunFolder(Path(run))
        if not folder.config.is_file() or not folder.projector.is_dir():
            raise ValueError(
                f"{run} is not a finished run: it needs {folder.config.name} and "
                f"{folder.projector.name}/"
            )
        config = folder.read_config()
        data = dataclasses.replace(config.data, cache_features=False)
        # A run may have moved since its config was written.
        self.config = dataclasses.replace(config, data=data, out=str(run))
        self.loaded = load_model(self.config, make_mesh(config.mesh))
        abstract = abstract_projector(config.projector, mesh=self.loaded.mesh)
        self.projector_params = load_projector_params(folder.projector, config.projector, abstract)
        self._params = (self.projector_params, *self.loaded.frozen)
        # Scores count defective clips, so that no share of them stops an evaluation.
        bad_rows = BadRowLog(None, max_rate=1.0)
        self._batches = self.loaded.make_batch_maker(folder, bad_rows)
        self._evaluator = self.loaded.make_evaluator(bad_rows)

    def transcribe_files(self, paths: Sequence[str]) -> list[tuple[str, str]]:
        """Transcribes audio files; for those that cannot be used, gives the reason in brackets.

        Args:
          paths: paths or URLs.

        Returns:
          (path, transcript) for each file, in the given order.
        """
        limit = self.config.data.bucket_secs[-1]
        rows, texts = [], {}
        for path in dict.fromkeys(paths):
            try:
                secs = len(load_audio(path)) / SAMPLE_RATE
            except BadAudio as error:
                texts[path] = f"[{error.problem.label}: {error}]"
                continue
            texts[path] = f"[longer than {limit:g} s]"
            if secs <= limit:
                rows.append(ManifestRow(path, path, "", secs))
        if rows:
            texts |= {transcript.id: transcript.hypothesis for transcript in self.transcribe(rows)}
        return [(path, texts[path]) for path in paths]

    def transcribe(self, rows: list[ManifestRow]) -> list[Transcript]:
        """Greedy transcripts of rows within the run's limits."""
        with use_mesh(self.loaded.mesh):
            batches = self._batches.make(
                "files", (rows, []), batch_size=self.config.data.eval_batch_size
            )
            return self._evaluator.transcribe(self._params, batches, name="files")

    def evaluate(self, source: str) -> Scores:
        """Loss, word error rate and transcripts of a manifest or data set."""
        with use_mesh(self.loaded.mesh):
            batches = self._batches.make(
                source, self._batches.read(source), batch_size=self.config.data.eval_batch_size
            )
            return self._evaluator(self._params, batches, name=source_name(source))
