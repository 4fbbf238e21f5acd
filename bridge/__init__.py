"""The edges: Temporal to JetStream, and back."""
