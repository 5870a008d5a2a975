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
 *
 * A program that has closed our descriptors has lost the connection in the same way; if
 * the backing's is gone, too, the region's file is opened anew.
 */
#include "internal.h"

#include <errno.h>
#include <sys/stat.h>
#include <unistd.h>

int attachment_proof(const struct attachment *attachment, int root, bool *close)
{
	*close = !held_is_ours(&attachment->backing);
	return *close ? name_reopen(root, attachment) : attachment->backing.fd;
}

bool attachment_was_purged(const struct attachment *attachment)
{
	struct stat status;

	return held_is_ours(&attachment->backing) &&
	       fstat(attachment->backing.fd, &status) == 0 && status.st_size == 0;
}

/* One try: 0, or CONNECTION_LOST if there was no daemon, or -1. */
static int rejoin_by(struct attachment *attachment, const struct root *root)
{
	struct mshare_wire_request request = { .op = MSHARE_WIRE_REJOIN };
	struct mshare_wire_reply reply;
	int result, backing, proof;
	bool opened;

	held_take(&attachment->connection, connection_open(root));
	if (attachment->connection.fd < 0)
		return daemon_is_gone(errno) || errno == ENOENT ? CONNECTION_LOST : -1;
	proof = attachment_proof(attachment, root->fd, &opened);
	if (proof < 0) {
		result = daemon_is_gone(errno) ? CONNECTION_LOST : -1;
	} else {
		result = connection_call(attachment->connection.fd, &request, NULL, &proof, 1, &reply,
					 &backing);
		if (opened)
			close_keeping_errno(proof);
	}
	if (proof >= 0 && result == 0) {
		if (opened)
			held_take(&attachment->backing, backing);
		else
			close_keeping_errno(backing);
		return 0;
	}
	held_close(&attachment->connection);
	return result;
}

static int rejoin(struct attachment *attachment)
{
	struct root root;
	int result;

	do {
		if (attachment_was_purged(attachment)) {
			errno = ESTALE;
			return -1;
		}
		/* ENOENT: the old mount is down and the new one not up yet. */
		result = root_use_again(attachment->root, &root);
		if (result < 0 && (daemon_is_gone(errno) || errno == ENOENT))
			continue;
		if (result == 0) {
			result = rejoin_by(attachment, &root);
			root_close(&root);
		}
		if (result != CONNECTION_LOST)
			return result;
	} while (wait_again(&attachment->waiting));
	return -1;
}

/* The program has closed it, or put something else in its place. */
static bool was_taken(struct attachment *attachment)
{
	if (attachment->connection.fd < 0 || held_is_ours(&attachment->connection))
		return false;
	attachment->connection = HELD_NOTHING;
	return true;
}

int attachment_call(struct attachment *attachment, const struct mshare_wire_request *request,
		    const struct mshare_wire_object *objects, const int *fds, size_t fd_count,
		    struct mshare_wire_reply *reply, int *reply_fd)
{
	struct mshare_wire_request numbered = *request;
	int result;

	*reply_fd = -1;
	if (attachment->uffd.fd < 0) { /* a child that could not attach after fork */
		errno = ENOTCONN;
		return -1;
	}
	attachment->calls++;
	if (attachment->calls == 0)
		attachment->calls = 1;
	numbered.sequence = attachment->calls;
	for (;;) {
		was_taken(attachment);
		if (attachment->connection.fd < 0 && rejoin(attachment) < 0)
			return -1;
		result = connection_call(attachment->connection.fd, &numbered, objects, fds, fd_count,
					 reply, reply_fd);
		if (result == 0 || (result != CONNECTION_LOST && !was_taken(attachment)))
			return result;
		held_close(&attachment->connection);
	}
}
