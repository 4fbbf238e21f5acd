"""The activities: every side effect that workflows request."""
