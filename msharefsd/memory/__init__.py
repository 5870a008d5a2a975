"""What holds bytes: sparse files in memory, their host mappings, files of clients."""
