"""The stores of the repositories, as the settings name them."""

from activities.workspace.stores import Stores
from workers.settings import Settings


def stores_of(settings: Settings) -> Stores:
    """Return the stores in WORKSPACE_STORE, a folder or a git server."""
    return Stores(settings.store_folder, settings.repository_credentials, settings.store_server)
