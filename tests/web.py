"""An HTTP server on loopback that serves a folder, with ranges or without."""

from __future__ import annotations

import re
import threading
import time
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class PlainHandler(SimpleHTTPRequestHandler):
    """Python's own: it ignores ranges and sends whole files."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass


class RangeHandler(PlainHandler):
    def send_head(self):
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        self.server.requests.append((self.command, self.path, self.headers.get("Range")))
        time.sleep(self.server.latency)
        if self.command == "GET" and self.server.stalled and self.server.stalled in self.path:
            self.server.ended.wait(300)
            self.close_connection = True
            return None
        if self.command == "GET" and self.server.trickling and self.server.trickling in self.path:
            self.send_response(206)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            while not self.server.ended.wait(0.05):
                self.wfile.write(b"x")
            self.close_connection = True
            return None
        if self.server.failures:
            self.server.failures -= 1
            self.send_error(503)
            return None
        if self.server.misread:  # as a gateway does for a while: 200
            page = self.server.misread.pop() or Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)
            return None
        path = Path(self.translate_path(self.path))
        if not match or not path.is_file():
            return super().send_head()
        if int(match[1]) >= path.stat().st_size:
            self.send_error(416)
            return None
        start, end = int(match[1]), min(int(match[2]), path.stat().st_size - 1)
        self.send_response(206)
        self.send_header("Content-Length", str(end - start + 1))
        self.send_header("Content-Range", f"bytes {start}-{end}/{path.stat().st_size}")
        self.end_headers()
        if self.command == "GET":
            with path.open("rb") as file:
                file.seek(start)
                self.wfile.write(file.read(end - start + 1))
        return None


@contextmanager
def served(folder, handler=RangeHandler):
    """The server of `folder`: its .url, its .requests as (method, path, range).

    It waits .latency seconds before each answer, and the next .failures requests fail. What is asked of paths that
    hold the text .stalled gets no answer at all, of those with .trickling one that never ends. Each of .misread is what
    a request gets in place of its range: bytes, or b"" for the whole file.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    server.requests, server.latency, server.failures, server.stalled = [], 0, 0, ""
    server.trickling, server.misread = "", []
    server.ended = threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
