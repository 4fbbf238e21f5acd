"""One site for the whole run, and an engine slow enough for kills in the middle of an answer."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.support.llm_server import LlmServer
from tests.support.site import Site

TIME_LIMIT = pytest.mark.timeout(1800)
"""Long enough for a machine that is five times slower for a while; only what hangs needs it all."""


@pytest.fixture(scope="module")
async def engine() -> AsyncIterator[LlmServer]:
    async with LlmServer(delay_ms=300) as engine:
        yield engine


@pytest.fixture(scope="module")
async def site(engine: LlmServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    async with Site(tmp_path_factory.mktemp("site"), engine.url) as site:
        yield site
