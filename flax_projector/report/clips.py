"""Sound for the page, small enough to be part of it."""

import base64
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import numpy as np
import soundfile

from flax_projector.config import DataConfig
from flax_projector.data.audio import BadAudio, check_samples, load_audio
from flax_projector.data.hf_source import PREFIX
from flax_projector.data.rows import ManifestRow
from flax_projector.data.sources import read_source, set_names
from flax_projector.lengths import SAMPLE_RATE
from flax_projector.report.runs import Run
from flax_projector.storage import temporary_folder

MAX_CLIPS = 200
MAX_BYTES = 4_000_000
"""So large, together, is the text that clips become: about 12 minutes of speech."""

_NUM_THREADS = 8  # they also wait for disks and networks

Found: TypeAlias = Mapping[str, ManifestRow | str]
"""Rows by their ids; of those that cannot be used, why."""

FindRows: TypeAlias = Callable[[str, Sequence[str]], Found]
"""Finds rows of a set.

Raises:
  ValueError: saying why it knows none of the set.
"""


class Clips:
    """The clips of a page, which are kept for the next one.

    Attributes:
      sounds: MP3 files in base64, by set and id.
      missing: why there is none, likewise; of clips that are only left out, nothing.
    """

    def __init__(self) -> None:
        """There are none yet."""
        self.sounds: dict[tuple[str, str], str] = {}
        self.missing: dict[tuple[str, str], str] = {}

    def choose(self, ids: Mapping[str, Sequence[str]], find_rows: FindRows) -> None:
        """Reads the clips of the next page; those that it shares with the last one are there.

        Args:
          ids: utterances by set, those that matter most first: each set gets an equal share.
          find_rows: knows where the clips are.
        """
        before, self.sounds, self.missing = self.sounds, {}, {}
        rows: dict[tuple[str, str], ManifestRow] = {}
        for name, wanted in ids.items():
            rows |= self._find(name, wanted[:MAX_CLIPS], find_rows)
        each = [[(name, row_id) for row_id in of_set] for name, of_set in ids.items()]
        in_turn = (key for keys in itertools.zip_longest(*each) for key in keys)
        wanted = [key for key in in_turn if key in rows][:MAX_CLIPS]
        size = 0

        def read(key: tuple[str, str]) -> np.ndarray | BadAudio | None:
            return None if key in before else read_samples(rows[key])

        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            for start in range(0, len(wanted), _NUM_THREADS):
                part = wanted[start : start + _NUM_THREADS]
                for key, samples in zip(part, pool.map(read, part), strict=True):
                    if isinstance(samples, BadAudio):
                        self.missing[key] = str(samples)
                        continue
                    sound = before[key] if samples is None else encode(samples)
                    if size + len(sound) <= MAX_BYTES:
                        self.sounds[key] = sound
                        size += len(sound)
                if size > 0.95 * MAX_BYTES:
                    break

    def _find(
        self, name: str, wanted: Sequence[str], find_rows: FindRows
    ) -> dict[tuple[str, str], ManifestRow]:
        """The rows that can be read; of the others, notes why they cannot."""
        try:
            found = find_rows(name, wanted)
        except (OSError, ValueError) as error:
            found = dict.fromkeys(wanted, str(error))
        rows = {}
        for row_id in wanted:
            row = found.get(row_id, "the source has no utterance of this name")
            if isinstance(row, str):
                self.missing[name, row_id] = row
            else:
                rows[name, row_id] = row
        return rows


def read_samples(row: ManifestRow) -> np.ndarray | BadAudio:
    """i16[N], a clip at 16 kHz, or why it cannot be played."""
    try:
        samples = load_audio(row.audio, offset=row.offset, duration=row.duration)
        check_samples(row.audio, samples)  # doubtful clips can be listened to
    except BadAudio as error:
        return error
    return np.rint(32767 * np.clip(samples, -1, 1)).astype(np.int16)


def encode(samples: np.ndarray) -> str:
    """A clip as MP3 in base64, which every browser plays.

    LAME ends the whole process if a sample is not finite or far beyond full scale, so it gets
    integers; and only one thread at a time, since nobody promises that it takes several.

    Args:
      samples: i16[N] at 16 kHz.
    """
    file = io.BytesIO()
    soundfile.write(
        file,
        samples,
        SAMPLE_RATE,
        format="MP3",
        subtype="MPEG_LAYER_III",
        bitrate_mode="VARIABLE",
        compression_level=0.7,  # about 4 kB for a second
    )
    return base64.b64encode(file.getvalue()).decode()


def rows_of_sources(sources: Sequence[str], run: Run) -> FindRows:
    """Finds rows in sources that a user names or, if there are none, in those of a run.

    Args:
      sources: manifests and data sets.
      run: the run, or a folder of scores, which does not say where its clips are.
    """
    named = set_names(sources)
    config = run.settings.data if run.settings else DataConfig()
    cache = run.folder.data_cache
    if not cache.is_dir():  # the run was made elsewhere: nothing is added to it
        cache = temporary_folder()

    def find(name: str, ids: Sequence[str]) -> Found:
        source = named.get(name.removesuffix("-silence")) or _source_of(run, name)
        rows, bad = read_source(source, config, cache)
        wanted = set(ids)
        found: dict[str, ManifestRow | str] = {row.id: row.detail for row in bad}
        return found | {row.id: row for row in rows if row.id in wanted}

    return find


def _source_of(run: Run, name: str) -> str:
    """Where a run has found a set.

    Raises:
      ValueError: if that is not known, or it is no manifest: data sets may have to be fetched.
    """
    sources = set_names(run.settings.data.eval) if run.settings else {}
    if name not in sources:
        raise ValueError(f"it is not known where the clips of {name} are: name them with --data")
    if sources[name].startswith(PREFIX):
        raise ValueError(f"clips of data sets are only read if asked for: --data {sources[name]}")
    return run.folder.find(sources[name])
