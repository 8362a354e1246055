"""100,000 shards of 10,000 samples: opened in a fresh process, measured there."""

import json
import subprocess
import sys
from pathlib import Path

MEASURE = """
import json, pickle, resource, sys, time
import numpy as np
from shards.order import SampleOrder, StepBatches
from shards.reader import ShardSet
import torch.utils.data
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
shards = ShardSet(sys.argv[1])
opened = time.perf_counter() - started
started = time.perf_counter()
order = SampleOrder(shards.shard_sizes, seed=0)
sampler = StepBatches(order, batch_size=4096, rank=3, world_size=64, start_step=987_654, stop_step=987_655)
batch = next(iter(sampler))
sought = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"open_s": opened, "seek_s": sought, "extra_mb": (peak - before) / 1024, "batch": batch,
                  "samples": shards.num_samples, "pickle_mb": len(pickle.dumps(shards)) / 1e6}))
"""

NUM_SHARDS, PER_SHARD = 100_000, 10_000


def test_a_billion_samples_open_and_seek_quickly(tmp_path: Path) -> None:
    digits = [f"{number:064x}" for number in range(NUM_SHARDS)]
    shards = [
        {"file": f"shard-{number:06d}.tar", "num_samples": PER_SHARD, "num_bytes": 10**9, "sha256": digits[number],
         "keys_digest": digits[number], "index_sha256": digits[number]}
        for number in range(NUM_SHARDS)
    ]  # fmt: skip
    total = {"num_samples": NUM_SHARDS * PER_SHARD, "num_bytes": NUM_SHARDS * 10**9}
    head = {"schema": 1, "kind": "images", "name": "large", "classes": []}
    (tmp_path / "manifest.json").write_text(json.dumps(head | total | {"shards": shards}))
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["samples"] == 10**9
    assert found["open_s"] < 5 and found["extra_mb"] < 300 and found["seek_s"] < 1, found
    assert len(found["batch"]) == 64 and {epoch for epoch, _, _ in found["batch"]} == {987_654 * 4096 // 10**9}
    assert found["pickle_mb"] < 20
