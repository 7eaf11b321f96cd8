"""The repeated blocks of models in training: compiled, or computed again in the backward pass."""

from diffusers import ModelMixin
from torch import nn


def compile_blocks(module: nn.Module) -> None:
    """Compile the repeated blocks of every model in ``module`` that has some; where none has, the whole of it.

    A graph of one block compiles in a fraction of the time of a graph of all, and runs as fast.
    """
    able = [part for part in module.modules() if hasattr(part, "compile_blocks")]
    if not able:
        module.compile()
    for part in able[:1]:  # of a model within a model the outer one's
        part.compile_blocks()


def checkpoint_blocks(module: nn.Module) -> None:
    """Let every diffusers model in ``module`` that can do so keep no activations of its blocks.

    Raises:
        ValueError: where none can.
    """
    models = [part for part in module.modules() if isinstance(part, ModelMixin)]
    able = [part for part in models if part._supports_gradient_checkpointing]
    if not able:
        raise ValueError(f"gradient_checkpointing: {type(module).__name__} cannot compute its blocks again")
    for part in able:
        part.enable_gradient_checkpointing()
