"""Every side effect that a workflow asks for."""
