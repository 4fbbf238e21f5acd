"""The whole fleet on one machine: setup, the servers, and the supervisor that runs them."""
