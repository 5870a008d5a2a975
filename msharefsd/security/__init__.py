"""Which rights the daemon keeps, and what it may trust."""
