/* SPDX-License-Identifier: MIT */
/*
 * mshare_open(): regions by what they are, not by what they are called.
 *
 * A name may be another region's the next time; an identity never is.  Several parts of a
 * program may hold one region, and none of them takes it from another.
 */
#include "internal.h"

#include <errno.h>
#include <string.h>

/* What mshare_open() is asked for makes sense. */
static int check(const struct mshare_request *request, int more)
{
	bool create = request->oflags & O_CREAT;

	if (!request->identity && name_check(request->name) < 0)
		return -1;
	if (request->identity && (create || request->name)) {
		reason_say("a region is found by its name or by its identity, and made by a name");
		errno = EINVAL;
		return -1;
	}
	if (!known_flags(request->oflags, more) ||
	    ((request->oflags & O_EXCL) && !create) ||
	    (request->flags & ~(MSHARE_EMPTY | MSHARE_DONATE | MSHARE_EPHEMERAL))) {
		errno = EINVAL;
		return -1;
	}
	if (create ? request->size == 0 : request->size || request->addr || request->flags) {
		reason_say(create ? "say how large the new region is" :
				    "a region that exists lies where it lies, and is what it is");
		errno = EINVAL;
		return -1;
	}
	if ((uintptr_t)request->addr + request->size < (uintptr_t)request->addr ||
	    ((request->flags & MSHARE_DONATE) && !request->addr)) {
		errno = EINVAL;
		return -1;
	}
	return 0;
}

MSHARE_EXPORT int mshare_open(const struct mshare_request *request, struct mshare_region *region)
{
	uint32_t kind = MSHARE_WIRE_BACKING_DEFAULT;
	struct wish wish = { .open = request };

	reason_forget();
	if (!request || !region) {
		errno = EFAULT;
		return -1;
	}
	region->held = 0;
	if (check(request, O_CREAT | O_EXCL) < 0 ||
	    ((request->oflags & O_CREAT) && kind_of(request->backing, &kind) < 0))
		return -1;
	if (request->oflags & O_CREAT) {
		wish.placed = !request->addr;
		wish.alone = !(request->flags & MSHARE_DONATE);
		wish.zeros = !(request->flags & (MSHARE_EMPTY | MSHARE_DONATE));
		wish.length = request->size;
	}
	return attach_region(request->identity ? "" : request->name, request->addr,
			     wish.placed ? 0 : request->size, request->oflags, request->mode, kind,
			     &wish, NULL, region);
}

/* The last one's part is given up: whether the region is to be detached.  The lock is held. */
static bool let_go(struct attachment *attachment)
{
	if (!attachment || attachment->holders == 0 || --attachment->holders > 0 ||
	    attachment->plain)
		return false;
	attachment_end(attachment);
	return true;
}

MSHARE_EXPORT int mshare_close(struct mshare_region *region)
{
	struct attachment *attachment = NULL;
	bool last;

	reason_forget();
	if (!region) {
		errno = EFAULT;
		return -1;
	}
	attachment_lock();
	if (region->held)
		attachment = attachment_of(region->identity);
	region->held = 0;
	last = let_go(attachment);
	attachment_unlock();
	return last ? detach_region(attachment, MSHARE_WIRE_DETACH) : 0;
}

/* This process has it, and knows that it is gone: no daemon is asked, or waited for. */
static bool is_known_gone(const struct mshare_region *region)
{
	struct attachment *attachment;
	bool gone;

	attachment_lock();
	attachment = attachment_of(region->identity);
	gone = attachment && attachment_was_purged(attachment);
	attachment_unlock();
	return gone;
}

MSHARE_EXPORT int mshare_forget_name(const struct mshare_region *region)
{
	struct waiting waiting = { 0 };
	struct root root;
	bool found;
	int result;

	reason_forget();
	if (!region) {
		errno = EFAULT;
		return -1;
	}
	if (is_known_gone(region)) {
		errno = ESTALE;
		return -1;
	}
	do {
		result = root_use_again(region->root, &root);
		found = result == 0;
		if (found) {
			result = name_unlink_identity(root.fd, region->identity);
			if (result < 0)
				name_say_whose(errno);
			root_close(&root);
		}
		/* (There was a mount: between two daemons it is not there for a moment.) */
	} while (result < 0 && (daemon_is_gone(errno) || (!found && errno == ENOENT)) &&
		 wait_again(&waiting));
	if (result < 0 && found && errno == ENOENT)
		errno = ESTALE;
	return result;
}
