"""The files that keep scored transcripts: one set in each, one utterance on each line."""

import dataclasses
import json
import math
import reprlib
import typing
from collections import Counter
from collections.abc import Iterable
from types import UnionType
from typing import Any, Literal, Union

from flax_projector.files import parse_json, read_bytes
from flax_projector.training.scores import Edits, ScoredTranscript, count_edits

_WRITTEN_BY = "such files are written by training, in `transcripts`, and by `evaluate --out`"
# What is the same for all utterances of a set.
_OF_SET = ("set", "headline", "normalizer", "normalizer_version")


def to_lines(transcripts: Iterable[ScoredTranscript]) -> str:
    """Scored transcripts as a file keeps them: a JSON object on each line."""
    return "".join(
        json.dumps(dataclasses.asdict(transcript), ensure_ascii=False) + "\n"
        for transcript in transcripts
    )


def read_scores(path: str) -> list[ScoredTranscript]:
    """Reads a file of scored transcripts.

    Args:
      path: a path or URL.

    Raises:
      ValueError: if there is no such file, or it is not what `to_lines` wrote of one set.
    """
    try:
        text = read_bytes(path).decode("utf-8")
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist") from error
    except IsADirectoryError as error:
        raise ValueError(f"{path} is a folder: name a file in it") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {_WRITTEN_BY}") from error
    transcripts = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line:
            continue
        try:
            value = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        try:
            transcripts.append(_build(ScoredTranscript, value))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    try:
        _check(transcripts)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    return transcripts


def _check(transcripts: list[ScoredTranscript]) -> None:
    """Checks what a line alone does not show."""
    if not transcripts:
        raise ValueError(f"is empty: {_WRITTEN_BY}")
    (id_, count), *_ = Counter(t.id for t in transcripts).most_common(1)
    for name in _OF_SET:
        values = sorted({getattr(t, name) for t in transcripts})
        if len(values) > 1:
            listed = " and ".join(map(repr, values))
            raise ValueError(f"holds more than one set: {name} is {listed}. Name a file for each")
    if count > 1:
        raise ValueError(f"has {count} utterances with the id {id_!r}")
    pairs = [(t.normalized_reference, t.normalized_hypothesis) for t in transcripts]
    for transcript, found in zip(
        transcripts, count_edits(pairs, transcripts[0].headline), strict=True
    ):
        if found != (transcript.words, transcript.characters):
            raise ValueError(
                f"is damaged: the edits of {transcript.id!r} are not those of its normalised texts"
            )


def _build(cls: Any, value: Any) -> Any:
    """An object of a dataclass, from JSON.

    Raises:
      ValueError: naming what is missing, or of another type.
    """
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {reprlib.repr(value)}: {_WRITTEN_BY}")
    types = typing.get_type_hints(cls)
    if missing := [name for name in types if name not in value]:
        raise ValueError(f"has no {', '.join(missing)}: {_WRITTEN_BY}")
    if wrong := [name for name, kind in types.items() if not _fits(kind, value[name])]:
        shown = ", ".join(f"{name} is {reprlib.repr(value[name])}" for name in wrong)
        raise ValueError(f"{shown}, which is not what is written there: it is damaged")
    built = {
        name: _build(kind, value[name]) if kind is Edits else value[name]
        for name, kind in types.items()
    }
    return cls(**built | {name: tuple(v) for name, v in built.items() if isinstance(v, list)})


def _fits(kind: Any, value: Any) -> bool:
    """Whether a value from JSON is of the type of a field."""
    if typing.get_origin(kind) in (Union, UnionType):
        return any(_fits(case, value) for case in typing.get_args(kind))
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if kind is float:
        return type(value) in (int, float) and 0 <= value < math.inf
    if kind is int:
        return type(value) is int and value >= 0
    if kind == tuple[int, ...]:
        return isinstance(value, list) and all(_fits(int, item) for item in value)
    return isinstance(value, dict if kind is Edits else kind)
