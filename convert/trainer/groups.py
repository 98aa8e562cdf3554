"""The projector's parameters as an optimizer of PyTorch numbers them."""

from collections.abc import Mapping

from convert.extras import import_torch
from flax_projector.config import ProjectorConfig

Shape = tuple[int, ...]


def registered(config: ProjectorConfig) -> dict[str, Shape]:
    """The shape of every parameter by its name, in the order in which PyTorch registers them."""
    torch = import_torch("the order of a projector's parameters")
    from convert.torch_projector import ResidualAudioProjector

    with torch.device("meta"):  # shapes alone
        module = ResidualAudioProjector(config)
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def grouped(shapes: Mapping[str, Shape], *, decay_norms: bool) -> tuple[list[str], list[str]]:
    """The parameters that are decayed, and the others; an optimizer numbers them in this order.

    The HF Trainer decays all but biases and what it takes for a norm. It takes nothing of the
    projector for one: not by their class, nor by their names, `ln_input` and `layer_norms.0`.

    Args:
      shapes: from `registered`.
      decay_norms: whether the weights of norms are decayed, as by the HF Trainer.
    """
    decayed = [
        name
        for name, shape in shapes.items()
        if name.endswith(".weight") and (decay_norms or len(shape) > 1)
    ]
    return decayed, [name for name in shapes if name not in decayed]
