"""The control socket: one module a subject."""
