"""Prints the results of a demo run as Markdown, and where its report is.

Example:

  python examples/demo/results.py --run runs/demo --parity runs/demo/parity.json
"""

import argparse
import json
import logging
from pathlib import Path

from flax_projector.run_folder import RunFolder

log = logging.getLogger("flax_projector.demo")


def read_metrics(run: Path) -> list[dict]:
    """Returns all records of a run; of steps that a restart repeated, only the last."""
    lines = RunFolder(run).metrics.read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return list({(r["step"], "loss" in r, *sorted(r)): r for r in records}.values())


def read_transcripts(run: Path, name: str, step: int) -> list[dict]:
    """Returns the transcripts of one evaluation of a set."""
    lines = RunFolder(run).transcripts(name, step).read_text().splitlines()
    return [json.loads(line) for line in lines]


def eval_curves(records: list[dict], metric: str) -> dict[str, list[tuple[int, float]]]:
    """Returns the (step, value) pairs of a metric, by evaluation set."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for key, value in record.items():
            if key.startswith("eval/") and key.endswith(f"/{metric}"):
                curves.setdefault(key.split("/")[1], []).append((record["step"], value))
    return {name: sorted(points) for name, points in sorted(curves.items())}


def markdown(run: Path, records: list[dict], parity: dict) -> str:
    """Returns word error rates before and after, sample transcripts and the parity table."""
    config = RunFolder(run).read_config()
    train = [r for r in records if "loss" in r]
    minutes = {
        metric: sum(r["step_secs"] * r["num_steps"] for r in records if metric in r) / 60
        for metric in ("ctc_loss", "loss")
    }
    lines = [
        f"Batches of {config.data.batch_size} utterances, seed {config.seed}: "
        f"{config.ctc.num_steps} steps of CTC in {minutes['ctc_loss']:.1f} minutes, then "
        f"{config.num_steps - config.ctc.num_steps} steps with the LLM in {minutes['loss']:.1f} "
        f"minutes; final loss {train[-1]['loss']:.3f}.",
        "",
        "| held-out set | utterances | WER before | WER after | loss after |",
        "| --- | --- | --- | --- | --- |",
    ]
    losses = eval_curves(records, "loss")
    for name, points in eval_curves(records, "wer").items():
        before, after = 100 * points[0][1], 100 * points[-1][1]
        step, loss = losses[name][-1]
        count = len(read_transcripts(run, name, step))
        lines.append(f"| {name} | {count} | {before:.1f}% | {after:.1f}% | {loss:.3f} |")
    for name, points in losses.items():
        transcripts = read_transcripts(run, name, points[-1][0])
        wrong = [t for t in transcripts if t["reference"] != t["hypothesis"]]
        lines += ["", f"{name}: {len(wrong)} of {len(transcripts)} transcripts differ.", ""]
        lines += ["| said | heard |", "| --- | --- |"]
        shown = [*wrong[:10], *(t for t in transcripts[:3] if t not in wrong)]
        lines += [f"| {t['reference']} | {t['hypothesis']} |" for t in shown]
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
    text = markdown(args.run, read_metrics(args.run), json.loads(args.parity.read_text()))
    (args.run / "results.md").write_text(text)
    report = RunFolder(args.run).report
    log.info("%s\nResults: %s\nReport: %s", text, args.run / "results.md", report)


if __name__ == "__main__":
    main()
