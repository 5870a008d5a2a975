"""The command `mshare`: regions, for people at a terminal and for scripts."""
