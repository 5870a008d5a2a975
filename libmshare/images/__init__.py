"""Images of regions in an object store: pushed from one machine, pulled on others.

An image is a manifest (manifest.py), which is written last, and parts that are named by what is
in them; docs/image-format.md describes both.  All of it is done in the process that asks for
it, with its own rights and credentials: the daemon knows nothing of stores.

Nothing here is needed by who attaches a region that was pulled, and `obstore`, which speaks to
stores, is imported when it is needed.
"""
