"""A web server of a folder, by aiohttp: with ranges, ETags and listings, and with faults where a test asks for them."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from aiohttp import web

Fault = Callable[[web.Request], web.StreamResponse | None]


class WebServer:
    """The server.

    Attributes
    ----------
    url : str
    answers : list of tuple
        Path, status and size in bytes of each answer to a GET.
    fault : callable or None
        Returns the answer for a request in place of the file; None for the file.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.answers: list[tuple[str, int, int]] = []
        self.fault: Fault | None = None
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()

    def run(self) -> None:
        """Serve until `stop`."""
        asyncio.set_event_loop(self._loop)
        app = web.Application(middlewares=[self._answer])
        app.on_response_prepare.append(self._note)
        app.router.add_static("/", self.folder, show_index=True)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        host, port = runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    @web.middleware
    async def _answer(self, request: web.Request, handler: Callable) -> web.StreamResponse:
        wrong = self.fault(request) if self.fault else None
        return await handler(request) if wrong is None else wrong

    async def _note(self, request: web.Request, response: web.StreamResponse) -> None:
        if request.method == "GET":
            self.answers.append((request.path, response.status, int(response.headers.get("Content-Length", 0))))

    def wait(self) -> None:
        self._ready.wait(10)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)


@contextmanager
def serving(folder: Path) -> Iterator[WebServer]:
    """Yield a server that runs in a thread."""
    server = WebServer(folder)
    thread = threading.Thread(target=server.run)
    thread.start()
    server.wait()
    try:
        yield server
    finally:
        server.stop()
        thread.join()
