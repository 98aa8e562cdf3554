"""Runs as one HTML page that needs no network."""

import base64
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2

from flax_projector.config import option
from flax_projector.report.charts import draw_charts
from flax_projector.report.clips import Clips
from flax_projector.report.differences import differences
from flax_projector.report.runs import Run
from flax_projector.training.scores import ScoredTranscript, counted, summarize

MARK = '<meta name="generator" content="flax_projector report">'
"""Is in the first lines of every page, so that no other file is ever replaced by one."""

_SIGNS = {"equal": "=", "substitute": "~", "delete": "-", "insert": "+"}

Key = tuple[str, str]
"""A set and the id of an utterance."""


def make_page(runs: Sequence[Run], clips: Clips) -> bytes:
    """The page as a file.

    Args:
      runs: at least one.
      clips: the clips that are on it.
    """
    utterances = _utterances(runs, clips)
    data = {
        "runs": [run.name for run in runs],
        "charts": draw_charts([run.curves for run in runs]),
        "lengths": [
            {"run": number, "set": name} | found
            for number, run in enumerate(runs)
            for name, found in run.lengths.items()
        ],
        "utterances": utterances,
    }
    charts: list[dict[str, Any]] = data["charts"]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("flax_projector.report", "assets"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "count": "{:,}".format}
    text = environment.get_template("report.html").render(
        mark=MARK,
        title=" and ".join(run.name for run in runs),
        runs=runs,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        scores=[row for run in runs for row in _scores(run)],
        has_charts=bool(charts),
        is_thinned=any(line["isThinned"] for chart in charts for line in chart["lines"]),
        num_utterances=len(utterances),
        num_clips=len(clips.sounds),
        options=list(_options(runs)),
        data=data,
        style=_asset("report.css"),
        scripts=_scripts(),
        script_hashes=" ".join(_csp_hash(script) for script in _scripts()),
    )
    return text.encode("utf-8", "backslashreplace")  # names of files may not be text


def worst_first(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The ids of the utterances of each set, those with most errors first."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for run in runs:
        for name, evaluation in run.evaluations.items():
            of_set = found.setdefault(name, {})
            for transcript in evaluation.transcripts:
                before, length = of_set.get(transcript.id, (0, transcript.edits.length))
                errors = 0 if transcript.is_empty else transcript.edits.errors
                of_set[transcript.id] = (before + errors, length)
    return {
        name: sorted(of_set, key=lambda i: (-of_set[i][0], of_set[i][1], i))
        for name, of_set in found.items()
    }


def _utterances(runs: Sequence[Run], clips: Clips) -> list[dict[str, Any]]:
    """The rows of the table: each utterance, with what every run heard."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for number, run in enumerate(runs):
        for name, evaluation in run.evaluations.items():
            transcripts = evaluation.transcripts
            for transcript, found in zip(transcripts, differences(transcripts), strict=True):
                row = rows.setdefault(
                    (name, transcript.id, transcript.reference),
                    {
                        "set": name,
                        "id": transcript.id,
                        "secs": transcript.secs,
                        "said": transcript.reference,
                        "unit": "words" if transcript.headline == "wer" else "characters",
                        "sound": clips.sounds.get((name, transcript.id)),
                        "silent": clips.missing.get((name, transcript.id)),
                        "results": [None] * len(runs),
                    },
                )
                row["results"][number] = _result(transcript, found)
    return list(rows.values())


def _result(transcript: ScoredTranscript, found: list[tuple[str, str, str]]) -> dict[str, Any]:
    notes = []
    if transcript.is_bad:
        notes.append("the clip could not be read")
    if transcript.is_empty:
        notes.append("not counted: no word is left to compare")
    if transcript.cut_by:
        notes.append(f"cut by {option(transcript.cut_by)}")
    return {
        "heard": transcript.hypothesis,
        "parts": [
            [_SIGNS[kind], said] if said == heard else [_SIGNS[kind], said, heard]
            for kind, said, heard in found
        ],
        "errors": None if transcript.is_empty else transcript.edits.errors,
        "length": transcript.edits.length,
        "notes": notes,
    }


def _scores(run: Run) -> Iterator[Mapping[str, Any]]:
    """The rows of the table of scores."""
    for name, evaluation in run.evaluations.items():
        transcripts = evaluation.transcripts
        row = {"run": run.name, "set": name, "evaluation": evaluation, "summary": None}
        if counted(transcripts):
            row["summary"] = summarize(transcripts)
        yield row


def _options(runs: Sequence[Run]) -> Iterator[Mapping[str, Any]]:
    """The options of all runs, as one types them."""
    flat = [dict(_leaves(run.config)) for run in runs]
    for name in dict.fromkeys(name for leaves in flat for name in leaves):
        values = [leaves.get(name, "") for leaves in flat]
        yield {"name": option(name), "values": values, "differs": len(set(values)) > 1}


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            yield prefix + name, " ".join(map(str, value))
        elif value is None:
            yield prefix + name, "none"
        else:
            yield prefix + name, value if isinstance(value, str) else json.dumps(value)


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f}%"


@functools.cache
def _scripts() -> tuple[str, str]:
    """Plotly, and ours."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs(), _asset("report.js")


@functools.cache
def _csp_hash(script: str) -> str:
    """What a content security policy calls a script that may run: no other one does."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _asset(name: str) -> str:
    loader = jinja2.PackageLoader("flax_projector.report", "assets")
    return loader.get_source(jinja2.Environment(), name)[0]
