"""The description of every subject: an AsyncAPI document, and a page for people."""
