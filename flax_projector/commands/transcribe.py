"""Words of sound files."""

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro
from tyro.conf import Positional

from flax_projector.commands.use import Use
from flax_projector.logs import printable


@dataclass(frozen=True, kw_only=True)
class Transcribe(Use):
    """Transcribes audio files: prints one line per file, the path, a tab and the transcript."""

    audio: Positional[
        Annotated[
            tuple[str, ...], tyro.conf.arg(metavar="AUDIO ...", help_behavior_hint="(at least one)")
        ]
    ]
    """wav, flac, ogg or mp3 files, as paths or URLs."""

    def __call__(self) -> None:
        """Writes to standard output; for a file that cannot be used, the reason."""
        if not self.audio:
            raise ValueError("name at least one audio file")
        for path, text in self.listener().transcribe_files(self.audio):
            sys.stdout.write(f"{printable(path)}\t{printable(text)}\n")
