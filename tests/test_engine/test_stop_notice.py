"""A notice to stop, in the process that listens and in its children."""

import os
import signal
import time

import pytest

from lors_plugin.engine.stop_notice import StopNotice


@pytest.fixture
def notice():
    listening = StopNotice()
    listening.listen()
    yield listening
    listening.restore()


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGUSR1'])
def test_this_process_remembers(notice, name):
    os.kill(os.getpid(), getattr(signal, name))
    assert notice.received == name
    assert notice.agreed()


def test_a_forked_child_ends_by_sigterm_alone(notice):
    """As ``Pool.terminate`` asks of it, which waits until it has."""
    child = os.fork()
    if not child:
        time.sleep(20)
        os._exit(3)
    time.sleep(0.2)
    os.kill(child, signal.SIGUSR1)
    time.sleep(0.2)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM
    assert notice.received is None
