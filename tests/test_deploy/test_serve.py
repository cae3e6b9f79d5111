"""tools/serve.py as a process: under load, fed with rubbish, and stopped."""

import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from lors_plugin.deploy.runtime import Detector

for name in ('fastapi', 'uvicorn', 'prometheus_client', 'onnxruntime'):
    pytest.importorskip(name)

WITHOUT_PYTORCH = """
import runpy, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch', 'mmengine', 'mmcv', 'mmdet'):
            raise ImportError(f'{name} is not installed')

sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


class Service:
    """A service in another process, and requests to it."""

    def __init__(self, root, model, *options):
        tool = str(root / 'tools' / 'serve.py')
        command = [sys.executable, '-c', WITHOUT_PYTORCH, tool, model]
        self.process = subprocess.Popen(
            [*command, '--port', '0', '--threads', '1', *options],
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log = []
        for line in self.process.stderr:
            self.log.append(line)
            found = re.search(r'running on http://127.0.0.1:(\d+)', line)
            if found:
                self.port = int(found[1])
                break
        else:
            raise RuntimeError(''.join(self.log))
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self):
        self.log.extend(self.process.stderr)

    def ask(self, path, body=None, **headers):
        """Return the status and the answer."""
        request = urllib.request.Request(
            f'http://127.0.0.1:{self.port}{path}', body, headers
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def half_sent(self, content):
        """Send the head of a request and half of its body."""
        connection = socket.create_connection(('127.0.0.1', self.port), 30)
        head = f'Content-Length: {len(content)}\r\nConnection: close\r\n\r\n'
        connection.sendall(
            f'POST /predict HTTP/1.1\r\nHost: a\r\n{head}'.encode()
            + content[: len(content) // 2]
        )
        return connection

    def megabytes(self):
        """Memory of the process."""
        status = Path(f'/proc/{self.process.pid}/status').read_text()
        return int(re.search(r'VmRSS:\s+(\d+)', status)[1]) / 1024


@pytest.fixture(scope='module')
def start(root, file_of):
    """Start a service of the tiny detector."""
    services = []

    def make(*options):
        services.append(Service(root, file_of(), *options))
        return services[-1]

    yield make
    for service in services:
        service.process.kill()
        service.process.wait()


@pytest.fixture(scope='module')
def service(start):
    options = ['--max-bytes', '300000', '--max-pixels', '100000']
    return start('--score-threshold', '0', *options)


def read_answer(connection):
    answer = b''.join(iter(lambda: connection.recv(9999), b''))
    connection.close()
    return int(answer.split()[1]), answer.partition(b'\r\n\r\n')[2]


def test_under_load(service, file_of, photos):
    """Every answer is that of the image alone, and memory stays flat."""
    wanted = Detector(file_of())(photos)
    contents = [Path(path).read_bytes() for path in photos]

    def ask(number):
        index = number % len(contents)
        status, text = service.ask('/predict', contents[index])
        assert status == 200, text
        found = json.loads(text)['predictions']
        right = wanted[index]
        boxes = [each['box'] for each in found]
        np.testing.assert_allclose(boxes, right['boxes'], atol=5e-3)
        scores = [each['score'] for each in found]
        np.testing.assert_allclose(scores, right['scores'], atol=2e-5)
        names = [each['class'] for each in found]
        assert names == ['abc'[label] for label in right['labels']]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(60)))
        before = service.megabytes()
        list(pool.map(ask, range(140)))
        assert service.megabytes() < before + 8
    text = service.ask('/metrics')[1]
    assert 'lors_requests_total{status="200"} 200.0' in text
    assert 'lors_requests_in_flight 0.0' in text
    batches = float(re.search(r'lors_batch_images_count (\S+)', text)[1])
    images = float(re.search(r'lors_batch_images_sum (\S+)', text)[1])
    assert images == 200 and batches < 200


def bytes_of(*shape):
    file = io.BytesIO()
    PIL.Image.fromarray(np.zeros(shape, np.uint8)).save(file, 'PNG')
    return file.getvalue()


def wait_for(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    'body, status, word',
    [
        (b'', 422, 'not an image'),
        (b'rubbish' * 99, 422, 'not an image'),
        # Pillow has an error of another type for it.
        (b'\x89PNG\r\n\x1a\n\0\0\0\x02IHDRxx' + bytes(9), 422, 'bytes: '),
        (bytes_of(9, 9, 3)[:60], 422, ''),
        (bytes_of(400, 400), 413, '400 x 400 is more than 100000 pixels'),
        (bytes(400_000), 413, 'more than 300000 bytes'),
        (iter([bytes(200_000)] * 2), 413, 'more than 300000 bytes'),
    ],
    ids=['empty', 'text', 'header', 'cut', 'pixels', 'bytes', 'stream'],
)
def test_rubbish(service, body, status, word):
    found, text = service.ask('/predict', body)
    assert (found, word in text) == (status, True), text
    assert 'Traceback' not in ''.join(service.log)
    assert service.ask('/health')[0] == 200


def test_what_is_served(service):
    said = json.loads(service.ask('/model')[1])
    assert (said['task'], said['engine']) == ('detector', 'ONNX Runtime')
    assert said['classes'] == ['a', 'b', 'c']
    assert said['metadata']['checkpoint'] == 'tiny.pth'
    assert service.ask('/predict')[0] == 405
    assert service.ask('/other')[0] == 404


def test_full_then_free_again_then_stopped(start, photos):
    content = Path(photos[0]).read_bytes()
    service = start('--queue', '2', '--timeout', '4')
    slow = [service.half_sent(content) for _ in range(2)]
    wait_for(lambda: 'in_flight 2.0' in service.ask('/metrics')[1], 3)
    status, text = service.ask('/predict', content)
    assert status == 429 and '2 requests are waiting' in text
    for connection in slow:
        status, text = read_answer(connection)
        assert status == 504 and b'no answer within 4 s' in text
    # What was taken is answered after a signal.
    connection = service.half_sent(content)
    wait_for(lambda: 'in_flight 1.0' in service.ask('/metrics')[1], 3)
    service.process.send_signal(signal.SIGTERM)
    wait_for(lambda: 'Shutting down' in ''.join(service.log), 3)
    with pytest.raises(OSError):
        service.ask('/health')
    connection.sendall(content[len(content) // 2 :])
    status, text = read_answer(connection)
    assert status == 200 and b'predictions' in text
    assert service.process.wait(30) == 0


@pytest.mark.parametrize(
    'options, word',
    [
        (['none.onnx'], 'there is no file none.onnx'),
        (['none.onnx', '--queue', '0'], '--queue has to be positive'),
        ([__file__], 'cannot be opened'),
    ],
)
def test_mistakes(options, word, capsys):
    import serve

    try:
        status = serve.main(options)
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert word in capsys.readouterr().err
