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


def tell(group, sizes):
    print(json.dumps({group: sizes}), flush=True)


def main(what, device, seconds, *groups):
    if starts := os.environ.get('FAKE_PROBE_STARTS'):
        with open(starts, 'a') as file:
            file.write(f'{device} {groups}\n')
    if what == 'no start':
        sys.exit('RuntimeError: no CUDA-capable device is detected')
    if what == 'silent':
        return
    for group in groups:
        tell(group, None)
        signal.alarm(int(seconds))
        mine = what if group == CULPRIT else 'good'
        if mine == 'abort':
            os.abort()
        elif mine == 'segv':
            os.kill(os.getpid(), signal.SIGSEGV)
        elif mine == 'raise':
            raise RuntimeError('an illegal memory access')
        elif mine == 'quit':
            sys.exit()
        elif mine == 'hang':
            time.sleep(60)
        elif mine == 'hang for good':
            signal.alarm(0)
            time.sleep(60)
        elif mine == 'print':
            print('12\nno {json}')
        time.sleep(0.2 if what == 'takes its time' else 0)
        error = {'wrong': 0.5, 'nan': float('nan')}.get(mine, 1e-6)
        took = 3.0 if mine == 'slow' else 1.0
        ms = dict(forward=(0.5, 1.0), full=(took, 2.0))
        errors = {'output': (1e-7, 1e-5), 'gradient of x': (error, 1e-3)}
        odd = dict(size='odd', errors=errors, ms={})
        lors = dict(size='lors', errors=errors, ms=ms, bandwidth=[800, 1500])
        tell(group, [odd] if mine == 'untimed' else [odd, lors])


if __name__ == '__main__':
    main(*sys.argv[1:])
