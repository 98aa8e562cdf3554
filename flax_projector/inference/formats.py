"""What was heard in sound files, as text, JSON or subtitles."""

import html
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict

from flax_projector.config import TranscriptFormat
from flax_projector.inference.sound_files import Heard
from flax_projector.logs import printable


def render(form: TranscriptFormat, files: Iterable[Heard]) -> Iterator[str]:
    """The text of files in a format, piece by piece: those of subtitles have only one file."""
    match form:
        case "text":
            yield from (f"{printable(file.path)}\t{printable(file.text)}\n" for file in files)
        case "jsonl":
            yield from (f"{_json(file)}\n" for file in files)
        case "json":
            yield "["
            for number, file in enumerate(files):
                yield f"{',' if number else ''}\n{_json(file, indent=2)}"
            yield "\n]\n"
        case "srt":
            for file in files:
                for number, (times, text) in enumerate(_cues(file, point=","), 1):
                    yield f"{number}\n{times}\n{text}\n\n"
        case "vtt":
            for file in files:
                yield "WEBVTT\n\n"
                for times, text in _cues(file, point="."):
                    yield f"{times}\n{html.escape(text, quote=False)}\n\n"


def _json(file: Heard, indent: int | None = None) -> str:
    segments = [
        {**asdict(segment), "start": round(segment.start, 3), "end": round(segment.end, 3)}
        for segment in file.segments
    ]
    record = {"audio": file.path, "secs": round(file.secs, 3), "text": file.text}
    text = json.dumps({**record, "segments": segments}, ensure_ascii=False, indent=indent)
    return text.encode(errors="backslashreplace").decode()  # of a name that is not UTF-8


def _cues(file: Heard, *, point: str) -> Iterator[tuple[str, str]]:
    """Times and text of each segment in which words were heard."""
    for segment in file.segments:
        if segment.text:
            times = (_time(secs, point) for secs in (segment.start, segment.end))
            yield " --> ".join(times), printable(segment.text)


def _time(secs: float, point: str) -> str:
    """Hours, minutes, seconds and milliseconds."""
    whole, millis = divmod(round(1000 * secs), 1000)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}{point}{millis:03}"
