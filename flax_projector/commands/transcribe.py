"""Words of sound files."""

import logging
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional

from flax_projector.commands.output import check_new
from flax_projector.commands.use import Use
from flax_projector.config import TranscriptFormat
from flax_projector.logs import printable, write_above_bars

if TYPE_CHECKING:
    from flax_projector.inference.sound_files import Heard
    from flax_projector.storage import AnyPath

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Transcribe(Use):
    """Transcribes sound files of any format and length.

    What is longer than the clips of the training is cut where nobody speaks. A file that cannot be
    used is an error on standard error; the others are transcribed all the same, and the exit code
    is 1.
    """

    audio: Positional[
        Annotated[
            tuple[str, ...], tyro.conf.arg(metavar="AUDIO ...", help_behavior_hint="(at least one)")
        ]
    ]
    """Sound files or videos, as paths or URLs."""
    format: Annotated[TranscriptFormat, tyro.conf.arg(metavar="text|json|jsonl|srt|vtt")] = "text"
    """text: a line for each file, the path, a tab and the transcript. json (one list) and jsonl (a
    line for each file): with the times of the parts. srt and vtt: subtitles."""
    out: Annotated[str | None, tyro.conf.arg(metavar="FILE|FOLDER/")] = None
    """A new file, instead of standard output; or a folder for one file each, if it exists, its name
    ends with a slash, or there are subtitles of several files."""

    def __call__(self) -> None:
        """Writes the transcripts; exits with 1 if a file could not be used."""
        from flax_projector.files import any_path, write_atomically
        from flax_projector.inference.formats import render

        paths = tuple(dict.fromkeys(self.audio))
        if not paths:
            raise ValueError("name at least one sound file")
        files = self._files(paths)  # what is wrong is found before the model is loaded
        lengths = _lengths(paths)
        if not lengths:
            sys.exit(1)
        known = [secs for secs in lengths.values() if secs is not None]
        total = sum(known) if len(known) == len(lengths) else None
        all_heard = self.listener().transcribe_files([*lengths], total_secs=total)
        usable: list[str] = []

        def results() -> "Iterator[Heard]":
            for heard in all_heard:
                if heard.error is None:
                    usable.append(heard.path)
                    yield heard
                else:
                    _log_error(heard.error)

        if files:
            for heard in results():
                write_atomically(files[heard.path], "".join(render(self.format, [heard])))
        elif self.out is None:
            for text in render(self.format, results()):
                write_above_bars(text)
        else:
            content = "".join(render(self.format, results()))
            if usable:
                write_atomically(any_path(self.out), content)
        if len(usable) < len(paths):
            sys.exit(1)

    def _files(self, paths: tuple[str, ...]) -> "dict[str, AnyPath]":
        """The file for each path, if `--out` names a folder.

        Raises:
          ValueError: if `--out` is needed, cannot be written, or would be written over.
        """
        from flax_projector.data.sources import set_names
        from flax_projector.files import any_path

        has_several_subtitles = self.format in ("srt", "vtt") and len(paths) > 1
        if self.out is None:
            if has_several_subtitles:
                raise ValueError(
                    f"--format {self.format} writes a file for each of several: pass --out FOLDER"
                )
            return {}
        out = any_path(self.out)
        if not (self.out.endswith("/") or out.is_dir() or has_several_subtitles):
            check_new([out], self.out, way_out="name")
            return {}
        suffix = "txt" if self.format == "text" else self.format
        files = {path: out / f"{name}.{suffix}" for name, path in set_names(paths).items()}
        check_new([*files.values()], self.out, way_out="folder")
        return files


def _lengths(paths: Iterable[str]) -> dict[str, float | None]:
    """The files that can be used, as far as they show it at once, with the lengths they state."""
    from flax_projector.data.audio import BadAudio
    from flax_projector.data.stream import stated_secs
    from flax_projector.files import is_url

    lengths = {}
    for path in paths:
        try:
            lengths[path] = None if is_url(path) else stated_secs(path)
        except BadAudio as error:
            _log_error(str(error))
    return lengths


def _log_error(text: str) -> None:
    log.error("error: %s", printable(text))  # in one line, whatever the file is called
