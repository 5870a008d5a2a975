"""The process that everybody speaks to first: the mount, names, the control socket.

It makes no system call on what a client holds but those of which it is known that they
wait for nobody (front/router.py has the list).
"""
