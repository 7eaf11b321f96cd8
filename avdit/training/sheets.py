"""Contact sheets of what a model makes while it trains."""

from pathlib import Path

from PIL import Image
from torch import Tensor


def image_grid(images: Tensor, columns: int) -> Tensor:
    """Lay images (N, 3, H, W) out in rows of ``columns``: (3, rows x H, columns x W). N must fill the rows."""
    n, channels, height, width = images.shape
    grid = images.unflatten(0, (n // columns, columns)).permute(2, 0, 3, 1, 4)
    return grid.reshape(channels, n // columns * height, columns * width)


def save_png(image: Tensor, path: Path) -> None:
    """Write an image (3, H, W) in [0, 1]."""
    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path)
