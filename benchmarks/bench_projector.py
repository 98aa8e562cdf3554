"""Measures the projector in Flax against the one in PyTorch: same sizes, f32, forward and backward.

Both run in this process and take turns, so that a busy machine slows both equally. Prints JSON:
medians in seconds, and ours divided by PyTorch's.

Example:

  python benchmarks/bench_projector.py --rounds 15
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import torch
from side_by_side import Pair, compare, flax_params

from convert.models import PROJECTOR
from convert.torch_projector import ResidualAudioProjector as TorchProjector
from flax_projector.config import ProjectorConfig
from flax_projector.models.projector import ResidualAudioProjector

# whisper-large-v3-turbo to SmolLM3-3B, 30 s
CONFIG = ProjectorConfig(encoder_dim=1280, llm_dim=2048, projector_hidden_dim=8192)
BATCH, FRAMES = 4, 1500


def make_pairs() -> dict[str, Pair]:
    """Makes two pairs: forward alone, and with the gradients of all parameters."""
    torch.manual_seed(0)
    module = TorchProjector(CONFIG).eval()
    params = flax_params(PROJECTOR, CONFIG, module)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH, FRAMES, CONFIG.encoder_dim)).astype(np.float32)
    w = rng.normal(size=(BATCH, FRAMES // 4, CONFIG.llm_dim)).astype(np.float32)
    jax_x, jax_w, torch_x, torch_w = jnp.asarray(x), jnp.asarray(w), *map(torch.from_numpy, (x, w))

    @jax.jit
    def forward(params, x):
        return jnp.asarray(ResidualAudioProjector(CONFIG).apply({"params": params}, x))

    @jax.jit
    def gradients(params, x, w):
        return jax.grad(lambda p: jnp.sum(forward(p, x) * w))(params)

    def torch_forward():
        with torch.no_grad():
            return module(torch_x)

    def torch_gradients():
        module.zero_grad(set_to_none=True)
        (module(torch_x) * torch_w).sum().backward()

    return {
        "forward": (lambda: jax.block_until_ready(forward(params, jax_x)), torch_forward),
        "forward and backward": (
            lambda: jax.block_until_ready(gradients(params, jax_x, jax_w)),
            torch_gradients,
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=11, help="rounds; each runs both once")
    compare("projector", make_pairs(), rounds=parser.parse_args().rounds)


if __name__ == "__main__":
    main()
