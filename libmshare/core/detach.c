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

enum use { NONE, THE_ONLY_ONE, ONE_OF_SEVERAL };

/*
 * End the use that mshare() made, if it did.  Who holds the region by mshare_open() keeps
 * it: then *attachment is to be given back; and otherwise to be detached.
 */
static enum use end_use(const char *name, struct attachment **attachment)
{
	enum use use = NONE;

	attachment_lock();
	*attachment = attachment_named(name);
	if (*attachment && (*attachment)->holders > 0) {
		(*attachment)->plain = false;
		attachment_take(*attachment);
		use = ONE_OF_SEVERAL;
	} else if (*attachment) {
		attachment_end(*attachment);
		use = THE_ONLY_ONE;
	}
	attachment_unlock();
	return use;
}

MSHARE_EXPORT int mshare_detach(const char *name)
{
	struct attachment *attachment;

	reason_forget();
	if (name_check(name) < 0)
		return -1;
	switch (end_use(name, &attachment)) {
	case THE_ONLY_ONE:
		return detach_region(attachment, MSHARE_WIRE_DETACH);
	case ONE_OF_SEVERAL:
		attachment_give_back(attachment);
		return 0;
	default:
		errno = ENOENT;
		return -1;
	}
}

/* Its name only; that it has lost it already is as good. */
static int forget(struct attachment *attachment)
{
	int result = name_forget(attachment->root, attachment->identity), saved = errno;

	attachment_give_back(attachment);
	errno = saved;
	return result < 0 && errno == ESTALE ? 0 : result;
}

MSHARE_EXPORT int mshare_unlink(const char *name)
{
	struct attachment *attachment;

	reason_forget();
	if (name_check(name) < 0)
		return -1;
	switch (end_use(name, &attachment)) {
	case THE_ONLY_ONE:
		return detach_region(attachment, MSHARE_WIRE_UNLINK);
	case ONE_OF_SEVERAL:
		return forget(attachment);
	default:
		return name_unlink(name);
	}
}
