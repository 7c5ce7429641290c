"""Plumbing that the services share, without a word of their domain."""
