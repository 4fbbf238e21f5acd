"""Connections of the fleet's processes to the servers."""
