/* SPDX-License-Identifier: MIT */
/*
 * fork(): the child attaches each region again, as a sharer of its own, with system
 * calls only.  The lock of the list is held while it is made, so it finds that whole; who
 * waits for the daemon just then holds nothing that fork() would wait for.
 */
#include "internal.h"

#include <errno.h>
#include <pthread.h>

static pthread_once_t handlers_once = PTHREAD_ONCE_INIT;

static void before_fork(void)
{
	attachment_lock();
	root_lock();
}

static void after_fork_in_parent(void)
{
	root_unlock();
	attachment_unlock();
}

/* One try: 0, or -1.  Async-signal-safe. */
static int attach_by(struct attachment *attachment, const struct root *root, bool repeated)
{
	struct mshare_wire_request request = {
		.op = MSHARE_WIRE_ATTACH,
		.start = (uintptr_t)attachment->start,
		.size = attachment->size,
		.oflags = attachment->writable ? O_RDWR : O_RDONLY,
		.flags = repeated ? MSHARE_WIRE_REPEATED : 0,
	};
	struct mshare_wire_reply reply;
	int fds[2], backing = -1, result = -1;
	bool opened;

	held_take(&attachment->connection, connection_open(root));
	if (attachment->connection.fd < 0)
		return -1;
	fds[0] = attachment_proof(attachment, root->fd, &opened);
	if (fds[0] < 0)
		return -1;
	fds[1] = uffd_open(attachment->connection.fd, fds[0]);
	held_take(&attachment->uffd, fds[1]);
	request.userfaultfd = (uint32_t)fds[1];
	if (fds[1] >= 0)
		result = connection_call(attachment->connection.fd, &request, NULL, fds, 2, &reply,
					 &backing);
	if (opened) {
		close_keeping_errno(fds[0]);
		if (result == 0)
			held_take(&attachment->backing, backing);
	} else {
		close_keeping_errno(backing); /* the same as ours */
	}
	return result < 0 ? -1 : window_map(attachment, reply.flags);
}

/*
 * Async-signal-safe.  The parent's connection and userfaultfd are copies here:
 * closed, they end nothing.  What cannot be attached stays reserved, so that
 * neither stale pointers nor other mappings meet there: a touch is SIGSEGV.
 */
static void attach_again(struct attachment *attachment, struct waiting *waiting)
{
	bool repeated = false;
	struct root root;

	attachment_hang_up(attachment);
	attachment->waiting = (struct waiting){ 0 };
	if (window_take_away(attachment->start, attachment->size) < 0)
		return;
	do {
		int result = root_use_again(attachment->root, &root);

		if (result == 0) {
			result = attach_by(attachment, &root, repeated);
			root_close(&root);
		}
		if (result == 0)
			return;
		attachment_hang_up(attachment);
		repeated = true;
	} while ((daemon_is_gone(errno) || errno == ENOENT) &&
		 !attachment_was_purged(attachment) && wait_again(waiting));
}

static void after_fork_in_child(void)
{
	struct waiting waiting = { 0 }; /* for all of them together: fork() is one call */
	int saved = errno;

	root_unlock();
	attachment_alone();
	for (struct attachment *each = attachment_first(); each; each = each->next)
		attach_again(each, &waiting);
	errno = saved;
}

static void install_handlers(void)
{
	pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

void fork_handle(void)
{
	pthread_once(&handlers_once, install_handlers);
}
