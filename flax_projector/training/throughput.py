"""How fast a run is: speech per second, waiting time, FLOP utilisation, compilations, profiles."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from flax_projector.chips import peak_flops
from flax_projector.config import LlamaConfig
from flax_projector.storage import AnyPath
from flax_projector.storage.growing import growing

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FlopCounter:
    """FLOPs that the model needs, excluding recomputation and padding.

    With N parameters in matrices, a token costs 2N forward, 2N backward to its input, and 2N for
    the gradient of the parameters:

      2 N_encoder per frame of the window    forward only; 0 with kept frames
      6 N_projector per audio token
      4 N_layers per token of the LLM        frozen parameters need no gradient
      4 V D per label                        logits

    Not counted: attention scores and weighted sums, norms, the log-mel, CTC, the optimizer.

    Attributes:
      encoder: N of the encoder times the frames of its window, for one clip.
      projector: N of the projector.
      layers: N of the LLM without its embeddings.
      head: V D of the LLM.
    """

    encoder: int
    projector: int
    layers: int
    head: int

    def __call__(self, metrics: Mapping[str, float]) -> float:
        """FLOPs of the steps whose counts are summed in `metrics`; see `train_step`."""
        return (
            2 * self.encoder * metrics["num_clips"]
            + 6 * self.projector * metrics["num_audio_tokens"]
            + 4 * self.layers * metrics.get("num_tokens", 0)
            + 4 * self.head * metrics.get("num_labels", 0)
        )


def make_flop_counter(
    params: tuple[Any, Any, Any], llama: LlamaConfig, *, window_frames: int
) -> FlopCounter:
    """Counts the parameters in a model's matrices.

    Args:
      params: parameters of the projector, the encoder and the LLM.
      llama: the LLM's shape.
      window_frames: frames that the encoder computes for a clip; 0 if frames are kept.
    """

    def count(tree: Any) -> int:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return sum(leaf.size for path, leaf in leaves if path[-1].key == "kernel")

    projector, encoder, llm = params
    head = llama.vocab_size * llama.hidden_size
    return FlopCounter(
        encoder=count(encoder) * window_frames,
        projector=count(projector),
        layers=count(llm["layers"]),
        head=head,
    )


@contextlib.contextmanager
def compilations() -> Iterator[Callable[[], int]]:
    """Counts the programs that XLA compiles inside the block.

    There are only a few buckets of lengths: once each has been seen, the number must not grow.

    Yields:
      A function that returns the number so far.
    """
    count = 0

    def listen(event: str, duration_secs: float, **_metadata: Any) -> None:
        nonlocal count
        count += event == _COMPILATION

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield lambda: count
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


_COMPILATION = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def profiled(step: int, num_steps: int, folder: AnyPath) -> Iterator[bool]:
    """Traces steps with the profiler, from the eleventh step of a start.

    Args:
      step: number of the step since the program started, from 0.
      num_steps: how many steps to trace; 0 for none.
      folder: receives the trace, for TensorBoard and Perfetto.

    Yields:
      Whether this is the last step of the trace: if so, wait for its results inside the block.
    """
    if num_steps and step == _STEPS_BEFORE_TRACE:
        jax.profiler.start_trace(str(growing(folder, is_folder=True)))
    is_last = num_steps > 0 and step == _STEPS_BEFORE_TRACE + num_steps - 1
    with jax.profiler.StepTraceAnnotation("train", step_num=step):
        yield is_last
    if is_last:
        jax.profiler.stop_trace()
        log.info("profile of %d steps in %s", num_steps, folder)


_STEPS_BEFORE_TRACE = 10


def check_profile(num_steps: int, num_left: int) -> None:
    """Warns if too few steps are left for a trace."""
    if num_steps and num_left < (needed := _STEPS_BEFORE_TRACE + num_steps):
        log.warning("no profile: it needs %d steps, but only %d are left", needed, num_left)


COUNTS = ("num_clips", "num_audio_tokens", "num_tokens", "num_labels", "num_ctc_labels")


def summarize(
    steps: list[Mapping[str, np.ndarray]],
    *,
    secs: float,
    wait_secs: float,
    count_flops: FlopCounter,
    devices: list[Any],
) -> dict[str, float]:
    """Summarises the steps since the last line of the log.

    Args:
      steps: the metrics of each step, on the host.
      secs: wall-clock time of all steps together.
      wait_secs: how much of it the loop spent waiting for data.
      count_flops: counts the FLOPs of the run's model.
      devices: the mesh's devices.

    Returns:
      Losses as means per label, other metrics as means per step; "num_steps", "step_secs",
      "audio_secs", "audio_secs_per_sec" and "data_wait_rate"; and on known devices "mfu", the
      model's FLOPs by `FlopCounter` divided by what the devices could have computed.
    """
    stacked = {name: np.array([metrics[name] for metrics in steps], float) for name in steps[0]}
    counts = {name: stacked.pop(name) for name in COUNTS if name in stacked}
    audio_secs = stacked.pop("audio_secs").sum()
    means = {name: float(values.mean()) for name, values in stacked.items()}
    for name, labels in {"loss": "num_labels", "ctc_loss": "num_ctc_labels"}.items():
        if name in stacked:
            weights = np.maximum(counts[labels], 1)
            means[name] = float(np.average(stacked[name], weights=weights))
    summary = {
        **means,
        "num_steps": len(steps),
        "step_secs": secs / len(steps),
        "audio_secs": float(audio_secs),
        "audio_secs_per_sec": float(audio_secs) / secs,
        "data_wait_rate": wait_secs / secs,
    }
    if (peak := peak_flops(devices[0])) is not None:
        flops = count_flops({name: values.sum() for name, values in counts.items()})
        summary["mfu"] = flops / (secs * peak * len(devices))
    return summary
