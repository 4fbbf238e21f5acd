"""Work in repositories: stores, working trees, actions, sandboxed commands, measurements."""
