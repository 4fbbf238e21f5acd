"""The streams and consumers of JetStream, dead letters, and live following."""
