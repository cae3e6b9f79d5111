"""A probe that found what a test says, on a GPU that is not there.

    python fake_probe.py WHAT [arguments of the probe]

WHAT happens at 'mixing float16'; everything else is right and fast. Each
start adds a line to the file that FAKE_PROBE_STARTS names.
"""

import json
import os
import signal
import sys
import time

CULPRIT = 'mixing float16'


def main(what, options):
    device, output = options[1], options[3]
    given = options[0], options[2], options[4], options[6]
    assert given == ('--device', '--output', '--limit', '--attended')
    if starts := os.environ.get('FAKE_PROBE_STARTS'):
        with open(starts, 'a') as file:
            file.write(f'{device} {options[7:]}\n')
    if what == 'no start':
        sys.exit('RuntimeError: no CUDA-capable device is detected')
    if what == 'silent':
        return
    with open(output, 'a', buffering=1) as file:

        def tell(**event):
            file.write(json.dumps(event) + '\n')

        if what == 'nonsense':
            file.write('Segmentation fault\n')
        for group in options[7:]:
            tell(begin=group)
            mine = what if group == CULPRIT else 'good'
            if mine == 'abort':
                os.abort()
            elif mine == 'segv':
                os.kill(os.getpid(), signal.SIGSEGV)
            elif mine == 'raise':
                raise RuntimeError('an illegal memory access')
            elif mine == 'hang':
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                time.sleep(60)
            time.sleep(0.2 if what == 'takes its time' else 0)
            error = {'wrong': 0.5, 'nan': float('nan')}.get(mine, 1e-6)
            took = 3.0 if mine == 'slow' else 1.0
            ms = {} if mine == 'untimed' else dict(
                forward=(0.5, 1.0), full=(took, 2.0)
            )  # fmt: skip
            errors = {'output': (1e-7, 1e-5), 'gradient of x': (error, 1e-3)}
            tell(size='odd', errors=errors, ms={}, bandwidth=[])
            tell(size='lors', errors=errors, ms=ms, bandwidth=[800, 1500])
            tell(end=group)


if __name__ == '__main__':
    main(sys.argv[1], sys.argv[2:])
