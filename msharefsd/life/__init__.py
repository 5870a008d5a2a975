"""Starting, ending, and the next daemon."""
