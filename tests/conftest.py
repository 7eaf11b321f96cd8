import sys
from pathlib import Path

import pytest
import torch

from avdit.data.scenes import CLASSES
from avdit.generate import DEFAULT_CHECKPOINT, load_pipeline
from avdit.geometry import ClipGeometry
from avdit.models.audio_codec import AudioCodec
from avdit.models.avdit import AVDiT
from avdit.models.dit import DiT
from avdit.models.schedule import xs_scheduler
from avdit.models.video_codec import VideoCodec
from avdit.pipeline import AVDiTPipeline

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def random_transformer() -> AVDiT:
    """A small joint model with open gates: nothing in it is zero."""
    torch.manual_seed(0)
    shape = {"input_size": 16, "in_channels": 16, "num_classes": len(CLASSES), "learn_sigma": False}
    backbone = DiT(hidden_size=32, depth=2, num_heads=2, **shape)
    model = AVDiT.from_backbone(backbone, ClipGeometry(), temporal_width=32, lora_rank=4, interaction_rank=4)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A pipeline folder with random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    pipe = AVDiTPipeline(random_transformer(), VideoCodec(), AudioCodec(), xs_scheduler(), classes=list(CLASSES))
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_checkpoint) -> AVDiTPipeline:
    pipe = AVDiTPipeline.from_pretrained(tiny_checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def shipped_checkpoint() -> Path:
    return DEFAULT_CHECKPOINT


@pytest.fixture(scope="session")
def shipped_pipeline(shipped_checkpoint) -> AVDiTPipeline:
    return load_pipeline(shipped_checkpoint)
