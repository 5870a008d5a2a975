/* SPDX-License-Identifier: MIT */
/*
 * Descriptors that are kept from call to call, in a program that may do with its numbers
 * what it likes: closefrom(3), a daemon's beginning, dup2(2) over them.
 *
 * So a number is remembered with the file that it was, and is used and closed only as long
 * as it is that file still.  Inodes of sockets and userfaultfds are their own (Linux 5.12;
 * before, all userfaultfds are one).  Async-signal-safe.
 */
#include "internal.h"

#include <errno.h>
#include <sys/stat.h>

void held_take(struct held *held, int fd)
{
	struct stat status;
	int saved = errno;

	*held = HELD_NOTHING;
	if (fd >= 0 && fstat(fd, &status) == 0) {
		held->device = status.st_dev;
		held->inode = status.st_ino;
	}
	held->fd = fd;
	errno = saved;
}

bool held_is_ours(const struct held *held)
{
	struct stat status;
	int saved = errno;
	bool ours = held->fd >= 0 && fstat(held->fd, &status) == 0 &&
		    status.st_dev == held->device && status.st_ino == held->inode;

	errno = saved;
	return ours;
}

void held_close(struct held *held)
{
	if (held_is_ours(held))
		close_keeping_errno(held->fd);
	held->fd = -1;
}
