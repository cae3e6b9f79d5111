"""The former name of ``tools/export.py``; the command line is the same."""

import sys

from export import main

if __name__ == '__main__':
    sys.exit(main())
