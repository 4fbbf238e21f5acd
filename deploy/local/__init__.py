"""The whole fleet on one machine: set-up, the servers, and the supervisor that keeps them."""
