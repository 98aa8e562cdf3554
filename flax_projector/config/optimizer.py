"""Settings of the optimizer."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from flax_projector.config.fields import Count, PositiveFloat, Rate, check


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay; the defaults are the recipe of tiny-audio."""

    learning_rate: PositiveFloat = 1e-4
    """Peak learning rate."""
    warmup_steps: Count = 500
    """Steps over which the learning rate rises from 0 to the peak."""
    final_lr_rate: Rate = 0.0
    """Learning rate at the last step, as a fraction of the peak."""
    b1: Rate = 0.9
    """Decay per step of the running mean of gradients."""
    b2: Rate = 0.999
    """Decay per step of the running mean of squared gradients."""
    eps: PositiveFloat = 1e-8
    """Added to the square root of that mean."""
    weight_decay: Annotated[float, Ge(0)] = 0.01
    """Applied to kernels: biases are not decayed, nor are norms by default."""
    decay_norms: bool = False
    """Also apply it to the weights of norms, as tiny-audio does. It pulls them to zero, away from
    their initialisation; for runs that continue one of its."""
    clip_norm: PositiveFloat = 1.0
    """Global gradient norm above which gradients are scaled down."""

    def __post_init__(self) -> None:
        check(self, prefix="optimizer.")
