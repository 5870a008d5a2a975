/* SPDX-License-Identifier: MIT */
/* mshare_detach(), and mshare_unlink() of what is attached. */
#include "internal.h"

#include <errno.h>
#include <stdlib.h>

/*
 * The window goes first: from then on no thread of this process can wait for a
 * page, and the daemon may forget us.
 */
int detach_region(struct attachment **link, uint16_t op)
{
	struct attachment *attachment = *link;
	struct mshare_wire_request request = { .op = op };
	struct mshare_wire_reply reply;
	int result = 0, ignored;

	if (raw_munmap(attachment->start, attachment->size) < 0)
		return -1;
	attachment->waiting = (struct waiting){ 0 };
	if (attachment->uffd >= 0 || op == MSHARE_WIRE_UNLINK)
		result = attachment_call(attachment, &request, NULL, NULL, 0, &reply, &ignored);
	/* No sharer any more: it was done, and the daemon died before it could say so. */
	if (result < 0 && errno == ESTALE)
		result = 0;
	attachment_remove(link);
	attachment_drop(attachment);
	free(attachment);
	return result;
}

/* The use that mshare() made; who holds the region by mshare_open() keeps it. */
static int detach(struct attachment **link, uint16_t op)
{
	if ((*link)->holders == 0)
		return detach_region(link, op);
	(*link)->plain = false;
	return 0;
}

MSHARE_EXPORT int mshare_detach(const char *name)
{
	struct attachment **link;
	int result;

	if (name_check(name) < 0)
		return -1;
	attachment_lock();
	link = attachment_find(name);
	if (*link) {
		result = detach(link, MSHARE_WIRE_DETACH);
	} else {
		errno = ENOENT;
		result = -1;
	}
	attachment_unlock();
	return result;
}

MSHARE_EXPORT int mshare_unlink(const char *name)
{
	struct attachment **link;
	int result;

	if (name_check(name) < 0)
		return -1;
	attachment_lock();
	link = attachment_find(name);
	result = *link ? detach(link, MSHARE_WIRE_UNLINK) : name_unlink(name);
	attachment_unlock();
	return result;
}
