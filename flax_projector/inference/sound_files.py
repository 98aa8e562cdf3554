"""Transcribes sound files of any length: in pieces, batched together, in the files' order."""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from flax_projector.config import LimitName
from flax_projector.data.audio import BadAudio
from flax_projector.data.stream import stream_audio
from flax_projector.inference.pieces import Piece, to_pieces
from flax_projector.inference.queues import in_batches
from flax_projector.lengths import SAMPLE_RATE
from flax_projector.logs import progress_bar
from flax_projector.training.scores import Transcript

log = logging.getLogger(__name__)

Hear = Callable[[Sequence[Piece], float, int], Sequence[Transcript]]
"""Transcribes pieces, given the bound of their bucket and how many a batch of it may hold."""

_MAX_WAITING = 16  # batches that may be full before those that are not are given, too


@dataclass(frozen=True)
class Segment:
    """What was heard in a part of a file.

    Attributes:
      start: where it begins, in seconds.
      end: where it ends.
      text: the words, in one line.
      cut_by: the limit that cut them, if any.
    """

    start: float
    end: float
    text: str
    cut_by: LimitName | None


@dataclass(frozen=True)
class Heard:
    """What was heard in a file.

    Attributes:
      path: of the file.
      secs: its length.
      segments: in order; empty if there is an error.
      error: why the file cannot be used; None if it can.
    """

    path: str
    secs: float
    segments: tuple[Segment, ...]
    error: str | None = None

    @property
    def text(self) -> str:
        """All words, in one line."""
        return " ".join(segment.text for segment in self.segments if segment.text)


@dataclass(eq=False)
class _File:
    """A file under way."""

    path: str
    secs: float = 0.0
    error: str | None = None
    is_read: bool = False
    segments: list[Segment | None] = field(default_factory=list)  # None: not heard yet

    def read(self, max_secs: float) -> Iterator[tuple["_File", int, Piece]]:
        """Its pieces, with their numbers."""
        try:
            for piece in to_pieces(self._blocks(), max_secs=max_secs):
                self.segments.append(None)
                yield self, len(self.segments) - 1, piece
            if not self.segments:
                self.error = f"{self.path}: no speech was found in its {self.secs:.1f} s"
        except BadAudio as error:
            self.error = str(error)
        self.is_read = True

    def _blocks(self) -> Iterator[np.ndarray]:
        for block in stream_audio(self.path):
            self.secs += len(block) / SAMPLE_RATE
            yield block

    def result(self) -> Heard | None:
        """What was heard, if all of it is known."""
        heard = tuple(filter(None, self.segments))
        if self.error:
            return Heard(self.path, self.secs, (), self.error)
        if self.is_read and len(heard) == len(self.segments):
            return Heard(self.path, self.secs, heard)
        return None

    @property
    def heard_secs(self) -> float:
        """Where the last segment ends that has been heard."""
        return max((segment.end for segment in self.segments if segment), default=0.0)


def hear_files(
    paths: Sequence[str],
    hear: Hear,
    *,
    bounds: Sequence[float],
    sizes: Sequence[int],
    total_secs: float | None = None,
) -> Iterator[Heard]:
    """Transcribes files.

    Memory holds the pieces of a batch of each bucket, however long the files are.

    Args:
      paths: paths or URLs.
      hear: transcribes pieces.
      bounds: of the buckets, in seconds; the last is the length of the longest piece.
      sizes: how many pieces a batch of each bucket holds.
      total_secs: the length of all files, for the progress bar; None if it is not known.

    Yields:
      What was heard in each file, or why it cannot be used; in the given order.
    """
    waiting: deque[_File] = deque()

    def pieces() -> Iterator[tuple[_File, int, Piece]]:
        for path in paths:
            waiting.append(_File(path))
            yield from waiting[-1].read(bounds[-1])

    def results() -> Iterator[Heard]:
        while waiting and (heard := waiting[0].result()):
            waiting.popleft()
            yield heard

    batches = in_batches(
        pieces(),
        secs=lambda item: len(item[2].samples) / SAMPLE_RATE,
        bounds=bounds,
        sizes=sizes,
        max_waiting=_MAX_WAITING * max(sizes),
    )
    total = None if total_secs is None else round(total_secs)
    done = 0.0
    with progress_bar(log, "transcribing", total=total, unit=" s of audio", leave=False) as bar:
        for number, batch in batches:
            if items := [item for item in batch if item[0].error is None]:
                found = hear([piece for _, _, piece in items], bounds[number], sizes[number])
                for (file, index, piece), transcript in zip(items, found, strict=True):
                    text = " ".join(transcript.hypothesis.split())
                    segment = Segment(piece.start, piece.end, text, transcript.cut_by)
                    file.segments[index] = segment
            for heard in results():
                done += heard.secs
                yield heard
            under_way = sum(file.heard_secs for file in waiting)
            bar.update(round(done + under_way) - bar.n)
        yield from results()
