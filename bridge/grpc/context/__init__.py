"""The Context service (fleet.context.v1)."""
