"""Serve an exported model over HTTP.

    python tools/serve.py detector.onnx --threads 2
    curl --data-binary @photo.jpg http://127.0.0.1:8000/predict

| | |
|---|---|
| POST /predict | an image file as the body; its detections or classes |
| GET /health | 200 while requests are taken |
| GET /model | classes, engine, metadata of the file |
| GET /metrics | counters and latencies, as Prometheus reads them |

Requests that come within --max-wait milliseconds run as one batch. A full
queue answers 429, a body above --max-bytes or an image above --max-pixels
413, what is no image 422, and what takes longer than --timeout 504. On SIGTERM
it answers what it has taken and ends. PyTorch is not needed;
docs/en/user_guides/deploy.md tells what to put in front of it.
"""

import argparse
import signal
import sys


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(name, kind, default, text):
        text += ' (default: %(default)s)'
        parser.add_argument(name, type=kind, default=default, help=text)

    parser.add_argument('model', help='a file of tools/export.py')
    parser.add_argument(
        '--engine',
        choices=('onnxruntime', 'openvino'),
        help='(default: what the ending of the file says)',
    )
    parser.add_argument(
        '--threads', type=int, help='of the engine (default: one per core)'
    )
    add('--host', str, '127.0.0.1', 'address; 0.0.0.0 for other machines')
    add('--port', int, 8000, 'port; 0 for any that is free')
    add('--score-threshold', float, 0.05, 'of detections that are returned')
    add('--top', int, 5, 'number of classes that are returned')
    add('--batch-size', int, 4, 'most images that run at once')
    add('--max-wait', float, 5.0, 'milliseconds to wait for a fuller batch')
    add('--queue', int, 32, 'most requests at a time')
    add('--timeout', float, 30.0, 'seconds for one request, waiting included')
    add('--max-bytes', int, 20_000_000, 'largest body')
    add('--max-pixels', int, 50_000_000, 'largest image')
    args = parser.parse_args(argv)
    for name in ('batch_size', 'queue', 'timeout', 'max_bytes', 'max_pixels'):
        if getattr(args, name) <= 0:
            parser.error(f'--{name.replace("_", "-")} has to be positive')
    return args


def main(argv=None):
    """Open the model and serve it until a signal comes."""
    args = parse_args(argv)
    try:
        import uvicorn

        from lors_plugin.deploy.runtime import Detector, load
        from lors_plugin.deploy.service import Limits, make_app
    except ImportError as error:
        sys.stderr.write(
            f'error: {error}; pip install fastapi uvicorn '
            'prometheus_client pillow\n'
        )
        return 2
    try:
        model = load(
            args.model,
            engine=args.engine,
            threads=args.threads,
            batch_size=args.batch_size,
        )
    except (OSError, ValueError, ImportError) as error:
        sys.stderr.write(f'error: {error}\n')
        return 2
    if isinstance(model, Detector):
        model.score_threshold = args.score_threshold
    else:
        model.top = args.top
    limits = Limits(
        max_wait=args.max_wait / 1000,
        queue=args.queue,
        timeout=args.timeout,
        max_bytes=args.max_bytes,
        max_pixels=args.max_pixels,
    )
    # Uvicorn raises the signal again when it has ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    uvicorn.run(
        make_app(model, limits),
        host=args.host,
        port=args.port,
        log_level='info',
        access_log=False,
        # Whoever sends nothing is not waited for.
        timeout_graceful_shutdown=int(args.timeout) + 1,
    )
    return 0


if __name__ == '__main__':
    sys.exit(main())
