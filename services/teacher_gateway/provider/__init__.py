"""A batch that a provider answers by its batch API: sent, looked at now and then, and read."""
