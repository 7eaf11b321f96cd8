"""AV-DiT: a short video and its sound from one frozen image diffusion transformer (arXiv 2406.07686)."""

__version__ = "0.1.0"
