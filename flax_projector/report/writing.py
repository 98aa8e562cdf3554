"""Where reports are written: by the command, and by training."""

import json
import logging
import time
from collections.abc import Mapping, Sequence

import jax

from flax_projector.data.batches import Batches
from flax_projector.data.rows import ManifestRow
from flax_projector.files import any_path, write_atomically
from flax_projector.report.clips import Clips, FindRows, Found, rows_of_sources
from flax_projector.report.lengths import histogram
from flax_projector.report.page import MARK, make_page, worst_first
from flax_projector.report.runs import Run, read_run, read_runs
from flax_projector.run_folder import RunFolder
from flax_projector.storage import AnyPath

log = logging.getLogger(__name__)


def write_report(paths: Sequence[str], *, out: str | None, sources: Sequence[str]) -> AnyPath:
    """Writes the report of runs, or of scores.

    Args:
      paths: their folders.
      out: the file; None for `report.html` in the folder, if there is only one.
      sources: where clips are looked for, instead of where the runs found them.

    Returns:
      Where it is.

    Raises:
      ValueError: if there is nothing to show, or another file is in the way.
      OSError: if it cannot be written.
    """
    if out is None and len(paths) > 1:
        raise ValueError("several folders have one report: say where with --out FILE.html")
    runs = read_runs(paths)
    file = runs[0].folder.report if out is None else any_path(out)
    _check_out(file)
    for run in runs:
        for problem in run.problems:
            log.warning("%s", problem)
    clips = Clips()
    clips.choose(worst_first(runs), _first_that_knows(runs, sources))
    write_atomically(file, make_page(runs, clips))
    return file


def _check_out(file: AnyPath) -> None:
    """Checks that a report may be written to a file, before anything slow.

    Raises:
      ValueError: if it is a folder, or something else than a report.
    """
    if file.is_dir():
        raise ValueError(f"{file} is a folder: name a file")
    if not file.exists():
        return
    with file.open("rb") as opened:
        if MARK.encode() not in opened.read(1000):
            raise ValueError(f"{file} exists and is not a report: choose another --out")


def _first_that_knows(runs: Sequence[Run], sources: Sequence[str]) -> FindRows:
    """Finds the rows of a set where the first run does that has them."""

    def find(name: str, ids: Sequence[str]) -> Found:
        reason = ValueError(f"no run has the set {name}")
        for run in (run for run in runs if name in run.evaluations):
            try:
                return rows_of_sources(sources, run)(name, ids)
            except ValueError as error:
                reason = error
        raise reason

    return find


class Reporter:
    """Writes the report of a run that trains, whenever it has been evaluated.

    Whatever happens here, the training goes on: there is one warning.
    """

    def __init__(self, folder: RunFolder, sets: Mapping[str, Batches]):
        """Writes nothing yet.

        Args:
          folder: the run's folder.
          sets: the batches of the training set and of the held-out sets, by name.
        """
        self._folder, self._sets, self._clips = folder, sets, Clips()
        self._is_writer = jax.process_index() == 0
        self._has_lengths = self._has_warned = False

    def __call__(self) -> None:
        """Writes the report anew; only process 0 does."""
        if not self._is_writer:
            return
        start = time.monotonic()
        try:
            self._write()
        except Exception as error:
            if not self._has_warned:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                log.warning("%s is not written: %s", self._folder.report, reason)
            self._has_warned = True
        else:
            secs = time.monotonic() - start
            log.info("report written in %.1f s: %s", secs, self._folder.report)

    def _write(self) -> None:
        if not self._has_lengths:  # they are the same until the next start
            found = {name: histogram(x.utterances.durations) for name, x in self._sets.items()}
            write_atomically(self._folder.lengths, json.dumps(found) + "\n")
            self._has_lengths = True
        run = read_run(self._folder.path, self._folder.path.name)
        self._clips.choose(worst_first([run]), self._find)
        write_atomically(self._folder.report, make_page([run], self._clips))

    def _find(self, name: str, ids: Sequence[str]) -> Found:
        if name not in self._sets:
            raise ValueError("the run is no longer evaluated on this set")
        utterances = self._sets[name].utterances
        keys = [f"{source}\t{row_id}" for source in utterances.sources for row_id in ids]
        found: dict[str, ManifestRow | str] = dict.fromkeys(ids, "the clip could not be read")
        return found | {utterance.row.id: utterance.row for utterance in utterances.find(keys)}
