"""Prints the results of a demo run as Markdown, and where its report is.

Example:

  python examples/demo/results.py --run runs/demo --parity runs/demo/parity.json
"""

import argparse
import json
import logging
import re
from pathlib import Path

import numpy as np

from flax_projector.report.curves import read_curves
from flax_projector.run_folder import RunFolder
from flax_projector.training.score_files import read_scores

log = logging.getLogger("flax_projector.demo")


def markdown(run: Path, parity: dict) -> str:
    """Returns word error rates before and after, sample transcripts and the parity table."""
    folder = RunFolder(run)
    config, (curves, _) = folder.read_config(), read_curves(folder.metrics.read_bytes())

    def minutes(metric: str) -> float:
        """How long the steps took that have a metric."""
        is_of_stage = np.isin(curves["step_secs"].steps, curves[metric].steps)
        secs = curves["step_secs"].values * curves["num_steps"].values
        return float(secs[is_of_stage].sum()) / 60

    lines = [
        f"Batches of {config.data.batch_size} utterances, seed {config.seed}: "
        f"{config.ctc.num_steps} steps of CTC in {minutes('ctc_loss'):.1f} minutes, then "
        f"{config.num_steps - config.ctc.num_steps} steps with the LLM in {minutes('loss'):.1f} "
        f"minutes; final loss {curves['loss'].last:.3f}.",
        "",
        "| held-out set | utterances | WER before | WER after | loss after |",
        "| --- | --- | --- | --- | --- |",
    ]
    names = sorted(name.split("/")[1] for name in curves if re.fullmatch("eval/.+/wer", name))
    found = {}
    for name in names:
        rate, loss = curves[f"eval/{name}/wer"], curves[f"eval/{name}/loss"].last
        found[name] = read_scores(str(folder.transcripts(name, int(rate.steps[-1]))))
        before, after = 100 * rate.values[0], 100 * rate.last
        count = len(found[name])
        lines.append(f"| {name} | {count} | {before:.1f}% | {after:.1f}% | {loss:.3f} |")
    for name, transcripts in found.items():
        wrong = [t for t in transcripts if t.reference != t.hypothesis]
        lines += ["", f"{name}: {len(wrong)} of {len(transcripts)} transcripts differ.", ""]
        lines += ["| said | heard |", "| --- | --- |"]
        shown = [*wrong[:10], *(t for t in transcripts[:3] if t not in wrong)]
        lines += [f"| {t.reference} | {t.hypothesis} |" for t in shown]
    same = sum(clip["same_tokens"] for clip in parity["clips"])
    lines += [
        "",
        f"PyTorch (Hugging Face towers, exported projector) against JAX on {len(parity['clips'])} "
        f"held-out clips: the same tokens for {same}.",
        "",
        "| stage | largest difference | RMS of the values |",
        "| --- | --- | --- |",
    ]
    for name, stage in parity["stages"].items():
        lines.append(f"| {name} | {stage['max_abs_error']:.1e} | {stage['rms']:.2g} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    parser.add_argument(
        "--parity", type=Path, required=True, help="JSON file that pytorch_check.py wrote"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    text = markdown(args.run, json.loads(args.parity.read_text()))
    (args.run / "results.md").write_text(text)
    report = RunFolder(args.run).report
    log.info("%s\nResults: %s\nReport: %s", text, args.run / "results.md", report)


if __name__ == "__main__":
    main()
