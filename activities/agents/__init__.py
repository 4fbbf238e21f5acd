"""Calls to agents that are LLMs: requests, prompts, the client, and the answers that are kept."""
