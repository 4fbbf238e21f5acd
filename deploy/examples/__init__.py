"""Examples: a project with a story, and an external agent."""
