"""Transcripts that are not in the shards: NeMo's tarred manifests, and cuts of Lhotse's shar."""

import gzip
import os
import re
from collections.abc import Sequence
from typing import Any

from flax_projector.files import is_url, parse_json, read_bytes


class Texts:
    """Transcripts by the names of clips."""

    def __init__(self, paths: Sequence[str], text_key: str):
        """Reads them.

        Args:
          paths: JSON lines, also compressed with gzip: of NeMo, with "audio_filepath" and
            `text_key`; or of Lhotse, with "id" and "supervisions".
          text_key: where NeMo's lines have the transcript.

        Raises:
          ValueError: naming file and line, if it is none of these, or not about whole clips.
        """
        self._known: dict[tuple[str | None, str], Any] = {}
        for path in paths:
            for number, line in enumerate(_lines(path), 1):
                if line.strip():
                    try:
                        clip, text, offset = _parse(line, text_key)
                    except (AttributeError, LookupError, TypeError, ValueError) as error:
                        raise ValueError(
                            f"{path}, line {number}: expected a row of a NeMo manifest "
                            '("audio_filepath") or a cut of Lhotse ("id", "supervisions"), got '
                            f"{line[:80]!r}"
                        ) from error
                    if offset or self._known.setdefault(clip, text) != text:
                        raise ValueError(
                            f"{path}, line {number}: {clip[1]} is a segment of a clip, or occurs "
                            "twice with different transcripts: only whole clips are indexed. Pack "
                            "the files that the shards were made from"
                        )

    def find(self, shard: str, name: str) -> Any:
        """The transcript of a clip; None if there is none.

        Args:
          shard: path of the shard. NeMo numbers shards, and their names end in the numbers.
          name: of the clip in the shard.
        """
        digits = re.search(r"(\d+)\.\w+$", shard)
        shards = (str(int(digits[1])) if digits else None, None)
        names = (name, os.path.basename(name), name.rpartition(".")[0])
        found = ((number, known) for number in shards for known in names)
        return next((self._known[pair] for pair in found if pair in self._known), None)


def _parse(line: str, text_key: str) -> tuple[tuple[str | None, str], Any, Any]:
    """The number of the shard and the name of a clip, its transcript, and where it begins."""
    row = parse_json(line)
    if "audio_filepath" in row:
        shard = None if row.get("shard_id") is None else str(int(row["shard_id"]))
        return (shard, str(row["audio_filepath"])), row.get(text_key), row.get("offset")
    said = [part.get("text") for part in row["supervisions"]]
    return (None, str(row["id"])), " ".join(text for text in said if text), None


def _lines(path: str) -> list[str]:
    try:
        content = read_bytes(path)
        return (gzip.decompress(content) if path.endswith(".gz") else content).decode().split("\n")
    except FileNotFoundError as error:
        where = "" if is_url(path) or os.path.isabs(path) else f" in {os.getcwd()}"
        raise ValueError(f"--texts {path} does not exist{where}") from error
    except Exception as error:  # file systems raise the errors of their clients
        raise ValueError(
            f"--texts {path} cannot be read: {type(error).__name__}: {error}"
        ) from error
