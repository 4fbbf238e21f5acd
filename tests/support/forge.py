"""A git forge's REST API for pull requests, over real HTTP, which records its requests.

It answers as Gitea and GitHub do: 201 with the pull request, 409 for one that exists, 401 without
the token, 404 for an unknown repository. Pages have the size that was asked for.
"""

from __future__ import annotations

from collections import deque
from types import TracebackType
from typing import Any, Self

from aiohttp import web
from pydantic import BaseModel


class ForgeRequest(BaseModel):
    """A request that the forge received."""

    method: str
    path: str
    query: dict[str, str]
    token: str
    body: dict[str, Any] | None = None


class Forge:
    """A forge with one repository, on the loopback interface."""

    def __init__(self, repository: str = "team/ratelimit", token: str = "secret-token") -> None:
        self.repository, self.token = repository, token
        self.requests: list[ForgeRequest] = []
        self.pulls: list[dict[str, Any]] = []
        self.failures: deque[web.Response] = deque()
        """What the next requests get instead of their answers."""
        self.url = ""
        self._runner: web.AppRunner | None = None

    @property
    def opened(self) -> list[dict[str, Any]]:
        """The bodies of the requests that asked for a pull request."""
        return [each.body for each in self.requests if each.method == "POST" and each.body]

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.add_routes([web.route("*", "/api/v1/repos/{owner}/{name}/pulls", self._pulls)])
        self._runner = web.AppRunner(app, shutdown_timeout=0)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/api/v1"
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._runner:
            await self._runner.cleanup()

    async def _pulls(self, request: web.Request) -> web.Response:
        body = await request.json() if request.can_read_body else None
        self.requests.append(
            ForgeRequest(
                method=request.method,
                path=request.path,
                query=dict(request.query),
                token=request.headers.get("Authorization", ""),
                body=body,
            )
        )
        if self.failures:
            return self.failures.popleft()
        if request.headers.get("Authorization") != f"token {self.token}":
            return web.json_response({"message": "token is invalid"}, status=401)
        if "/".join(request.match_info.values()) != self.repository:
            return web.json_response({"message": "not found"}, status=404)
        if body is None:
            first = (int(request.query["page"]) - 1) * int(request.query["limit"])
            return web.json_response(self.pulls[first : first + int(request.query["limit"])])
        if any(self._is_open(pull, body) for pull in self.pulls):
            return web.json_response({"message": "pull request already exists"}, status=409)
        return web.json_response(self.add(body["head"], base=body["base"]), status=201)

    def add(
        self, branch: str, *, base: str = "main", state: str = "open", commit: str = ""
    ) -> dict[str, Any]:
        """Have a pull request, as if someone had opened it."""
        number = len(self.pulls) + 1
        pull = {
            "number": number,
            "html_url": f"https://forge.example/{self.repository}/pulls/{number}",
            "state": state,
            "head": {"ref": branch, "sha": commit},
            "base": {"ref": base},
        }
        self.pulls.append(pull)
        return pull

    @staticmethod
    def _is_open(pull: dict[str, Any], asked: dict[str, Any]) -> bool:
        refs = (pull["head"]["ref"], pull["base"]["ref"])
        return pull["state"] == "open" and refs == (asked["head"], asked["base"])
