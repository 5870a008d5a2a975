"""The redo log: rows in, rows out.  It knows no region."""
