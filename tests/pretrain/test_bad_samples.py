"""Unreadable samples are left out of every loss, counted over all ranks, named, and stop the run when too many."""

import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from shards.index import read_index, write_index
from shards.manifest import read_manifest, write_manifest
from shards.pack import pack
from shards.reader import ShardSet
from shards.sources.base import SourceConfig, make_source
from shards.writer import index_path
from tests.conftest import TinySample, write_labels
from tests.pretrain.runs import order, pretrain
from tests.pretrain.test_bad_input import refused

PER_SHARD = 12


@dataclass(frozen=True)
class Sets:
    """Images in six shards of twelve, and their labels; what damages them returns the rows that cannot be read."""

    images: Path
    labels: Path

    def tar(self, shard: int) -> Path:
        return self.images / read_manifest(self.images).files[shard]

    def truncated_tar(self, shard: int) -> Sequence[int]:
        index, tar = read_index(index_path(self.tar(shard))), self.tar(shard)
        os.truncate(tar, int(index.offset[7] + index.size[7] // 2))
        return range(7, PER_SHARD)

    def index_bit_flip(self, shard: int) -> Sequence[int]:
        path = index_path(self.tar(shard))
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
        return range(PER_SHARD)

    def lost_shard(self, shard: int) -> Sequence[int]:
        self.tar(shard).unlink()
        return range(PER_SHARD)

    def zeroed_image(self, shard: int) -> Sequence[int]:
        self._overwrite(shard, 0, lambda image: bytes(len(image)))
        return [0]

    def cut_jpeg(self, shard: int) -> Sequence[int]:
        """Cut before it was packed: its checksum is that of what is there."""
        image = ShardSet(self.images).read(shard, 2).image
        half = image[: len(image) // 2]
        self._change_index(self.images, shard, 2, size=len(half), crc=zlib.crc32(half))
        return [2]

    def empty_image(self, shard: int) -> Sequence[int]:
        self._change_index(self.images, shard, 4, size=0, crc=0)
        return [4]

    def huge_header(self, shard: int) -> Sequence[int]:
        def enlarge(image: bytes) -> bytes:
            frame = image.index(b"\xff\xc0")
            return image[: frame + 5] + struct.pack(">HH", 60_000, 60_000) + image[frame + 9 :]

        changed = self._overwrite(shard, 6, enlarge)
        self._change_index(self.images, shard, 6, crc=zlib.crc32(changed))
        return [6]

    def missing_label(self, shard: int) -> Sequence[int]:
        self._change_index(self.labels, shard, 8, size=-1)
        return [8]

    def _overwrite(self, shard: int, row: int, change: Callable[[bytes], bytes]) -> bytes:
        tar, index = self.tar(shard), read_index(index_path(self.tar(shard)))
        begin, end = int(index.offset[row]), int(index.offset[row] + index.size[row])
        content = tar.read_bytes()
        changed = change(content[begin:end])
        tar.write_bytes(content[:begin] + changed + content[end:])
        return changed

    def _change_index(self, root: Path, shard: int, row: int, **columns: int) -> None:
        """The index and the manifest agree on it: it is as if the set had been packed so."""
        manifest = read_manifest(root)
        path = index_path(root / manifest.files[shard])
        index = read_index(path)
        arrays = {name: getattr(index, name).copy() for name in columns}
        for name, value in columns.items():
            arrays[name][row] = value
        digest = write_index(path, replace(index, **arrays))
        hashes = manifest.hashes["index_sha256"].copy()
        hashes[shard] = list(bytes.fromhex(digest))
        write_manifest(root, replace(manifest, hashes=manifest.hashes | {"index_sha256": hashes}))


KINDS: dict[str, Callable[[Sets, int], Sequence[int]]] = {
    "truncated tar": Sets.truncated_tar,
    "bit flip in the index": Sets.index_bit_flip,
    "lost shard file": Sets.lost_shard,
    "image overwritten": Sets.zeroed_image,
    "cut JPEG": Sets.cut_jpeg,
    "zero-byte image": Sets.empty_image,
    "header of 60,000 x 60,000": Sets.huge_header,
    "missing label": Sets.missing_label,
}


@pytest.fixture(scope="module")
def sound(tiny_sample: TinySample, tmp_path_factory: pytest.TempPathFactory) -> Sets:
    root = tmp_path_factory.mktemp("sound")
    images = tiny_sample.root / "sample" / "images" / "train"
    pack(make_source(SourceConfig(kind="image_folder", path=str(images))), root / "images", shard_samples=12, workers=1)
    return Sets(root / "images", write_labels(root / "images", root / "labels"))


@pytest.fixture
def sets(sound: Sets, tmp_path: Path) -> Sets:
    """A copy to be damaged."""
    shutil.copytree(sound.images, tmp_path / "images")
    shutil.copytree(sound.labels, tmp_path / "labels")
    return Sets(tmp_path / "images", tmp_path / "labels")


def options(sets: Sets, **more: Any) -> dict[str, Any]:
    return {"data__shards": str(sets.images), "data__labels": str(sets.labels)} | more


def test_every_kind_of_damage_is_counted_exactly_over_the_ranks(
    student_config: Callable[..., Path], sets: Sets, tmp_path: Path
) -> None:
    """Two epochs on two ranks: each damaged sample is met twice, and named with the file that holds it."""
    shards = [0, 1, 2, 3, 3, 3, 3, 4]
    bad = {(n, row) for damage, n in zip(KINDS.values(), shards, strict=True) for row in damage(sets, n)}
    config = student_config(**options(sets, data__max_bad_fraction=1.0, max_steps=12, loop__record_order=True))
    output = pretrain(config, world_size=2)
    run = tmp_path / "runs" / "student"
    met = [(shard, row) for positions in order(run).values() for _, shard, row in positions]
    expected = sum(position in bad for position in met)
    assert expected == 2 * len(bad) == 2 * (5 + 12 + 12 + 4 + 1)
    assert json.loads((run / "summary.json").read_text())["metrics"]["data/num_bad"] == expected
    lines = [line for line in output.splitlines() if line.startswith("bad sample at step")]
    assert len(lines) == expected
    for shard in set(shards):
        count = sum(f": {sets.tar(shard)}: sample" in line for line in lines)
        assert count == 2 * sum(one == shard for one, _ in bad), shard
    for line in (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()):
        assert line["data/num_bad"] == sum(int(x.split()[4].rstrip(":")) <= line["step"] for x in lines)


@pytest.mark.parametrize("kind", KINDS)
def test_above_the_limit_the_run_stops_and_names_the_shard(
    student_config: Callable[..., Path], sets: Sets, tmp_path: Path, kind: str
) -> None:
    """With a limit of 0 the first is one too many; what was counted until then stands in the metrics."""
    file = sets.tar(1)
    KINDS[kind](sets, 1)
    config = student_config(**options(sets, data__max_bad_fraction=0.0, max_steps=6))
    refused("--config", config, words=["samples could not be read", str(file), "shards/verify.py"])
    last = json.loads((tmp_path / "runs" / "student" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["data/num_bad"] >= 1


def test_one_bad_sample_is_no_reason_to_stop(student_config: Callable[..., Path], sets: Sets, tmp_path: Path) -> None:
    """Though it is more than the default share of the few that were read; a second one is."""
    sets.cut_jpeg(1)
    config = student_config(**options(sets, max_steps=6))
    pretrain(config)
    assert '"data/num_bad": 1' in (tmp_path / "runs" / "student" / "summary.json").read_text()
    config = student_config(**options(sets, max_steps=12, run="longer"))
    refused("--config", config, words=["2 of ", "max_bad_fraction 0.001", str(sets.tar(1))])


def test_a_check_names_the_first_sample_that_reads(student_config: Callable[..., Path], sets: Sets) -> None:
    sets.zeroed_image(0)
    output = pretrain(student_config(**options(sets)), "--check")
    assert f"first key {ShardSet(sets.images).key(0, 1)!r} reads" in output
