"""A ``python`` for tests that start processes, with the hosts imported.

An import of PyTorch and the hosts takes longer than most of what such tests
run. A server imports them once and forks for each command. The executable
that :func:`start` makes takes the place of ``sys.executable``: it passes its
arguments, streams, directory, environment and signals on, and ends as the
forked process does. ``PARENT`` in the environment is the process that started
it, since ``os.getppid()`` is another one.

A process that has to import the hosts in a way of its own, such as one
without this package, is a test for ``sys.executable``.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from pathlib import Path

PRELOADED = (
    'lors_plugin.models', 'mmdet.apis', 'mmpretrain.apis',
    'torch.distributed.run',
)  # fmt: skip
CONFIGS = (
    'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
    'mmpretrain::lenet/lenet5_mnist.py',
)
FORWARDED = (
    signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1,
    signal.SIGUSR2,
)  # fmt: skip


def start(run, owner):
    """Start the server of a test run, unless another process of it did.

    Args:
        run (str): Names the run.
        owner (int): The process with which the server ends.

    Returns:
        str: The path of the executable.
    """
    if not hasattr(os, 'pidfd_open'):  # on Linux only
        return sys.executable
    import torch

    # The hosts ask for GPUs as they are imported, and what is forked from a
    # process that has asked cannot use them.
    if torch.cuda.is_available():
        return sys.executable
    # In a short path, as sockets need it.
    folder = Path(tempfile.gettempdir(), f'quick-python-{run}')
    with contextlib.suppress(FileExistsError):
        folder.mkdir(0o700)
        me = shlex.join([sys.executable, '-ISu', __file__, str(folder)])
        python = folder / 'python'
        python.write_text(
            '#!/bin/sh\n'
            "# Triton's interpreter is chosen before Triton is imported.\n"
            '[ -z "$TRITON_INTERPRET" ] || '
            f'exec {shlex.quote(sys.executable)} "$@"\n'
            f'exec {me} "$PPID" "$@"\n'
        )
        python.chmod(0o755)
        subprocess.Popen(
            [sys.executable, __file__, folder, '--serve', str(owner)],
            env=dict(os.environ, OMP_NUM_THREADS='1'),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
    for _ in range(3000):
        if (folder / 'socket').exists():
            return str(folder / 'python')
        time.sleep(0.1)
    raise RuntimeError('the server did not start')


def ask(folder, parent, *words):
    """Let the server run a command; end as it does."""
    environment = dict(os.environ, PARENT=parent)
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(f'{folder}/socket')
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
        for number in FORWARDED:
            signal.signal(number, lambda n, _: server.send(bytes([n])))
        request = json.dumps([words, os.getcwd(), environment]).encode()
        socket.send_fds(server, [len(request).to_bytes(4, 'big')], [0, 1, 2])
        server.sendall(request)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        status = int.from_bytes(server.recv(4), 'big')
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def serve(folder, owner):
    """Return what to run, in a process forked for each command.

    The server itself ends with its owner.
    """
    from mmengine import hub

    owner = os.pidfd_open(owner)
    for name in PRELOADED:
        importlib.import_module(name)
    for path in CONFIGS:  # which reads the metafiles of hosts
        hub.get_config(path)
    gc.collect()
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f'{folder}/new')
        listener.listen()
        os.rename(f'{folder}/new', f'{folder}/socket')
        while True:
            ready, _, _ = select.select([listener, owner], [], [])
            if owner in ready:
                shutil.rmtree(folder)
                os._exit(0)
            client, _ = listener.accept()
            if os.fork() == 0:
                break
            client.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
    size, streams, _, _ = socket.recv_fds(client, 4, 3)
    request = client.recv(int.from_bytes(size, 'big'), socket.MSG_WAITALL)
    pid = os.fork()
    if pid:
        for stream in streams:
            os.close(stream)
        attend(client, pid)
    client.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    return json.loads(request)


def attend(client, pid):
    """Forward signals to a process, and its end to the client."""
    process = os.pidfd_open(pid)
    while True:
        ready, _, _ = select.select([client, process], [], [])
        if process in ready:
            status = os.waitpid(pid, 0)[1]
            with contextlib.suppress(BrokenPipeError):
                client.send(status.to_bytes(4, 'big'))
            os._exit(0)
        for number in client.recv(9) or [signal.SIGKILL]:
            os.kill(pid, number)


def run(python, own_path, words, folder, environment):
    """Be ``python *words``."""
    import numpy

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    # No two processes draw the same.
    random.seed()
    numpy.random.seed()
    path = filter(None, environment.get('PYTHONPATH', '').split(os.pathsep))
    sys.path[:] = [*path, *own_path]
    sys.executable = python
    while words[0] in ('-u', '-W'):
        option, *words = words
        if option == '-u':
            sys.stdout.reconfigure(write_through=True)
        else:
            warnings.simplefilter(words.pop(0))
    option, *rest = words
    if option == '-c':
        sys.argv, sys.path = ['-c', *rest[1:]], ['', *sys.path]
        main = sys.modules['__main__'] = types.ModuleType('__main__')
        exec(compile(rest[0], '<string>', 'exec'), vars(main))
    elif option == '-m':
        sys.argv, sys.path = rest, [os.getcwd(), *sys.path]
        runpy.run_module(rest[0], run_name='__main__', alter_sys=True)
    else:
        assert not option.startswith('-'), f'unknown option {option}'
        sys.argv = words
        sys.path.insert(0, str(Path(option).resolve().parent))
        runpy.run_path(option, run_name='__main__')


def main():
    folder, action, *words = sys.argv[1:]
    if action != '--serve':
        ask(folder, action, *words)
    known = [Path(__file__).parent]
    known += os.environ.get('PYTHONPATH', '').split(os.pathsep)
    known = {str(path) for path in known}
    own_path = [path for path in sys.path if path not in known]
    request = serve(folder, int(words[0]))
    code = 1
    try:
        run(f'{folder}/python', own_path, *request)
        code = 0
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    # The interpreter takes seconds to take the hosts apart.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


if __name__ == '__main__':
    main()
