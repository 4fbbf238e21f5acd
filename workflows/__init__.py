"""Deterministic code: the story's state machine, the plan's DAG, the deliberation's lifecycle."""
