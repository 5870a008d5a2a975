"""What is counted, and how often a line is logged."""
