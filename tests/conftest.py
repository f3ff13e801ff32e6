"""Triton kernels run under the interpreter where there is no GPU; it is chosen when triton is first imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
