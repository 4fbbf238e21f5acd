"""External agents: calls as commands on NATS, and their responses."""
