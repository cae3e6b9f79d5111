"""Trainings in processes of their own, with the hosts imported once."""

import multiprocessing
import os
import socket
import sys

import pytest

ONE_THREAD = dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')


def start_server():
    """Start the process that imports the hosts and is forked later.

    Returns:
        BaseContext: What makes processes out of it.
    """
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['lors_plugin.models'])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ONE_THREAD.items():
            patch.setenv(name, value)
        multiprocessing.forkserver.ensure_running()
    return context


def train(words, log, variables):
    """Run ``tools/train.py`` in this process, which ends with its code."""
    os.environ.update(variables)
    with open(log, 'a') as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    import train

    sys.exit(train.main(words))


def train_in_processes(context, number, log, *words):
    """Train in processes that talk to each other if there are several.

    Args:
        context (BaseContext): Of :func:`start_server`.
        number (int): Of processes.
        log (Path): Gets what they print.
        words: Arguments of ``tools/train.py``.

    Returns:
        str: What they printed.
    """
    words, variables = [*map(str, words)], [{}]
    if number > 1:
        words += ['--launcher', 'pytorch']
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = str(free.getsockname()[1])
        variables = [
            dict(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(number),
                MASTER_ADDR='127.0.0.1',
                MASTER_PORT=port,
            )
            for rank in range(number)
        ]
    ranks = [
        context.Process(target=train, args=(words, log, each))
        for each in variables
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    output = log.read_text()
    assert not any(rank.exitcode for rank in ranks), output[-6000:]
    return output
