"""The embedded stack: the same services on one machine, with no Docker and no account."""
