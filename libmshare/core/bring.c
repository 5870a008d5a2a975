/* SPDX-License-Identifier: MIT */
/*
 * Memory whose contents come later, from who fetches them: for the Python package's images.
 * Who touches it meanwhile waits.  The range lies in one region.
 */
#include "internal.h"

#include <errno.h>
#include <sys/mman.h>

static int call(char *start, uint16_t op, const struct mshare_wire_object *what, int fd,
		struct mshare_wire_reply *reply)
{
	struct mshare_wire_request request = { .op = op, .object_count = 1 };
	struct mshare_wire_object object = *what;
	struct attachment *in;
	int result = -1, ignored;

	reason_forget();
	attachment_lock();
	in = attachment_take(attachment_at(start));
	attachment_unlock();
	if (!in) {
		errno = ENOENT;
		return -1;
	}
	object.offset = (uint64_t)(start - in->start);
	if (attachment_enter(in) == 0) {
		in->waiting = (struct waiting){ 0 };
		result = attachment_call(in, &request, &object, &fd, fd >= 0, reply, &ignored);
		attachment_leave(in);
	}
	attachment_give_back(in);
	return result;
}

MSHARE_EXPORT int mshare_await(void *addr, size_t length, int prot, int flags)
{
	struct mshare_wire_object object = {
		.length = length,
		.prot = (uint32_t)prot,
		.flags = (uint32_t)flags & (MAP_SHARED | MAP_PRIVATE),
	};
	struct mshare_wire_reply reply;

	return call(addr, MSHARE_WIRE_AWAIT, &object, -1, &reply) < 0 ? -1 : 0;
}

MSHARE_EXPORT int mshare_fill(void *addr, size_t length, int fd, uint64_t *wanted)
{
	struct mshare_wire_object object = { .length = length };
	struct mshare_wire_reply reply;

	*wanted = UINT64_MAX;
	if (call(addr, MSHARE_WIRE_FILL, &object, fd, &reply) < 0)
		return -1;
	if (reply.flags & MSHARE_WIRE_WANTED)
		*wanted = reply.start;
	return 0;
}
