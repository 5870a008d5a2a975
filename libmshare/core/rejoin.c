/* SPDX-License-Identifier: MIT */
/*
 * Calls on an attachment, over the death of daemons.  Async-signal-safe.
 *
 * The daemon's end closes the connection.  The next daemon knows this process for a
 * sharer (it fetched its userfaultfd by pidfd_getfd(2)), so a new connection only has
 * to say which attachment it is: the backing's descriptor, which only sharers have,
 * tells the region, and the socket tells the process.  Then the call is made again.
 * Whether its answer or the call itself was lost cannot be told here; the daemon can,
 * by the call's number.
 */
#include "internal.h"

#include <errno.h>
#include <sys/stat.h>
#include <unistd.h>

/* Whether the memory was cut to nothing: by `msharefsd --purge`, and no daemon will know it. */
static bool was_purged(const struct attachment *attachment)
{
	struct stat status;

	return fstat(attachment->backing, &status) == 0 && status.st_size == 0;
}

static int rejoin(struct attachment *attachment)
{
	struct mshare_wire_request request = { .op = MSHARE_WIRE_REJOIN };
	struct mshare_wire_reply reply;
	const struct root *root;
	int result, ignored;

	do {
		if (was_purged(attachment)) {
			errno = ESTALE;
			return -1;
		}
		root = root_use_again(attachment->root);
		if (root)
			attachment->connection = connection_open(root->fd);
		if (attachment->connection < 0) {
			/* ENOENT: the old mount is down and the new one not up yet. */
			if (!daemon_is_gone(errno) && errno != ENOENT)
				return -1;
			continue;
		}
		result = connection_call(attachment->connection, &request, NULL, &attachment->backing,
					 1, &reply, &ignored);
		if (result == 0)
			return 0;
		close_keeping_errno(attachment->connection);
		attachment->connection = -1;
		if (result != CONNECTION_LOST)
			return -1;
	} while (wait_again(&attachment->waiting));
	return -1;
}

int attachment_call(struct attachment *attachment, const struct mshare_wire_request *request,
		    const struct mshare_wire_object *objects, const int *fds, size_t fd_count,
		    struct mshare_wire_reply *reply, int *reply_fd)
{
	struct mshare_wire_request numbered = *request;
	int result;

	*reply_fd = -1;
	if (attachment->uffd < 0) { /* a child that could not attach after fork */
		errno = ENOTCONN;
		return -1;
	}
	attachment->calls++;
	if (attachment->calls == 0)
		attachment->calls = 1;
	numbered.sequence = attachment->calls;
	for (;;) {
		if (attachment->connection < 0 && rejoin(attachment) < 0)
			return -1;
		result = connection_call(attachment->connection, &numbered, objects, fds, fd_count,
					 reply, reply_fd);
		if (result != CONNECTION_LOST)
			return result;
		close(attachment->connection);
		attachment->connection = -1;
	}
}
