"""The Orchestrator service (orchestrator.v1)."""
