"""Deterministic code: the story's state machine, the plan's DAG and the deliberation's steps."""
