"""Convert checkpoints of the original programs to this package, or back.

Class names and other meta data are kept, averaged (EMA) weights are taken
where there are any, optimizer state is dropped. Keys that are unknown or
missing are listed and nothing is written.
"""

import argparse
import sys

import lors_plugin  # noqa: F401, first: it makes mmcv.ops importable


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('src', help='the checkpoint to read')
    parser.add_argument('dst', help='where to write the converted one')
    parser.add_argument(
        '--source',
        choices=['auto', 'adamixer', 'lors'],
        default='auto',
        help='the original program (default: told from the keys)',
    )
    parser.add_argument(
        '--reverse',
        action='store_true',
        help='from this package to the layout of the original program',
    )
    parser.add_argument(
        '--no-ema',
        action='store_true',
        help='take the plain weights even if there are averaged ones',
    )
    parser.add_argument(
        '--trust',
        action='store_true',
        help='allow SRC to run code of its own while it is read; only for '
        'files from people you trust',
    )
    return parser.parse_args(argv)


def convert(args):
    """Do what the arguments say; return a sentence about it."""
    from lors_plugin.checkpoints import (
        guess_source,
        load_checkpoint_file,
        save_checkpoint_file,
        to_lors_plugin,
        to_original,
        weights_of,
    )

    content = load_checkpoint_file(args.src, args.trust)
    state = weights_of(content, ema=not args.no_ema)
    source = args.source
    if source == 'auto':
        source = guess_source(state)
    converter = to_original if args.reverse else to_lors_plugin
    converted = converter(state, source)
    meta = dict(content.get('meta') or {})
    save_checkpoint_file(dict(meta=meta, state_dict=converted), args.dst)
    direction = 'to' if args.reverse else 'from'
    return (
        f'{len(converted)} weights converted {direction} {source}: {args.dst}'
    )


def main(argv=None):
    """Convert one file."""
    args = parse_args(argv)
    from lors_plugin.checkpoints import ConversionError

    try:
        print(convert(args))
    except (ConversionError, OSError) as error:
        sys.stderr.write(f'error: {error}\nnothing was written\n')
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
