"""What else is there: a GPU that is lent by the call, and what MCP tools need."""

import importlib.util
import os
from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable)


def zero_gpu() -> bool:
    """Whether this is a Space on ZeroGPU, which lends a GPU for the length of a call.

    There the package ``spaces`` is imported, which must come before anything is put on the GPU.
    """
    if importlib.util.find_spec("spaces") is None or os.environ.get("SPACES_ZERO_GPU", "") not in ("1", "true"):
        return False
    import spaces  # noqa: F401

    return True


def mcp_installed() -> bool:
    """Whether the endpoints can be offered as MCP tools: ``pip install "gradio[mcp]"`` brings what that needs."""
    if importlib.util.find_spec("mcp") is None:
        return False
    try:
        import gradio.mcp  # noqa: F401
    except ImportError:  # a release of it that this gradio does not know
        return False
    return True


def on_gpu(function: Function, seconds: int = 120) -> Function:
    """``function``, during whose calls ZeroGPU lends a GPU for at most ``seconds``."""
    import spaces

    return spaces.GPU(function, duration=seconds)
