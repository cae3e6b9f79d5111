"""An HTTP service around a detector or a classifier.

FastAPI, Pillow and prometheus_client beside what the runtime needs.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Union

import numpy as np
import PIL.Image  # noqa: F401 - images are measured by it
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from lors_plugin.version import __version__

from .images import ImageError, image_size, read_image
from .runtime import Classifier, Detector

logger = logging.getLogger('uvicorn.error')
BODY = {'requestBody': {'content': {'image/*': {}}, 'required': True}}


@dataclass
class Limits:
    """Limits of a service: time, memory and size of requests.

    Attributes:
        max_wait (float): Seconds to wait for a fuller batch.
        queue (int): Requests at a time, those that are read and run
            included; it bounds the memory.
        timeout (float): Seconds for one request, from its first byte.
        max_bytes (int): Largest body.
        max_pixels (int): Largest image.
    """

    max_wait: float = 0.005
    queue: int = 32
    timeout: float = 30.0
    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000


class Metrics:
    """Counters of a service in the format of Prometheus."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            'lors_requests',
            'Requests to /predict by HTTP status.',
            ['status'],
            registry=registry,
        )
        self.seconds = Histogram(
            'lors_request_seconds',
            'From the first byte of a request to its answer.',
            registry=registry,
        )
        self.batch_seconds = Histogram(
            'lors_batch_seconds',
            'Resizing and running a batch.',
            registry=registry,
        )
        self.batch_images = Histogram(
            'lors_batch_images',
            'Images that ran as one batch.',
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self.waiting = Gauge(
            'lors_requests_in_flight',
            'Requests that were taken and not answered yet.',
            registry=registry,
        )


class Batcher:
    """Run images that come at nearly the same time as one batch.

    Only images of one size share a batch, so that what else is asked at that
    time changes no result.

    Args:
        model (Detector | Classifier): Its ``batch_size`` is the largest
            batch.
        max_wait (float): Seconds to wait for a fuller one.
        metrics (Metrics): To count batches in.
    """

    def __init__(
        self,
        model: Union[Detector, Classifier],
        max_wait: float,
        metrics: Metrics,
    ) -> None:
        self.model, self.max_wait, self.metrics = model, max_wait, metrics
        # Images by what waits for them, in the order of their coming.
        self.waiting: dict[asyncio.Future, np.ndarray] = {}
        self.arrived = asyncio.Event()

    async def run(self, image: np.ndarray) -> dict:
        """Return what the model finds in an image."""
        future = asyncio.get_running_loop().create_future()
        self.waiting[future] = image
        self.arrived.set()
        try:
            return await future
        finally:
            # Where it waited too long.
            self.waiting.pop(future, None)

    async def work(self) -> None:
        """Run batches until cancelled."""
        while True:
            await self.arrived.wait()
            if len(self.waiting) < self.model.batch_size:
                await asyncio.sleep(self.max_wait)
            await self._run_batch(self._next_batch())
            if not self.waiting:
                self.arrived.clear()

    def _next_batch(self) -> list[tuple[np.ndarray, asyncio.Future]]:
        """Take the first image, and the next ones of its size."""
        shape = next((i.shape for i in self.waiting.values()), None)
        alike = [f for f, i in self.waiting.items() if i.shape == shape]
        return [
            (self.waiting.pop(future), future)
            for future in alike[: self.model.batch_size]
        ]

    async def _run_batch(self, batch: list) -> None:
        if not batch:
            return
        images = [image for image, _ in batch]
        start = time.perf_counter()
        try:
            results = await asyncio.to_thread(self.model, images)
        except Exception as error:
            if len(batch) > 1:
                # One image fails by itself.
                for single in batch:
                    await self._run_batch([single])
            elif _waits(batch[0][1]):
                batch[0][1].set_exception(error)
            return
        self.metrics.batch_seconds.observe(time.perf_counter() - start)
        self.metrics.batch_images.observe(len(batch))
        for (_, future), result in zip(batch, results):
            if _waits(future):
                future.set_result(result)


def _waits(future: asyncio.Future) -> bool:
    return not future.done()


def make_app(model: Union[Detector, Classifier], limits: Limits) -> FastAPI:
    """Make the application.

    Args:
        model (Detector | Classifier): An opened file.
        limits (Limits): What it takes.

    Returns:
        FastAPI: For Uvicorn or any other ASGI server, one process.
    """
    metrics = Metrics()
    batcher = Batcher(model, limits.max_wait, metrics)
    in_flight = 0

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.worker = asyncio.create_task(batcher.work())
        yield
        app.state.worker.cancel()

    app = FastAPI(title='lors_plugin', version=__version__, lifespan=lifespan)

    @app.get('/health')
    async def health() -> dict:
        """Answer while requests are served."""
        if app.state.worker.done():
            raise HTTPException(503, 'the worker has ended')
        return dict(status='ok')

    @app.get('/model')
    async def describe_model() -> dict:
        """Tell what is served."""
        return dict(
            task=type(model).__name__.lower(),
            engine=model.engine.name,
            classes=model.classes,
            batch_size=model.batch_size,
            metadata=model.metadata,
        )

    @app.get('/metrics')
    async def show_metrics() -> Response:
        """Tell Prometheus."""
        return Response(
            generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST
        )

    @app.post('/predict', openapi_extra=BODY)
    async def predict(request: Request) -> JSONResponse:
        """Detect or classify: the body is an image file."""
        nonlocal in_flight
        if in_flight >= limits.queue:
            metrics.requests.labels(429).inc()
            raise HTTPException(
                429,
                f'{limits.queue} requests are waiting; try again',
                {'Retry-After': '1'},
            )
        in_flight += 1
        metrics.waiting.set(in_flight)
        start, status = time.perf_counter(), 500
        try:
            answer = await asyncio.wait_for(
                _answer(request, model, batcher, limits), limits.timeout
            )
            status = 200
            return answer
        except asyncio.TimeoutError:
            status = 504
            raise HTTPException(
                504, f'no answer within {limits.timeout:g} s'
            ) from None
        except HTTPException as error:
            status = error.status_code
            raise
        except Exception:
            logger.exception('a request failed')
            raise HTTPException(500, 'the model failed; see the log') from None
        finally:
            in_flight -= 1
            metrics.waiting.set(in_flight)
            metrics.requests.labels(status).inc()
            metrics.seconds.observe(time.perf_counter() - start)

    return app


async def _answer(
    request: Request, model: Any, batcher: Batcher, limits: Limits
) -> JSONResponse:
    """Read, decode and run one image."""
    content = await _read_body(request, limits.max_bytes)
    try:
        image = await asyncio.to_thread(_decode, content, model, limits)
        result = await batcher.run(image)
    except ImageError as error:
        raise HTTPException(422, str(error)) from error
    values = {key: value.tolist() for key, value in result.items()}
    names = model.classes
    found = [
        {
            'label': label,
            'class': names[label] if label < len(names) else str(label),
            'score': score,
        }
        for label, score in zip(values['labels'], values['scores'])
    ]
    for each, box in zip(found, values.get('boxes', ())):
        each['box'] = box
    height, width = image.shape[:2]
    return JSONResponse(dict(width=width, height=height, predictions=found))


async def _read_body(request: Request, limit: int) -> bytes:
    """Read a body of at most so many bytes."""
    too_large = HTTPException(413, f'more than {limit} bytes')
    length = request.headers.get('content-length', '')
    if length.isdigit() and int(length) > limit:
        raise too_large
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > limit:
            raise too_large
    return bytes(content)


def _decode(content: bytes, model: Any, limits: Limits) -> np.ndarray:
    width, height = image_size(content)
    if width * height > limits.max_pixels:
        raise HTTPException(
            413, f'{width} x {height} is more than {limits.max_pixels} pixels'
        )
    gray = model.channels == 1
    return read_image(content, gray, model.pipeline.decoder)
