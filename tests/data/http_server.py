"""A real HTTP server on loopback that misbehaves on request."""

import gzip
import socket
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

DATA = np.random.default_rng(0).integers(0, 256, 100_000, dtype=np.uint8).tobytes()


@dataclass
class Faults:
    """How the server behaves. `busy` and `cut` count down over GET requests; `requests` counts what came, by kind."""

    ranges: bool = True
    first_bytes: bool = False  # a range is answered with as many bytes from the start, and says so
    gzips: str = ""  # bodies, not what HEAD tells of them: "asked" where the client takes it, "always"
    busy: int = 0  # so many requests are answered 503
    cut: int = 0  # so many answers end in the middle, the connection closed
    delay_s: float = 0.0  # before each answer
    stall: int = 0  # so many requests are never answered
    tell_size: bool = True
    etag: str = '"1"'
    requests: Counter = field(default_factory=Counter)
    sent: int = 0
    under_way: int = 0
    most_under_way: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, name):
        with self.lock:
            left = getattr(self, name)
            setattr(self, name, max(0, left - 1))
            return left > 0


@contextmanager
def serve(folder: Path):
    """(address, faults) of a server of the files in `folder`; folders are listed as links.

    A file may have a query in its name; of others the query is ignored. What is below /moved/ is redirected.
    """
    faults = Faults()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # headers and body are two writes: 40 ms each answer otherwise

        def log_message(self, *_):
            """Quiet."""

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            with faults.lock:
                faults.under_way += 1
                faults.most_under_way = max(faults.most_under_way, faults.under_way)
            try:
                self.answer(body=True)
            finally:
                with faults.lock:
                    faults.under_way -= 1

        def answer(self, body):
            with faults.lock:
                faults.requests[self.command, "range" if self.headers.get("Range") else "whole"] += 1
            time.sleep(faults.delay_s)
            path = folder / self.path.lstrip("/")
            path = path if path.is_file() else folder / self.path.partition("?")[0].lstrip("/")
            if body and faults.take("stall"):
                time.sleep(5)
                self.hang_up()
                return
            if self.path.startswith("/moved/"):
                self.reply(302, b"", body, extra={"Location": self.path.removeprefix("/moved")})
            elif body and faults.take("busy"):
                self.reply(503, b"busy", body)
            elif path.is_dir():
                links = "".join(f'<a href="{entry.name}">{entry.name}</a>' for entry in sorted(path.iterdir()))
                self.reply(200, links.encode(), body, "text/html")
            elif not path.is_file():
                self.reply(404, b"none", body)
            else:
                self.reply_file(path.read_bytes(), body)

        def hang_up(self):
            # Not by closing alone: a worker forked meanwhile holds the connection, too.
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        def reply_file(self, data, body):
            wanted = self.headers.get("Range")
            if wanted and faults.ranges:
                first, last = (int(place) for place in wanted.removeprefix("bytes=").split("-"))
                if faults.first_bytes:
                    first, last = 0, last - first
                part = data[first : last + 1]
                self.reply(206, part, body, extra={"Content-Range": f"bytes {first}-{last}/{len(data)}"})
            elif body and (faults.gzips == "always" or (faults.gzips and "gzip" in self.headers["Accept-Encoding"])):
                self.reply(200, gzip.compress(data, 1), body, extra={"Content-Encoding": "gzip"})
            else:
                self.reply(200, data, body)

        def reply(self, status, data, body, kind="application/x-tar", extra=()):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            if faults.tell_size:
                self.send_header("Content-Length", str(len(data)))
            else:
                self.send_header("Connection", "close")
            if faults.etag:
                self.send_header("ETag", faults.etag)
            for name, value in dict(extra).items():
                self.send_header(name, value)
            self.end_headers()
            cut = body and status < 300 and faults.take("cut")
            data = data[: len(data) // 2] if cut else data
            if body:
                try:
                    self.wfile.write(data)
                    if cut:
                        self.hang_up()
                except OSError:
                    return  # the client had enough
                with faults.lock:
                    faults.sent += len(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", faults
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
