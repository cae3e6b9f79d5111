"""The real probe, at tiny sizes under Triton's interpreter, with a fault.

The kernels of mixing compute something else: half a per cent too much. The
time of the interpreter goes to two groups, the others are passed over.
"""

import sys

from lors_plugin.ops.adaptive_mixing import triton as kernels
from lors_plugin.ops.self_check import probe

right = kernels.forward


def forward(*args):
    out, stats = right(*args)
    return out * 1.005, stats


kernels.forward = forward
options, groups = sys.argv[1:8], sys.argv[8:]
options[1] = 'cpu'
tried = [g for g in groups if g in ('mixing float32', 'sampling float32')]
if tried:
    probe.main([*options, '--quick', *tried])
with open(options[3], 'a') as file:
    for group in groups:
        if group not in tried:
            for event in ('begin', 'end'):
                file.write(f'{{"{event}": "{group}"}}\n')
