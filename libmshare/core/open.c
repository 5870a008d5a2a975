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

MSHARE_EXPORT int mshare_close(struct mshare_region *region)
{
	struct attachment *attachment, **link;
	int result = 0;

	reason_forget();
	if (!region) {
		errno = EFAULT;
		return -1;
	}
	attachment_lock();
	attachment = region->held ? attachment_of(region->identity) : NULL;
	region->held = 0;
	if (attachment && attachment->holders > 0 && --attachment->holders == 0 &&
	    !attachment->plain) {
		link = attachment_link(attachment);
		result = detach_region(link, MSHARE_WIRE_DETACH);
	}
	attachment_unlock();
	return result;
}

MSHARE_EXPORT int mshare_forget_name(const struct mshare_region *region)
{
	struct waiting waiting = { 0 };
	const struct root *root;
	int result;

	reason_forget();
	if (!region) {
		errno = EFAULT;
		return -1;
	}
	attachment_lock();
	do {
		root = root_use_again(region->root);
		result = root ? name_unlink_identity(root->fd, region->identity) : -1;
	} while (result < 0 && daemon_is_gone(errno) && wait_again(&waiting));
	if (result < 0 && root && errno == ENOENT)
		errno = ESTALE;
	attachment_unlock();
	return result;
}
