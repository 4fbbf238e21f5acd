"""The connection of Temporal to JetStream, in both directions."""
