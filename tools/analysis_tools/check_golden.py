"""Run the port on goldens of the original programs.

A golden is an .npz file with inputs, weights and outputs of the original
AdaMixer, LORS or RepAdapter: of sampling, of mixing, of a whole detector or
of an adapter and its merge, of any size.
Prints the largest relative error of each entry; the exit code is 1 when one
is above the tolerance and 2 when a file cannot be checked. Gradients of large
detectors may differ more by rounding: they are compared with float64, and with
the noise of several float32 runs, which is printed beside their errors.
"""

import argparse
import os
import sys
import warnings
from functools import partial

import lors_plugin  # noqa: F401, first: it makes mmcv.ops importable

warnings.filterwarnings('ignore')


def parse_args(argv=None):
    """Read the command line."""
    from lors_plugin.ops.backend import BACKENDS

    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('golden', nargs='+', metavar='FILE.npz')
    parser.add_argument(
        '--tolerance',
        type=float,
        default=1e-4,
        help='largest allowed relative error (default: %(default)s)',
    )
    parser.add_argument(
        '--backend',
        choices=BACKENDS,
        default='auto',
        help='implementation of the operators (default: %(default)s)',
    )
    parser.add_argument(
        '--worst',
        type=int,
        metavar='N',
        help='print only the N largest errors of each file',
    )
    return parser.parse_args(argv)


def report(golden, errors, tolerance, worst=None):
    """Print a table; return whether all errors are within the tolerance."""
    width = max(len(name) for name in errors)
    noise = golden.noise
    bad = {
        name
        for name, error in errors.items()
        if not error <= max(tolerance, noise.get(name, 0.0))
    }
    rows = list(errors.items())
    if worst is not None:
        rows = sorted(rows, key=lambda row: -row[1])[:worst]
    print(f'{golden.path} ({golden.kind}, {len(errors)} entries)')
    for name, error in rows:
        known = f'  (noise {noise[name]:.2e})' if name in noise else ''
        mark = '  <-- above the tolerance' if name in bad else ''
        print(f'  {name:<{width}}  {error:.2e}{known}{mark}')
    for note in golden.notes:
        print(f'  note: {note}')
    verdict = f'{len(bad)} above' if bad else 'all within'
    print(
        f'  largest error {max(errors.values()):.2e}: {verdict} '
        f'{tolerance:.0e}{" or their noise" if noise else ""}'
    )
    return not bad


def say(path, text):
    """Report progress, which is no part of the result."""
    sys.stderr.write(f'{path}: {text} ...\n')


def main(argv=None):
    """Check all files."""
    args = parse_args(argv)
    os.environ['LORS_PLUGIN_BACKEND'] = args.backend
    from lors_plugin.testing import Golden, check_golden

    status = 0
    for path in args.golden:
        try:
            golden = Golden(path)
            errors = check_golden(golden, partial(say, path))
        except (OSError, ValueError, KeyError) as error:
            sys.stderr.write(f'error: {path} cannot be checked: {error}\n')
            status = 2
            continue
        if not report(golden, errors, args.tolerance, args.worst):
            status = status or 1
    return status


if __name__ == '__main__':
    sys.exit(main())
