"""A projector with its towers, ready to use."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from convert.load import load_projector_params, read_training
from flax_projector.config import MeshConfig, NormalizerName, option
from flax_projector.data.bad_rows import BadRowLog
from flax_projector.data.batch_plan import batch_multiples
from flax_projector.data.batches import Batches
from flax_projector.data.inputs import Samples
from flax_projector.data.rows import ManifestRow, Rows
from flax_projector.data.utterances import Utterance, Utterances
from flax_projector.inference.pieces import Piece
from flax_projector.inference.projectors import find_named
from flax_projector.inference.sound_files import Heard, hear_files
from flax_projector.lengths import SAMPLE_RATE, num_encoder_frames
from flax_projector.models.projector import abstract_projector
from flax_projector.run import find_towers, load_model, warn_of_other_training
from flax_projector.sharding import make_mesh, num_batch_shards, use_mesh
from flax_projector.storage import AnyPath
from flax_projector.training.evaluate import Scores
from flax_projector.training.scores import Transcript

log = logging.getLogger(__name__)


class Listener:
    """Transcribes and scores with a projector, and its prompt, window and limits.

    Attributes:
      config: that of the run, with the present paths; or of what is assumed for a projector from
        elsewhere.
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
          run: the folder of a run, or a projector from elsewhere; see `find_named`.
          projector: see `choose_projector`.
          encoder: folder or hub id of the encoder; None takes the one that the run names.
          llm: the same for the LLM.
          mesh: how the model is laid out on this machine, whose devices need not be those of the
            training; None splits the batch over all of them.
          decoding: fields of `DecodeConfig` that are not as in the run.

        Raises:
          ValueError: if it is none of these, or has no such projector.
        """
        named = find_named(run, projector=projector, encoder=encoder, llm=llm)
        self.config = dataclasses.replace(named.config, **decoding or {})
        folder = named.folder
        if named.is_of_other_training:
            training = read_training(named.projector)
            warn_of_other_training(self.config, str(named.projector), training)
        on = make_mesh(mesh or MeshConfig())
        # First, since a run that has not ended may remove a checkpoint at any time.
        self.projector_params = load_projector_params(
            named.projector,
            self.config.projector,
            abstract_projector(self.config.projector, mesh=on),
            step=named.step,
        )
        towers = find_towers(self.config)
        for name in folder.other_contents(towers.contents):
            log.warning("%s is not the one that the run was trained with", option(name))
        self.loaded = load_model(self.config, on, towers)
        named.check_prompt(self.loaded.prompt)
        self._params = (self.projector_params, *self.loaded.frozen)
        # Full rows instead of padding, if the devices cannot share the run's batches.
        shards = num_batch_shards(on)
        self._batch_size = -(-self.config.data.eval_batch_size // shards) * shards
        # Scores count defective clips, so that no share of them stops an evaluation.
        bad_rows = BadRowLog(None, max_rate=1.0)
        self._batches = self.loaded.make_batch_maker(folder, bad_rows)
        self._evaluator = self.loaded.make_evaluator(bad_rows)
        self._compiled: dict[float, set[int]] = {}  # sizes of batches, by the bounds of buckets

    def transcribe_files(
        self, paths: Sequence[str], *, total_secs: float | None = None
    ) -> Iterator[Heard]:
        """Transcribes sound files of any format and length.

        Args:
          paths: paths or URLs.
          total_secs: the length of all together, for the progress bar; None if it is not known.

        Yields:
          What was heard in each file, or why it cannot be used; in the given order.
        """
        data, pool_stride = self.config.data, self.config.projector.projector_pool_stride
        return hear_files(
            paths,
            self._hear,
            bounds=data.bucket_bounds,
            sizes=[self._batch_size * n for n in batch_multiples(data, pool_stride)],
            total_secs=total_secs,
        )

    def _hear(self, pieces: Sequence[Piece], bound: float, size: int) -> list[Transcript]:
        """Transcripts of pieces.

        Args:
          pieces: at most `size` of them.
          bound: the bucket's, in seconds; none is longer.
          size: how many a batch of it may hold. Fewer make a smaller batch, unless one that is not
            much larger has been compiled already.
        """
        prompt, count = self.loaded.prompt, len(pieces)
        config = dataclasses.replace(self.config.data, bucket_secs=(bound,))
        frames = config.window_frames
        if not config.whole_window:
            frames = num_encoder_frames(round(bound * SAMPLE_RATE))
        compiled = self._compiled.setdefault(bound, set())
        fits = [n for n in compiled if count <= n <= 4 * count]  # a larger one takes too long
        size = min(fits) if fits else min(size, 1 << (count - 1).bit_length())
        compiled.add(size)
        rows = [
            ManifestRow(str(i), "", "", len(piece.samples) / SAMPLE_RATE)
            for i, piece in enumerate(pieces)
        ]
        # Every piece is as long as the bucket, so that all batches of it have the same shape.
        utterances = [Utterance(row, frames, (prompt.end_of_turn,)) for row in rows]
        with use_mesh(self.loaded.mesh):
            batches = Batches(
                Utterances.of(utterances),
                inputs=Samples(config.window_samples, [piece.samples for piece in pieces]),
                prompt=prompt,
                config=config,
                pool_stride=self.config.projector.projector_pool_stride,
                mesh=self.loaded.mesh,
                batch_size=size,
                name="pieces",
            )
            batch = batches.to_global(batches[0].batch)
            return self._evaluator.transcribe_batch(self._params, batch, batches.members(0))

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
