"""Page tables of processes: where a machine's memory for them goes, and how to have it back.

Everything is asked of the kernel, from outside of the processes that it is about, and
no code of theirs runs.  Nothing here knows of regions or of a daemon: the command
`mshare` uses it for programs that nobody will port, and msharefsd for its regions.

Bottom to top: `calls` and `proc` (what Python lacks, what /proc says), `pagemap` (what is
in a process's page table), `objects` (what shared memory is called), `tables` (one
process, to the kilobyte), `survey` (all of them), `fill` (which parts of an object are
worth it), `collapse` (having tables back), `watch` (as soon as there are some).
"""
