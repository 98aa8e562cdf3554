"""From the names of sources to the batches of a run."""

import collections
import hashlib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from jax.sharding import Mesh

from flax_projector.chat.prompt import Prompt
from flax_projector.config import DataConfig, NormalizerName, TrainConfig
from flax_projector.data.bad_rows import BadRowLog, BadRows
from flax_projector.data.batches import Batches
from flax_projector.data.frames.keep import Encode, keep_frames
from flax_projector.data.frames.shards import Encoding
from flax_projector.data.hf_data import read_hf
from flax_projector.data.hf_source import PREFIX
from flax_projector.data.inputs import Inputs, Silence, Waveforms, find_unreadable
from flax_projector.data.manifest import read_manifest
from flax_projector.data.manifest_text import missing_manifest
from flax_projector.data.rows import Rows
from flax_projector.data.utterances import Utterances, prepare
from flax_projector.files import any_path, is_url
from flax_projector.run_folder import RunFolder
from flax_projector.storage import AnyPath

log = logging.getLogger(__name__)

_MAX_NAME_BYTES = 100


def _names(source: str, depth: int) -> list[str]:
    """Names of a source, each telling it from more others: with folders, its suffix, a hash."""
    path, folders = PurePath(source), []
    if source.startswith(PREFIX):
        ends = [source.removeprefix(PREFIX)]
    else:
        ends = [path.stem, path.name]
        folders = [part for part in path.parent.parts if part not in ("/", "..")]
    names = []
    for end in ends:
        for i in range(depth + 1):
            name = "-".join([*folders[max(len(folders) - i, 0) :], end])
            # They become names of files and metrics.
            names.append(re.sub(r"[^\w.-]+", "-", name).strip("-."))
    digest = hashlib.sha256(os.fsencode(source)).hexdigest()[:8]
    fits = [bool(name) and len(name.encode()) <= _MAX_NAME_BYTES for name in names]
    last = f"{names[0][:30] or 'set'}-{digest}"
    return [name if fit else last for name, fit in zip(names, fits, strict=True)] + [last]


def set_names(sources: Sequence[str]) -> dict[str, str]:
    """The sources by the names that they are reported under: of their files, or of data sets.

    Those whose names would be the same are called by as much of their paths as tells them apart.
    """
    depth = max((len(PurePath(source).parts) for source in sources), default=0)
    options = {source: _names(source, depth) for source in sources}
    while clashing := _clashing({source: names[0] for source, names in options.items()}):
        for source in clashing:
            options[source].pop(0)
    return {options[source][0]: source for source in sources}


def eval_names(config: TrainConfig) -> dict[str, str]:
    """The sources that a run is evaluated on, by name; see `set_names`.

    Raises:
      ValueError: if one is named "train".
    """
    names = set_names(config.data.eval)
    if "train" in names:
        raise ValueError(
            f"--data.eval {names['train']}: 'train' is the name of the training set: rename the "
            "file or link to it"
        )
    return names


def eval_normalizers(config: TrainConfig) -> dict[str, NormalizerName]:
    """What is done to the texts of each of a run's evaluation sets, by the set's name."""
    names = eval_names(config)
    return {name: config.data.normalizer_of(source) for name, source in names.items()}


def _clashing(names: Mapping[str, str]) -> list[str]:
    """The sources that share their names, also on file systems that ignore case."""
    counts = collections.Counter(name.casefold() for name in names.values())
    return [source for source, name in names.items() if counts[name.casefold()] > 1]


def check_sources(config: TrainConfig) -> None:
    """Checks that the sources exist, before anything slow is loaded.

    Raises:
      ValueError: if there is no training data, a local manifest does not exist, or an evaluation
        set is named "train".
    """
    if not config.data.train:
        raise ValueError("no training data: pass --data.train MANIFEST.jsonl")
    eval_names(config)
    for source in (*config.data.train, *config.data.eval):
        if not (source.startswith(PREFIX) or is_url(source) or os.path.isfile(source)):
            raise missing_manifest(source)


def read_source(source: str, config: DataConfig, cache: Path) -> tuple[Rows, BadRows]:
    """Reads the rows of a source; see `DataConfig` for its syntax.

    Args:
      source: a manifest or a data set.
      config: how data sets are read.
      cache: folder for what was downloaded or measured, for the next start.

    Raises:
      ValueError: if it does not exist or has no rows.
    """
    if source.startswith(PREFIX):
        return read_hf(source, config, cache)
    return read_manifest(source, cache=cache)


@dataclass(frozen=True)
class BatchMaker:
    """Makes the batches of a run's sets.

    Attributes:
      config: the run's config.
      folder: the run's folder.
      prompt: the chat prompt, with the LLM's tokenizer.
      mesh: determines which rows this process provides.
      bad_rows: receives the rows that cannot be used.
      encode: the frozen encoder, for `config.data.cache_features`.
      encoder_digest: identifies it, wherever it is.
    """

    config: TrainConfig
    folder: RunFolder
    prompt: Prompt
    mesh: Mesh
    bad_rows: BadRowLog
    encode: Encode
    encoder_digest: str

    def train(self) -> Batches:
        """The training batches of the whole run: all of `data.train`, mixed by weight and shuffled.

        Raises:
          ValueError: if none of the rows can be used.
        """
        sources, weights = self.config.data.train, self.config.data.train_weights
        return self.make(
            "train",
            [self.read(source) for source in sources],
            batch_size=self.config.data.batch_size,
            accumulation_steps=self.config.accumulation_steps,
            shuffle_seed=self.config.seed,
            num_batches=self.config.num_steps,
            weights=dict(zip(sources, weights or [1.0] * len(sources), strict=True)),
            drop_doubtful=self.config.data.drop_doubtful,
        )

    def eval(self) -> dict[str, Batches]:
        """The batches of each source in `data.eval`, by the source's name.

        Raises:
          ValueError: if a source has no row that can be used.
        """
        names, before = eval_names(self.config), {}
        if self.folder.config.is_file():
            before = eval_names(self.folder.read_config())
        for name, source in names.items():
            if before.get(name, source) != source:
                log.warning(
                    "%s is %s now, and was %s when the run began: unless these are the same, its "
                    "scores do not compare with the earlier ones",
                    *(name, source, before[name]),
                )
        return {
            name: self.make(name, [self.read(source)], batch_size=self.config.data.eval_batch_size)
            for name, source in names.items()
        }

    def read(self, source: str) -> Rows:
        """Reads the rows of a source."""
        cache = self._cache
        if not isinstance(cache, Path):  # what is kept of rows needs a disk
            cache = self.folder.data_cache
        return read_source(source, self.config.data, cache)[0]

    @property
    def _cache(self) -> AnyPath:
        """The folder that `data.cache_dir` names, or `data` in the run folder."""
        named = self.config.data.cache_dir
        try:
            return any_path(named) if named else self.folder.path / "data"
        except ValueError as error:
            raise ValueError(f"--data.cache-dir: {error}") from error

    def make(
        self,
        name: str,
        sources: Sequence[Rows],
        *,
        drop_doubtful: bool = False,
        silence: bool = False,
        **options: Any,
    ) -> Batches:
        """Makes the batches of a set of rows.

        Args:
          name: the set's name.
          sources: the rows of each of its sources.
          drop_doubtful: use no clips that may be no speech.
          silence: replace every clip by silence of its length.
          options: passed on to `Batches`.

        Raises:
          ValueError: if too many rows are defective, or none is left.
        """
        bad = BadRows.joined([rows.bad for rows in sources])
        num_good = sum(map(len, sources))
        num_rows = num_good + len(bad)
        if not num_good:
            self.bad_rows.start(name, bad, num_rows=num_rows)
            raise ValueError(f"{name}: none of {num_rows} rows can be used")
        utterances, unfit = prepare(sources, self.prompt, self.config.data)
        left_out, window = BadRows.joined([bad, unfit]), self.config.data.window_samples
        unreadable = find_unreadable(
            utterances.find(self.bad_rows.known(name)),
            Waveforms(window),
            num_threads=self.config.data.num_threads,
            drop_doubtful=drop_doubtful,
        )
        self.bad_rows.start(name, left_out, num_rows=num_rows, unreadable=unreadable)
        inputs = Silence(window) if silence else self._inputs(name, utterances)
        batches = Batches(
            utterances,
            inputs=inputs,
            prompt=self.prompt,
            config=self.config.data,
            pool_stride=self.config.projector.projector_pool_stride,
            mesh=self.mesh,
            name=name,
            left_out=left_out,
            drop_doubtful=drop_doubtful,
            **options,
        )
        log.info("%s: %d utterances, buckets %s", name, len(utterances), batches.buckets)
        return batches

    def _inputs(self, name: str, utterances: Utterances) -> Inputs:
        config = self.config
        if not config.data.cache_features:
            return Waveforms(config.data.window_samples)
        encoding = Encoding(
            self.encoder_digest,
            config.projector.encoder_dim,
            config.dtype,
            config.data.window_samples,
            config.data.whole_window,
        )
        return keep_frames(
            self._cache / "frames",
            name,
            utterances,
            self.encode,
            encoding,
            mesh=self.mesh,
            batch_size=config.data.eval_batch_size,
            num_threads=config.data.num_threads,
        )
