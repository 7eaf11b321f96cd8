"""Folders of mp4 files become latents: lists, shares of several processes, resumption, hashes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from avdit.data.folders import FolderSettings, LatentCache, found_classes, split_files
from avdit.data.latents import Shards
from avdit.geometry import ClipGeometry
from avdit.media import write_clip
from avdit.models.audio_codec import AudioCodec
from avdit.models.video_codec import VideoCodec

GEOMETRY = ClipGeometry(height=64, width=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two films of fire, two of rain, one broken file; each film's grey tells which it is."""
    root = tmp_path_factory.mktemp("films")
    for i, name in enumerate(("fire/a.mp4", "fire/b.mp4", "rain/a.mp4", "rain/c.mp4")):
        (root / name).parent.mkdir(exist_ok=True)
        frames = np.full((16 if i else 33, 64, 64, 3), 0.2 * (i + 1), np.float32)
        sound = np.zeros(GEOMETRY.samples_of(len(frames)), np.float32)
        write_clip(root / name, frames, sound, fps=10, sampling_rate=16000)
    (root / "rain" / "b.mp4").write_text("not a film")
    return root


@pytest.fixture(scope="module")
def codecs():
    torch.manual_seed(0)
    return VideoCodec().eval(), AudioCodec().eval()


def cache(out: Path, folder: Path, codecs, classes=("fire", "rain"), each: int = 1) -> LatentCache:
    files, _ = split_files(FolderSettings(folder))
    return LatentCache(out, folder, files, classes, GEOMETRY, codecs, each)


def names(paths: list[Path], folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in paths]


def test_lists_split_the_files(folder, tmp_path, caplog):
    def split(**lists):
        paths = {}
        for name, lines in lists.items():
            paths[name] = tmp_path / f"{name}.txt"
            paths[name].write_text("\n".join(lines))
        train, test = split_files(FolderSettings(folder, **paths))
        return names(train, folder), names(test, folder)

    everything = ["fire/a.mp4", "fire/b.mp4", "rain/a.mp4", "rain/b.mp4", "rain/c.mp4"]
    assert split() == (everything, [])
    assert split(test=["rain/c.mp4", "b"]) == (["fire/a.mp4", "rain/a.mp4"], ["fire/b.mp4", "rain/b.mp4", "rain/c.mp4"])
    assert split(train=["fire/a", ""]) == (["fire/a.mp4"], [])
    with pytest.raises(ValueError, match="is in both lists"):
        split(train=["a"], test=["rain/a.mp4"])
    with pytest.raises(ValueError, match="names none of the 5 files.*'nothing'"):
        split(train=["nothing.mp4"])
    split(train=["fire/a.mp4", "lost.mp4"])
    assert "1 of 2 names are in no file, as lost" in caplog.text
    settings = FolderSettings(folder)
    assert found_classes(settings, split_files(settings)[0]) == ["fire", "rain"]
    with pytest.raises(ValueError, match="no file .* is of class 'snow': found fire, rain"):
        found_classes(FolderSettings(folder, classes=("snow",)), split_files(settings)[0])


def test_lists_of_the_dance_data_set(tmp_path):
    for camera in ("c01", "c02"):
        (tmp_path / f"gBR_sBM_{camera}_d04_mBR0_ch01.mp4").touch()
        (tmp_path / f"gBR_sBM_{camera}_d04_mBR0_ch02.mp4").touch()
    (tmp_path / "test.txt").write_text("gBR_sBM_cAll_d04_mBR0_ch02\n")
    train, test = split_files(FolderSettings(tmp_path, test=tmp_path / "test.txt"))
    assert names(train, tmp_path) == [f"gBR_sBM_{camera}_d04_mBR0_ch01.mp4" for camera in ("c01", "c02")]
    assert names(test, tmp_path) == [f"gBR_sBM_{camera}_d04_mBR0_ch02.mp4" for camera in ("c01", "c02")]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("films", "must be an object with a folder"),
        ({"folder": "x", "wrokers": 2}, "unknown data setting 'wrokers'"),
        ({"folder": "x", "workers": 0}, "workers 0 must be a whole number of 1 or more"),
    ],
)
def test_wrong_settings_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        FolderSettings.of(values)


def test_shares_of_two_processes_make_one_cache(folder, codecs, tmp_path, caplog):
    alone = cache(tmp_path / "alone", folder, codecs)
    alone.build(workers=2)
    assert alone.finish() == 5  # the first film holds two clips, the broken file none
    assert "1 of 5 files gave no clip (b.mp4: " in caplog.text
    for rank in range(2):
        cache(tmp_path / "shared", folder, codecs).build(slice(rank, None, 2))
    items = torch.arange(5)
    one, two = Shards(tmp_path / "alone"), Shards(tmp_path / "shared")
    assert len(one) == len(two) == 5
    for key in ("video", "audio", "label"):
        assert torch.equal(one.get(key, items), two.get(key, items))
    assert one.get("label", items).tolist() == [0, 0, 0, 1, 1]
    # The latents are those of the films, in order.
    with torch.no_grad():
        pixels = torch.full((1, 16, 3, 64, 64), 0.8 * 2 - 1)
        torch.testing.assert_close(one.get("video", items[4:]).float(), codecs[0].encode(pixels), atol=0.05, rtol=0.05)


def test_interrupted_work_goes_on_and_damage_is_found(folder, codecs, tmp_path):
    first = cache(tmp_path, folder, codecs)
    first.build(slice(0, 3))
    kept = first.shard(0).stat().st_mtime_ns
    (tmp_path / "clips-00000003.safetensors").write_bytes(b"half of a shard whose note was never written")
    again = cache(tmp_path, folder, codecs)
    again.build()
    assert again.shard(0).stat().st_mtime_ns == kept and again.finish() == 5

    content = bytearray(again.shard(2).read_bytes())
    content[-1] ^= 1
    again.shard(2).write_bytes(content)
    with pytest.raises(ValueError, match="clips-00000002.safetensors is damaged"):
        cache(tmp_path, folder, codecs).build()
    again.shard(2).unlink()
    again.shard(2).with_suffix(".json").unlink()
    cache(tmp_path, folder, codecs).build()
    assert cache(tmp_path, folder, codecs).finish() == 5


def test_cache_of_something_else_is_refused(folder, codecs, tmp_path):
    cache(tmp_path / "cache", folder, codecs).build(slice(0, 1))
    other = VideoCodec().eval()
    for changed in (
        cache(tmp_path / "cache", folder, codecs, classes=("rain", "fire")),
        cache(tmp_path / "cache", folder, (other, codecs[1])),
        cache(tmp_path / "cache", folder, codecs, each=2),
    ):
        with pytest.raises(ValueError, match="from other files, classes or codecs: give another cache folder"):
            changed.build()


def test_what_is_on_the_test_list_by_now_is_not_trained_on(folder, codecs, tmp_path):
    cache(tmp_path / "cache", folder, codecs).build()
    (tmp_path / "test.txt").write_text("rain/c\n")
    train, _ = split_files(FolderSettings(folder, test=tmp_path / "test.txt"))
    fewer = LatentCache(tmp_path / "cache", folder, train, ("fire", "rain"), GEOMETRY, codecs, 1)
    with pytest.raises(ValueError, match="clips-00000004.safetensors was made from other files"):
        fewer.build()


def test_folder_without_a_clip_is_named(folder, codecs, tmp_path):
    films = tmp_path / "films"
    (films / "rain").mkdir(parents=True)
    shutil.copy(folder / "rain" / "b.mp4", films / "rain")
    empty = cache(tmp_path / "cache", films, codecs)
    empty.build()
    assert json.loads((tmp_path / "cache" / "clips-00000000.json").read_text())["clips"] == 0
    with pytest.raises(ValueError, match="no file in .* gave a clip: rain/b.mp4: "):
        empty.finish()
