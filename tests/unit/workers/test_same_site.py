"""What a server on this machine answers to web pages of other sites, by attacks."""

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from workers.same_site import SameSite, own_hosts, refusal

OWN = own_hosts(8000)
HERE = "127.0.0.1:8000"


@pytest.mark.parametrize(
    ("hosts", "origins"),
    [
        ([HERE], []),
        (["localhost:8000"], []),
        (["LocalHost:8000"], ["http://localhost:8000"]),
        (["[::1]:8000"], ["http://[::1]:8000"]),
    ],
)
def test_the_servers_pages_and_programs_are_served(hosts: list[str], origins: list[str]) -> None:
    assert refusal(hosts, origins, OWN) == ""


@pytest.mark.parametrize(
    ("hosts", "origins", "named"),
    [
        (["evil.example"], [], "Host"),
        (["evil.example:8000"], [], "Host"),
        (["evil.example:8000"], ["http://evil.example:8000"], "Host"),  # DNS rebinding
        (["127.0.0.1.evil.example:8000"], [], "Host"),
        (["127.0.0.1"], [], "Host"),
        (["127.0.0.1:8001"], [], "Host"),
        ([], [], "Host"),
        ([HERE, "evil.example"], [], "Host"),
        ([HERE], ["http://evil.example"], "Origin"),
        ([HERE], ["null"], "Origin"),
        ([HERE], ["http://127.0.0.1:3000"], "Origin"),
        ([HERE], ["http://localhost:8000"], "Origin"),
        ([HERE], ["http://127.0.0.1:8000.evil.example"], "Origin"),
        ([HERE], [f"http://{HERE}", "http://evil.example"], "Origin"),
        ([HERE], [""], "Origin"),
    ],
)
def test_pages_of_other_sites_are_refused(hosts: list[str], origins: list[str], named: str) -> None:
    assert refusal(hosts, origins, OWN).startswith(named)


def test_a_server_with_any_name_refuses_other_origins() -> None:
    assert refusal(["llm.example"], ["http://llm.example"], None) == ""
    assert refusal(["llm.example"], ["http://evil.example"], None).startswith("Origin")


async def test_the_middleware_answers_403_before_the_application() -> None:
    requests = []

    async def work(request: object) -> PlainTextResponse:
        requests.append(request)
        return PlainTextResponse("done")

    app = Starlette(routes=[Route("/", work, methods=["GET", "POST"])])
    app.add_middleware(SameSite, own=OWN)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url=f"http://{HERE}") as http:
        assert (await http.get("/")).text == "done"
        foreign = {"Origin": "http://evil.example"}
        assert (await http.post("/", headers=foreign)).status_code == 403
        assert (await http.options("/", headers=foreign)).status_code == 403
        assert (await http.get("/", headers={"Host": "evil.example:8000"})).status_code == 403
    assert len(requests) == 1
