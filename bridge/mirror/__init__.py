"""The mirror of workflows on JetStream, and its repair from Temporal's histories."""
