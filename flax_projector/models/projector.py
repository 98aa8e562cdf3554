"""The audio projector: encoder frames in, LLM-sized audio tokens out."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from flax_projector.config import ProjectorConfig
from flax_projector.models.layers import RMSNorm, exact_gelu
from flax_projector.models.trained import TrainedDense, scaled
from flax_projector.sharding import abstract_params


class ResidualMLP(nn.Module):
    """x + MLP(x); close to the identity at first, since fc2 starts at a tenth of the std.

    Source: `ResidualMLP` (tiny-audio, PyTorch).
    """

    config: ProjectorConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B A D"], *, deterministic: bool) -> Float[Array, "B A D"]:
        """[B, A, D] in `dtype`; dropout needs the "dropout" rng unless `deterministic`."""
        c = self.config
        std = c.projector_init_std
        dropout = nn.Dropout(c.projector_dropout, deterministic=deterministic)
        dtypes = (self.dtype, self.param_dtype)
        h = TrainedDense(c.hidden_dim, ("embed", "mlp"), std, *dtypes, name="fc1")(x)
        h = dropout(exact_gelu(h))
        h = TrainedDense(c.llm_dim, ("mlp", "embed"), 0.1 * std, *dtypes, name="fc2")(h)
        return x + dropout(h)


class ResidualAudioProjector(nn.Module):
    """Projects encoder frames into the LLM's embedding space.

    Concatenates k consecutive frames, projects them to the LLM's width, then refines them with
    residual MLPs, with a norm after the projection and after every block.

    Attributes:
      config: shape, dropout and initialisation.
      dtype: compute dtype; inputs and parameters are cast to it.
      param_dtype: storage dtype of the parameters.

    Source: `ResidualAudioProjector` (tiny-audio, PyTorch): names, numerics, initialisation.
    """

    config: ProjectorConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, frames: Float[Array, "B S E"], *, deterministic: bool = True
    ) -> Float[Array, "B A D"]:
        """Projects a batch.

        Args:
          frames: f32|bf16[B, S, E] encoder output, 50 frames per second.
          deterministic: False applies dropout and needs the "dropout" rng.

        Returns:
          [B, A, D] in `dtype`; A = ceil(S / k): the tail is padded with zero frames.

        Raises:
          ValueError: if E differs from config.encoder_dim.
        """
        c = self.config
        k = c.projector_pool_stride
        b, s, e = frames.shape
        if e != c.encoder_dim:
            raise ValueError(
                f"frames of width {e} for a projector with encoder_dim {c.encoder_dim}: "
                "this projector was made for another encoder"
            )
        x = frames.astype(self.dtype)
        x = jnp.pad(x, ((0, 0), (0, -s % k), (0, 0)))
        x = x.reshape(b, -1, k * e)  # [B, A, k*E]
        dtypes = (self.dtype, self.param_dtype)
        axes, std = ("frames", "embed"), c.projector_init_std
        x = TrainedDense(c.llm_dim, axes, std, *dtypes, name="input_proj")(x)
        x = self._norm("ln_input")(x)
        for i in range(c.projector_num_layers):
            block = ResidualMLP(c, *dtypes, name=f"layers_{i}")
            x = self._norm(f"layer_norms_{i}")(block(x, deterministic=deterministic))
        return nn.Dropout(c.projector_dropout, deterministic=deterministic)(x)

    def _norm(self, name: str) -> RMSNorm:
        dtypes = (self.dtype, self.param_dtype)
        return RMSNorm(self.config.rms_norm_eps, *dtypes, multiply=scaled, name=name)


def last_norm_name(config: ProjectorConfig) -> str:
    """The parameter group of the norm that determines the scale of the audio tokens."""
    depth = config.projector_num_layers
    return f"layer_norms_{depth - 1}" if depth else "ln_input"


def abstract_projector(
    config: ProjectorConfig, *, param_dtype: DTypeLike = jnp.float32, mesh: Mesh | None = None
) -> dict:
    """Shapes, dtypes and shardings of the projector's parameters."""
    module = ResidualAudioProjector(config, param_dtype=param_dtype)
    frames = jax.ShapeDtypeStruct(
        (1, config.projector_pool_stride, config.encoder_dim), param_dtype
    )
    return abstract_params(module, frames, mesh)
