"""The finished run of `make demo`, heard in every way."""

import json
import os
from pathlib import Path

import jiwer
import pytest
import soundfile

from convert import to_flax
from convert.hf_folder import to_hf_folder
from flax_projector.data.audio import load_audio
from flax_projector.data.manifest import read_manifest
from flax_projector.inference.listen import Listener
from tests.media import SPEECH, spoken

ROOT = Path(__file__).parents[1]
RUN = Path(os.environ.get("FLAX_PROJECTOR_DEMO_RUN", ROOT / "runs/demo"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (RUN / "projector").is_dir(),
        reason="no demo run: `make demo`, or set FLAX_PROJECTOR_DEMO_RUN",
    ),
]


@pytest.fixture(scope="module")
def rows():
    return list(read_manifest(SPEECH)[0])


def words(listener: Listener, paths: list[str]) -> list[str]:
    return [heard.text for heard in listener.transcribe_files(paths)]


def test_its_folders_of_other_forms_have_the_same_transcripts(rows, tmp_path):
    paths = [str(row.audio) for row in rows]
    expected = words(Listener(RUN), paths)
    last = max((RUN / "transcripts").glob(f"{SPEECH.stem}-*.jsonl"))
    scored = {t["id"]: t["hypothesis"] for t in map(json.loads, last.read_text().splitlines())}
    assert expected == [scored[row.id] for row in rows]
    exported = to_hf_folder(RUN, tmp_path / "hf")
    to_flax(exported, tmp_path / "flax")
    assert words(Listener(exported), paths) == expected
    assert words(Listener(tmp_path / "flax"), paths) == expected


@pytest.mark.parametrize(("pause_secs", "limit"), [(0.6, 0.02), (1.0, 0.02)])
def test_the_clips_in_one_long_file_have_about_the_same_words(rows, pause_secs, limit, tmp_path):
    samples, spans = spoken([load_audio(row.audio) for row in rows], pause_secs)
    soundfile.write(tmp_path / "long.flac", samples, 16_000)
    (heard,) = Listener(RUN).transcribe_files([str(tmp_path / "long.flac")])
    assert len(heard.segments) == len(spans)
    assert jiwer.wer(" ".join(row.text for row in rows), heard.text) <= limit
