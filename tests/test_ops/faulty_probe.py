"""The real probe, with a fault that the variable FAULTY_KERNEL asks for.

'mixing' makes its kernels compute half a per cent too much, on this device
only: neither the reference nor the PyTorch operators notice. Without a GPU
two groups run, in Triton's interpreter and at tiny sizes.
"""

import os
import sys

import torch

from lors_plugin.ops.adaptive_mixing import triton as kernels
from lors_plugin.ops.self_check import probe

right = kernels.forward


def forward(*args):
    out, stats = right(*args)
    return out * 1.005, stats


if os.environ.get('FAULTY_KERNEL') == 'mixing':
    kernels.forward = forward
device, seconds, *groups = sys.argv[1:]
if not torch.cuda.is_available():
    device, tried = 'cpu', ('mixing float32', 'sampling float32')
    for group in set(groups).difference(tried):
        probe.tell(group, [])
    groups = [group for group in tried if group in groups]
probe.main([device, seconds, *groups])
