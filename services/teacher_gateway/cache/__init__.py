"""What a tenant paid for before: where its answers lie, and taking them instead of asking."""
