"""A daemon of an ordinary user."""

from __future__ import annotations

NOBODY = 65534

BECOME_NOBODY = f"""
# The interpreter may lie where only root can read: import first, then become the
# user, and be dumpable again (prctl(2)), as a program that the user started is.
import ctypes, os, sys
import msharefsd.__main__, msharefsd.front.front, msharefsd.front.purging
os.setgroups([])
os.setgid({NOBODY})
os.setuid({NOBODY})
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
sys.exit(msharefsd.__main__.main(sys.argv[1:]))
"""
