"""The process that has one user's memory: its regions' pages, files, sharers and journal."""
