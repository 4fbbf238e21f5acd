"""A subscriber that opens pull requests, to run as it is or to use as the base of another."""
