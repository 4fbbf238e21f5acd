"""The graph and its cache, as every process of the fleet writes them."""

from __future__ import annotations

from neo4j import AsyncDriver
from redis.asyncio import Redis

from activities.cache import Cache
from activities.graph.activities import Graph
from activities.graph.scopes import load_scopes
from activities.redaction import load_redaction
from workers.payload_codec import text_cipher
from workers.settings import Settings


def open_graph(settings: Settings, driver: AsyncDriver, valkey: Redis) -> Graph:
    """Open the graph with its configuration.

    Raises:
        InvalidConfig: a file of the configuration is not valid.
    """
    return Graph(
        driver,
        Cache(valkey, settings.context_cache_ttl, text_cipher(settings.encryption_keys)),
        load_scopes(settings.fleet_config / "scopes.yaml"),
        load_redaction(settings.fleet_config),
    )
