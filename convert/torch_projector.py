"""The projector in PyTorch, for a server; needs torch, but neither JAX nor Orbax."""

import numpy as np

from convert.checkpoint import Checkpoint
from convert.extras import missing_torch
from flax_projector.config import ProjectorConfig

try:
    import torch
    import torch.nn.functional as F
    from torch import nn
except ImportError as error:
    raise missing_torch(__name__) from error


class RMSNorm(nn.Module):
    """Root-mean-square norm that rounds as Llama's does: cast to the input's dtype, then scale.

    Source: `LlamaRMSNorm` (transformers). f64 inputs are normalised in f64.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] in the dtype of `x`."""
        wide = x.float() if x.dtype.itemsize < 4 else x
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class ResidualMLP(nn.Module):
    """x + MLP(x).

    Source: `ResidualMLP` (tiny-audio).
    """

    def __init__(self, dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        h = self.dropout(F.gelu(self.fc1(x)))
        return x + self.dropout(self.fc2(h))


class ResidualAudioProjector(nn.Module):
    """The PyTorch counterpart of `flax_projector.models.projector.ResidualAudioProjector`.

    It serves what was trained in Flax, and is what the Flax module is compared with. State-dict
    keys and numerics are those of tiny-audio's module, so that a checkpoint of one loads into the
    other: remove the prefix "projector.", then `load_state_dict(..., strict=True)`.

    Attributes:
      config: shape, dropout and initialisation.

    Source: `ResidualAudioProjector` (tiny-audio): names, numerics, initialisation.
    """

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        c = self.config = config
        depth = range(c.projector_num_layers)
        self.input_proj = nn.Linear(c.projector_pool_stride * c.encoder_dim, c.llm_dim)
        self.ln_input = RMSNorm(c.llm_dim, c.rms_norm_eps)
        self.layers = nn.ModuleList(
            ResidualMLP(c.llm_dim, c.hidden_dim, c.projector_dropout) for _ in depth
        )
        self.layer_norms = nn.ModuleList(RMSNorm(c.llm_dim, c.rms_norm_eps) for _ in depth)
        self.output_dropout = nn.Dropout(c.projector_dropout)
        self.apply(self._init_linear)

    @classmethod
    def from_tensors(cls, config: ProjectorConfig, tensors: Checkpoint) -> "ResidualAudioProjector":
        """Makes a projector in f32, for inference.

        Args:
          config: of the checkpoint.
          tensors: by torch key, with or without the prefix "projector.".

        Raises:
          RuntimeError: if a key is missing or unexpected, or a shape differs.
        """
        with torch.device("meta"):  # no random weights, which would be overwritten at once
            module = cls(config)
        state = {
            key.removeprefix("projector."): torch.from_numpy(tensors.read(key).astype(np.float32))
            for key in tensors.infos
        }
        module.load_state_dict(state, strict=True, assign=True)
        return module.eval()

    def _init_linear(self, module: nn.Module) -> None:
        """Normal weights, zero biases; fc2 is near zero, so that a block starts as the identity."""
        std = self.config.projector_init_std
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
            nn.init.zeros_(module.bias)
        elif isinstance(module, ResidualMLP):  # `apply` visits children first
            nn.init.normal_(module.fc2.weight, std=0.1 * std)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Projects a batch.

        Args:
          frames: [B, S, E] encoder output, 50 frames per second; cast to the weights' dtype.

        Returns:
          [B, A, D]; A = ceil(S / k): the tail is padded with zero frames.
        """
        b, s, e = frames.shape
        k = self.config.projector_pool_stride
        x = F.pad(frames.to(self.input_proj.weight.dtype), (0, 0, 0, -s % k))
        x = self.ln_input(self.input_proj(x.reshape(b, -1, k * e)))  # [B, A, D]
        for layer, norm in zip(self.layers, self.layer_norms, strict=True):
            x = norm(layer(x))
        return self.output_dropout(x)
