"""Check that no source file grows beyond what one reads at a sitting."""

import argparse
import sys
from pathlib import Path

LIMIT = 400


def too_long(path, limit=LIMIT):
    """Return the number of lines of ``path`` above ``limit``, or 0."""
    count = len(Path(path).read_text(encoding='utf-8').splitlines())
    return count if count > limit else 0


def main(argv=None):
    """Print the files that are too long and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('files', nargs='*')
    code = 0
    for path in parser.parse_args(argv).files:
        count = too_long(path)
        if count:
            print(f'{path}: {count} lines, more than {LIMIT}')
            code = 1
    return code


if __name__ == '__main__':
    sys.exit(main())
