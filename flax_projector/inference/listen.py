"""A run, ready to use."""

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from convert.load import load_projector_params, read_training
from flax_projector.config import MeshConfig, NormalizerName, TrainConfig, option
from flax_projector.data.audio import BadAudio, load_audio
from flax_projector.data.bad_rows import BadRowLog
from flax_projector.data.rows import ManifestRow, Rows
from flax_projector.files import any_path, whole_path
from flax_projector.lengths import SAMPLE_RATE
from flax_projector.models.projector import abstract_projector
from flax_projector.run import find_towers, load_model, warn_of_other_training
from flax_projector.run_folder import RunFolder
from flax_projector.sharding import make_mesh, num_batch_shards, use_mesh
from flax_projector.storage import AnyPath
from flax_projector.training.best import find_best
from flax_projector.training.evaluate import Scores
from flax_projector.training.scores import Transcript

log = logging.getLogger(__name__)


class Listener:
    """Transcribes and scores with a run's projector, prompt, window and limits.

    Attributes:
      config: the run's config, with the present paths.
      loaded: the loaded towers and prompt.
      projector_params: the projector's parameters.
    """

    def __init__(
        self,
        run: str | AnyPath,
        *,
        projector: str | None = None,
        encoder: str | None = None,
        llm: str | None = None,
        mesh: MeshConfig | None = None,
        decoding: Mapping[str, Any] | None = None,
    ):
        """Loads the towers and the projector.

        Args:
          run: the run's folder.
          projector: see `choose_projector`.
          encoder: folder or hub id of the encoder; None takes the one that the run names.
          llm: the same for the LLM.
          mesh: how the model is laid out on this machine, whose devices need not be those of the
            training; None splits the batch over all of them.
          decoding: fields of `DecodeConfig` that are not as in the run.

        Raises:
          ValueError: if it is no run, or has no such projector.
        """
        folder = RunFolder(any_path(run))
        config = dataclasses.replace(folder.read_config(), **decoding or {})
        path, step = choose_projector(folder, projector)
        self.config = _as_used(config, folder, encoder, llm)
        if not whole_path(path).is_relative_to(whole_path(folder.path)):
            warn_of_other_training(config, str(path), read_training(path))
        on = make_mesh(mesh or MeshConfig())
        # First, since a run that has not ended may remove a checkpoint at any time.
        self.projector_params = load_projector_params(
            path, config.projector, abstract_projector(config.projector, mesh=on), step=step
        )
        towers = find_towers(self.config)
        for name in folder.other_contents(towers.contents):
            log.warning("%s is not the one that the run was trained with", option(name))
        self.loaded = load_model(self.config, on, towers)
        self._params = (self.projector_params, *self.loaded.frozen)
        # Full rows instead of padding, if the devices cannot share the run's batches.
        self._batch_size = -(-config.data.eval_batch_size // num_batch_shards(on))
        self._batch_size *= num_batch_shards(on)
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

    def transcribe(self, rows: Sequence[ManifestRow]) -> list[Transcript]:
        """Transcripts of rows within the run's limits."""
        with use_mesh(self.loaded.mesh):
            batches = self._batches.make("files", [Rows.of(rows)], batch_size=self._batch_size)
            return self._evaluator.transcribe(self._params, batches, name="files")

    def evaluate(
        self,
        source: str,
        *,
        name: str,
        normalizer: NormalizerName | None = None,
        silence: bool = False,
    ) -> Scores:
        """Loss, error rates and transcripts of a manifest or data set.

        Args:
          source: the manifest or data set.
          name: the name that it is reported under.
          normalizer: what is done to texts before they are compared; None takes the run's.
          silence: replace every clip by silence of its length.

        Raises:
          ValueError: if it cannot be scored.
        """
        used = normalizer or self.config.data.normalizer_of(source)
        with use_mesh(self.loaded.mesh):
            batches = self._batches.make(
                source,
                [self._batches.read(source)],
                batch_size=self._batch_size,
                silence=silence,
            )
            self._evaluator.check(batches, name=name, normalizer=used)
            return self._evaluator(self._params, batches, name=name, normalizer=used)


def choose_projector(folder: RunFolder, choice: str | None) -> tuple[AnyPath, int | None]:
    """Where one of a run's projectors is.

    Args:
      folder: the run's folder.
      choice: "final", after the last step; "best", with the lowest error rate; the step of a
        checkpoint, as digits; the path of any other projector. None takes the final one or, if the
        run has not ended, its newest checkpoint, as the converter does.

    Returns:
      The path of a checkpoint, and the step if there are several.

    Raises:
      ValueError: if the run does not have it.
    """
    steps, best = folder.steps(), find_best(folder)
    is_finished = (folder.projector / "config.json").is_file()
    others = [f"--projector {name}" for name in map(str, sorted(steps))]
    others = ["--projector best"] * (best is not None) + others
    way_out = f"pass {' or '.join(others)}" if others else "wait for its first checkpoint"
    match choice:
        case None if is_finished:
            return folder.projector, None
        case None if steps:
            log.info("%s has not ended: its newest checkpoint is used", folder.path)
            return folder.path, max(steps)
        case None | "final":
            if not is_finished:
                raise ValueError(f"{folder.path} has not ended, so it has no projector: {way_out}")
            return folder.projector, None
        case "best":
            if best is None:
                raise ValueError(
                    f"{folder.path} has no best projector: it has not been evaluated after a step. "
                    "Leave out --projector"
                )
            return best, None
        case _ if re.fullmatch(r"[0-9]+", choice):
            return folder.path, int(choice)
    return any_path(choice), None


def _as_used(
    config: TrainConfig, folder: RunFolder, encoder: str | None, llm: str | None
) -> TrainConfig:
    """The config of a run, for this machine and directory."""
    cache = folder.find(config.data.cache_dir) if config.data.cache_dir else ""
    if not Path(cache).is_dir():
        cache = ""
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, cache_features=False, cache_dir=cache),
        out=str(folder.path),
        encoder=encoder or folder.find(config.encoder),
        llm=llm or folder.find(config.llm),
    )
