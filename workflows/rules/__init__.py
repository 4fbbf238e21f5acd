"""The rules of stories, plans, ranking and readiness. Pure: no I/O, no clock, no workflow API."""
