/* SPDX-License-Identifier: MIT */
/* mshare_detach(), and mshare_unlink() of what is attached. */
#include "internal.h"

#include <errno.h>

/* The attachment of that name is given to the caller, who gives it back.  NULL for none. */
static struct attachment *find(const char *name)
{
	struct attachment *found;

	attachment_lock();
	found = attachment_take(attachment_named(name));
	attachment_unlock();
	return found;
}

/*
 * The window goes first: from then on no thread of this process can wait for a
 * page, and the daemon may forget us.  Other calls on it have come to their end.
 */
static int detach(struct attachment *attachment, uint16_t op)
{
	struct mshare_wire_request request = { .op = op };
	struct mshare_wire_reply reply;
	int result = 0, ignored;

	if (attachment_enter(attachment) < 0)
		return -1;
	if (raw_munmap(attachment->start, attachment->size) < 0) {
		attachment_leave(attachment);
		return -1;
	}
	attachment_remove(attachment);
	attachment->waiting = (struct waiting){ 0 };
	if (attachment->uffd.fd >= 0 || op == MSHARE_WIRE_UNLINK)
		result = attachment_call(attachment, &request, NULL, NULL, 0, &reply, &ignored);
	/* No sharer any more: it was done, and the daemon died before it could say so. */
	if (result < 0 && errno == ESTALE)
		result = 0;
	attachment_drop(attachment);
	attachment->detached = true;
	attachment_leave(attachment);
	attachment_give_back(attachment); /* the list's */
	return result;
}

MSHARE_EXPORT int mshare_detach(const char *name)
{
	struct attachment *attachment;
	int result;

	if (name_check(name) < 0)
		return -1;
	attachment = find(name);
	if (!attachment) {
		errno = ENOENT;
		return -1;
	}
	result = detach(attachment, MSHARE_WIRE_DETACH);
	attachment_give_back(attachment);
	return result;
}

MSHARE_EXPORT int mshare_unlink(const char *name)
{
	struct attachment *attachment;
	int result;

	if (name_check(name) < 0)
		return -1;
	attachment = find(name);
	if (!attachment)
		return name_unlink(name);
	result = detach(attachment, MSHARE_WIRE_UNLINK);
	attachment_give_back(attachment);
	return result;
}
