"""The deployment of the fleet: configuration as data, and the stack on one machine."""
