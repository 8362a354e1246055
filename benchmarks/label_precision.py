"""What 8 bits cost a label: KLD between stored and float maps, and bytes a label, on a teacher's maps of real images.

    python benchmarks/label_precision.py --run runs/osie-teacher --shards data/first_run/osie/val

The teacher's densities are brought to 56x56, stored as label shards store them (square-root companding, PNG), read
back, and compared with the floats they were made from. "bytes_per_label" is the PNG alone, "tar_bytes_per_label" what
it takes in the shard, with its header and padded to whole blocks of 512 bytes.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
import torch
from common import environment, report

from attention.losses import kld
from attention.maps import decode_map_np
from shards.gaze import resize_density
from shards.labels import MAP, encode_label
from shards.map_png import decode_map_png
from shards.reader import ShardSet
from shards.tar import header_of, padded
from teacher.data import load_image
from teacher.saved import load_teacher


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a teacher's run")
    parser.add_argument("--shards", type=Path, required=True, help="image shards")
    parser.add_argument("--images", type=int, default=200, help="images, from the first on")
    options = parser.parse_args()
    teacher, shards = load_teacher(options.run), ShardSet(options.shards)
    rows = [(shard, row) for shard, count in enumerate(shards.shard_sizes.tolist()) for row in range(count)]
    divergences, label_bytes, tar_bytes, image_bytes = [], 0, 0, 0
    for shard, row in rows[: options.images]:
        data = shards.read(shard, row).image
        stored = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR).shape[:2]
        image = load_image(data, None, stored=stored, size=teacher.model.image_size)
        with torch.no_grad():
            density = teacher.model(torch.from_numpy(np.ascontiguousarray(image))[None]).exp()
        density = resize_density(density, (56, 56))
        density = density / density.sum()
        png = encode_label(density[0].numpy())
        kept = torch.from_numpy(decode_map_np(decode_map_png(png)))[None]
        divergences.append(kld(kept.clamp(min=1e-12).log(), density).item())
        label_bytes, image_bytes = label_bytes + len(png), image_bytes + len(data)
        tar_bytes += len(header_of(f"{shards.key(shard, row)}.{MAP}", len(png))) + padded(len(png))
    count = len(divergences)
    figures = {
        "kld_stored_vs_float": float(np.mean(divergences)),
        "kld_stored_vs_float_max": float(np.max(divergences)),
        "bytes_per_label": label_bytes / count,
        "tar_bytes_per_label": tar_bytes / count,
        "bytes_per_image": image_bytes / count,
        "label_bytes_over_image_bytes": label_bytes / image_bytes,
        "tar_bytes_over_image_bytes": tar_bytes / image_bytes,
    }
    report(
        "label_precision",
        figures=figures,
        environment=environment(images=count, teacher=teacher.hash[:16], shards=shards.manifest.name),
        title="What 8 bits cost a label",
        notes=__doc__ or "",
    )


if __name__ == "__main__":
    main()
