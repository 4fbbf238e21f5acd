"""Work in repositories: tool chains, sandboxed commands, measurements."""
