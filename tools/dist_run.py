"""torchrun that passes on the notice to stop and the exit code.

    python tools/dist_run.py [arguments of torchrun]

torchrun itself sends SIGTERM on to its processes, dies of SIGUSR1 without
them, and ends with 1 whatever their exit codes were.
"""

import os
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

EXIT_REQUEUE = 75  # as in lors_plugin.engine.hooks.checkpoint_hook
EXIT_USER_ERROR, EXIT_INTERRUPTED = 2, 130  # as in tool_utils.py: told there


def run():
    """Run torchrun and return the exit code."""
    signal.signal(
        signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM)
    )
    try:
        main()
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        for code in (EXIT_REQUEUE, EXIT_USER_ERROR, EXIT_INTERRUPTED):
            if code in codes:
                return code
        raise
    except SignalException as error:
        codes = {
            signal.SIGTERM: EXIT_REQUEUE,
            signal.SIGINT: EXIT_INTERRUPTED,
        }
        if error.sigval not in codes:
            raise
        return codes[error.sigval]
    return 0


if __name__ == '__main__':
    sys.exit(run())
