/* SPDX-License-Identifier: MIT */
/* mshare_detach(), and mshare_unlink() of what is attached. */
#include "internal.h"

#include <errno.h>

/*
 * The window goes first: from then on no thread of this process can wait for a
 * page, and the daemon may forget us.  Other calls on it have come to their end.
 */
int detach_region(struct attachment *attachment, uint16_t op)
{
	struct mshare_wire_request request = { .op = op };
	struct mshare_wire_reply reply;
	int result = 0, saved, ignored;

	if (attachment_enter(attachment) < 0)
		return -1;
	if (raw_munmap(attachment->start, attachment->size) < 0) {
		saved = errno;
		attachment_leave(attachment);
		attachment_settle(attachment, true);
		errno = saved;
		return -1;
	}
	attachment->waiting = (struct waiting){ 0 };
	if (attachment->uffd.fd >= 0 || op == MSHARE_WIRE_UNLINK)
		result = attachment_call(attachment, &request, NULL, NULL, 0, &reply, &ignored);
	/* No sharer any more: it was done, and the daemon died before it could say so. */
	if (result < 0 && errno == ESTALE)
		result = 0;
	saved = errno;
	attachment_drop(attachment);
	attachment->detached = true;
	attachment_leave(attachment);
	attachment_settle(attachment, false);
	attachment_give_back(attachment); /* the list's */
	errno = saved;
	return result;
}

/*
 * End the use that mshare() made: whether there is one.  Who holds the region
 * by mshare_open() keeps it; *detached is what is to be detached otherwise.
 */
static bool end_use(const char *name, struct attachment **detached)
{
	struct attachment *found;

	*detached = NULL;
	attachment_lock();
	found = attachment_named(name);
	if (found && found->holders > 0) {
		found->plain = false;
	} else if (found) {
		attachment_end(found);
		*detached = found;
	}
	attachment_unlock();
	return found;
}

MSHARE_EXPORT int mshare_detach(const char *name)
{
	struct attachment *detached;

	reason_forget();
	if (name_check(name) < 0)
		return -1;
	if (!end_use(name, &detached)) {
		errno = ENOENT;
		return -1;
	}
	return detached ? detach_region(detached, MSHARE_WIRE_DETACH) : 0;
}

MSHARE_EXPORT int mshare_unlink(const char *name)
{
	struct attachment *detached;
	int result;

	reason_forget();
	if (name_check(name) < 0)
		return -1;
	if (!end_use(name, &detached)) {
		result = name_unlink(name);
		if (result < 0)
			name_explain();
		return result;
	}
	return detached ? detach_region(detached, MSHARE_WIRE_UNLINK) : 0;
}
