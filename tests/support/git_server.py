"""A git server: git's own HTTP backend, behind a password, on loopback."""

from __future__ import annotations

import base64
import os
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

USER, TOKEN = "fleet", "a-token-of-the-store"
_ALLOWED = f"Basic {base64.b64encode(f'{USER}:{TOKEN}'.encode()).decode()}"


class GitServer:
    """A server of the bare repositories in a folder.

    Attributes:
        url: the URL below which they are.
        away: whether it answers every request with an error.
        requests: how many it has received.
        version_2: whether it speaks version 2 of git's protocol; version 1 gives no commit by id.
    """

    def __init__(self, root: Path, certificate: Path | None = None) -> None:
        """Take a free port.

        Args:
            root: the folder.
            certificate: a folder with `tls.crt` and `tls.key`: the server speaks TLS.
        """
        self.root = root
        self.away = False
        self.version_2 = True
        self.requests = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.answer()

            def do_POST(self) -> None:
                self.answer()

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def answer(self) -> None:
                body = self.body()
                server.requests += 1
                if server.away:
                    self.refuse(HTTPStatus.SERVICE_UNAVAILABLE)
                elif self.headers.get("Authorization") != _ALLOWED:
                    self.refuse(HTTPStatus.UNAUTHORIZED)
                else:
                    self.relay(server.backend(self, body))

            def body(self) -> bytes:
                if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                chunks = []
                while size := int(self.rfile.readline(), 16):
                    chunks.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(chunks)

            def refuse(self, status: HTTPStatus) -> None:
                self.send_response(status)
                if status == HTTPStatus.UNAUTHORIZED:
                    self.send_header("WWW-Authenticate", 'Basic realm="git"')
                self.send_header("Content-Length", "0")
                self.end_headers()

            def relay(self, output: bytes) -> None:
                head, _, content = output.partition(b"\r\n\r\n")
                lines = [line.split(": ", 1) for line in head.decode().splitlines()]
                headers = {name.lower(): value for name, value in lines}
                self.send_response(int(headers.pop("status", "200").split()[0]))
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        scheme = "http"
        if certificate:
            scheme, context = "https", ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate / "tls.crt", certificate / "tls.key")
            self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        self.url = f"{scheme}://127.0.0.1:{self._http.server_port}"

    def backend(self, request: BaseHTTPRequestHandler, body: bytes) -> bytes:
        """Run git's HTTP backend for a request, as a CGI program; return what it writes."""
        path, _, query = request.path.partition("?")
        environment = {
            "PATH": os.defpath,
            "HOME": str(self.root),
            "GIT_PROJECT_ROOT": str(self.root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "REMOTE_USER": USER,
            "REQUEST_METHOD": request.command,
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "CONTENT_TYPE": request.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "HTTP_CONTENT_ENCODING": request.headers.get("Content-Encoding", ""),
        }
        if self.version_2:
            environment["GIT_PROTOCOL"] = request.headers.get("Git-Protocol", "")
        command = ["git", "-c", "safe.directory=*", "http-backend"]
        done = subprocess.run(command, input=body, env=environment, stdout=subprocess.PIPE)
        return done.stdout

    def make(self, key: str) -> Path:
        """Make an empty bare repository."""
        path = self.root / f"{key}.git"
        subprocess.run(["git", "init", "--quiet", "--bare", path], check=True)
        return path

    @contextmanager
    def serving(self) -> Iterator[GitServer]:
        """Answer requests until the block ends."""
        thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._http.shutdown()
            self._http.server_close()
            thread.join()


def credentials(folder: Path, token: str = TOKEN) -> Path:
    """Write the store's credentials into a new folder; return the folder."""
    folder.mkdir()
    (folder / "STORE.token").write_text(f"{USER}:{token}\n")
    return folder
