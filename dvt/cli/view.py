"""Run `dvt view`: the interactive page of a store, served to this machine alone or written to a file."""

from __future__ import annotations

import webbrowser
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rich.console import Console

from dvt.cli.common import progress_bar, resolved, shown
from dvt.cli.settings.show import View
from dvt.errors import ConfigError
from dvt.files import whole_file, writable

_HERE = "127.0.0.1"


def view(command: View, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt view`: exit code 0 when the page is written, or no longer served."""
    from dvt.analysis.page.store_page import store_page

    if command.out is not None and command.out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"the page is a web page: --out ends in .html, got {shown(str(command.out))}")
    if not 0 <= command.port < 1 << 16:
        raise ConfigError(f"port is {command.port}; it must lie in 0..65535, and 0 takes a free one")
    settings = resolved(command, command="view")
    if command.out is not None:
        writable(command.out)
    with progress_bar(console) as progress:
        page = store_page(command.store, command.images, progress).encode()
    if command.out is None:
        return _serve(page, command, console, settings)
    with whole_file(command.out) as part:
        part.write_bytes(page)
    console.print(f"{shown(str(command.out))}: {len(page) / 1e6:.1f} MB, open it in any browser")
    return 0, {"out": str(command.out), "bytes": len(page), "settings": settings}


def _serve(page: bytes, command: View, console: Console, settings: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Answer with the page until the user has enough of it."""
    try:
        server = page_server(page, command.port)
    except OSError as error:
        raise ConfigError(f"cannot listen on port {command.port}: {error.strerror}; give another --port") from error
    address = f"http://{_HERE}:{server.server_port}/"
    console.print(f"{address}  (this machine only; Ctrl-C ends it)")
    if command.browser:
        webbrowser.open(address)
    with server, suppress(KeyboardInterrupt):
        server.serve_forever()
    return 0, {"address": address, "bytes": len(page), "settings": settings}


def page_server(page: bytes, port: int) -> ThreadingHTTPServer:
    """Make a server of one page on the loopback address, which no other machine reaches.

    A request under another host's name is refused: a web page elsewhere could make the browser send one.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = self.headers.get("Host", "").rpartition(":")[0]
            if host not in (_HERE, "localhost"):
                self.send_error(403)
            elif self.path != "/":
                self.send_error(404)
            else:
                self.send_response(200)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(page)))
                self.end_headers()
                self.wfile.write(page)

        def log_message(self, *_: Any) -> None:
            """Say nothing: each visit would be a line."""

    server = ThreadingHTTPServer((_HERE, port), Handler)
    server.daemon_threads = True
    return server
