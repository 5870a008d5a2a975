"""Page faults, and what changes under them."""
