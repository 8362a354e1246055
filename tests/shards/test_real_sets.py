"""True counts of real data sets, packed and verified. Needs SACCADE_DATA."""

from pathlib import Path

import numpy as np
import pytest

from shards.pack import pack
from shards.reader import ShardSet
from shards.sources.image_folder import ImageFolder
from shards.sources.osie import Osie
from shards.verify import VerifyConfig, main


def test_imagenette_has_13394_images(real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        pack(ImageFolder(real_data / "imagenette128" / split), tmp_path / split, workers=2)
    main(VerifyConfig(path=str(tmp_path), workers=2))
    assert "images: 13394 samples in 2 sets" in capsys.readouterr().out


def test_osie_has_700_images_and_98321_fixations(
    real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(Osie(real_data / "osie"), tmp_path / "osie", workers=2, shard_mb=10)
    main(VerifyConfig(path=str(tmp_path / "osie"), workers=2))
    assert "images: 700 samples in 1 sets" in capsys.readouterr().out
    shards = ShardSet(tmp_path / "osie")
    points, sizes = [], set()
    for shard, size in enumerate(shards.shard_sizes):
        for row in range(size):
            info = shards.read_info(shard, row)
            assert len(info["fixations"]) == 15
            sizes.add((info["width"], info["height"]))
            points += [point for observer in info["fixations"] for point in observer]
    assert sizes == {(800, 600)} and len(points) == 98_321
    found = np.array(points)
    assert (found >= 0).all() and (found < (800, 600)).all()


def test_osie_mouse_samples_lie_in_the_image(real_data: Path) -> None:
    source = Osie(real_data / "osie", split="val", tracking="mouse")
    assert len(source.items()) == 200
    for item in source.items()[::40]:
        points = np.array([point for observer in source.fixations(item) or [] for point in observer])
        assert len(points) > 100 and (points >= 0).all() and (points < (800, 600)).all()
