/* SPDX-License-Identifier: MIT */
/*
 * fork(): the child attaches each region again, as a sharer of its own, with system
 * calls only.  It holds the lock of the list since before it was made.
 */
#include "internal.h"

#include <errno.h>
#include <pthread.h>

static pthread_once_t handlers_once = PTHREAD_ONCE_INIT;

static void before_fork(void)
{
	attachment_lock();
}

static void after_fork_in_parent(void)
{
	attachment_unlock();
}

/*
 * Async-signal-safe.  The parent's connection and userfaultfd are copies here:
 * closed, they end nothing.  What cannot be attached stays reserved, so that
 * neither stale pointers nor other mappings meet there: a touch is SIGSEGV.
 */
static void attach_again(struct attachment *attachment)
{
	struct mshare_wire_request request = {
		.op = MSHARE_WIRE_ATTACH,
		.start = (uintptr_t)attachment->start,
		.size = attachment->size,
		.oflags = attachment->writable ? O_RDWR : O_RDONLY,
	};
	struct mshare_wire_reply reply;
	const struct root *root;
	int fds[2], backing;

	attachment_hang_up(attachment);
	attachment->waiting = (struct waiting){ 0 };
	if (window_reserve(attachment->start, attachment->size) != 0)
		return;
	for (;;) {
		root = root_use_again(attachment->root);
		if (root)
			attachment->connection = connection_open(root->fd);
		if (attachment->connection >= 0)
			attachment->uffd = uffd_open(attachment->connection, attachment->backing);
		fds[0] = attachment->backing;
		fds[1] = attachment->uffd;
		request.userfaultfd = (uint32_t)attachment->uffd;
		if (attachment->uffd >= 0 &&
		    connection_call(attachment->connection, &request, NULL, fds, 2, &reply,
				    &backing) == 0)
			break;
		if (!daemon_is_gone(errno) && errno != ENOENT)
			return attachment_hang_up(attachment);
		attachment_hang_up(attachment);
		if (!wait_again(&attachment->waiting))
			return;
		request.flags = MSHARE_WIRE_REPEATED;
	}
	close_keeping_errno(backing); /* the same as ours */
	window_map(attachment, reply.flags);
}

static void after_fork_in_child(void)
{
	int saved = errno;

	for (struct attachment *each = attachment_first(); each; each = each->next)
		attach_again(each);
	attachment_unlock();
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
