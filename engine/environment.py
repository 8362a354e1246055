"""What a number was measured on: versions, commit, machine."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "torchvision", "timm", "accelerate", "deepspeed", "webdataset", "lightly", "wandb", "numpy")


def environment() -> dict[str, Any]:
    """Versions, commit and machine, for `summary.json` and reports. Holds no path, user or host name."""
    return {
        "commit": git_commit(),
        "python": platform.python_version(),
        **{name: package_version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "num_devices": torch.cuda.device_count() or 1,
        "num_cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


def package_version(name: str) -> str:
    """Installed version of a distribution, or "absent"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def git_commit() -> str:
    """Commit of the source tree, with `+` behind it when the tree differs from it; "unknown" outside git."""
    root = Path(__file__).resolve().parent.parent
    try:
        commit = _git("rev-parse", "--short=12", "HEAD", cwd=root)
        return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no", cwd=root) else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def cpu_name() -> str:
    """Processor model as the kernel names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(*arguments: str, cwd: Path) -> str:
    done = subprocess.run(("git", *arguments), cwd=cwd, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
