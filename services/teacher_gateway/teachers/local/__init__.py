"""A teacher whose weights answer in the gateway's own worker."""
