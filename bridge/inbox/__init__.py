"""The inbox: events from JetStream are parsed, stored in the graph, and passed to workflows."""
