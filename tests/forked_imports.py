"""What the process imports that the tests' programs are forked from."""

import os

import torch

# else DeepSpeed looks for a CUDA compiler in every process, with a warning
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import accelerate.utils.deepspeed  # noqa: F401
import deepspeed  # noqa: F401

import pretrain.trainer  # noqa: F401
import teacher.trainer  # noqa: F401

torch.set_num_threads(1)
