/* SPDX-License-Identifier: MIT */
/* mshare() and its kin: making a region, or attaching one. */
#include "internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/*
 * mshare() fails after it has begun to make a region, or made it: it goes before the
 * caller can look.  (Hanging up does the same, but later.)
 */
static void unmake(int connection, uint16_t op)
{
	struct mshare_wire_request request = { .op = op };
	struct mshare_wire_reply reply;
	int ignored;

	connection_call(connection, &request, NULL, NULL, 0, &reply, &ignored);
}

/*
 * Everything that can fail without a trace comes before the file is created; what
 * comes later is undone.  If it takes the daemon to have a userfaultfd, that comes later:
 * the file is what gives the right to it.
 *
 * An attachment without a size takes the region where it lies, which the reply says.
 */
static int attach(struct attachment *attachment, int root, int oflags, mode_t mode, uint32_t kind)
{
	struct mshare_wire_request request = {
		.op = MSHARE_WIRE_ATTACH,
		.start = (uintptr_t)attachment->start,
		.size = attachment->size,
		.oflags = (uint32_t)oflags,
		.backing = kind,
	};
	struct mshare_wire_reply reply;
	int region = -1, mapped = -1, backing = -1, result, saved, fds[2] = { -1, -1 };
	bool made = false, building = false, complete = false;
	bool as_it_lies = attachment->size == 0;

	if (attachment->size == 0) {
		request.flags = MSHARE_WIRE_AS_IT_LIES;
	} else {
		mapped = window_reserve(attachment->start, attachment->size);
		if (mapped < 0)
			return -1;
		if (mapped)
			request.flags = MSHARE_WIRE_HAS_MAPPINGS;
	}
	held_take(&attachment->connection, connection_open(root));
	if (attachment->connection.fd < 0)
		goto fail;
	fds[1] = uffd_open_unaided();
	if (fds[1] < 0 && fds[1] != UFFD_ASK)
		goto fail;
	region = name_open(root, attachment->name, oflags, mode, attachment->repeated, &made);
	if (region < 0) {
		saved = errno;
		/* The mount may be gone: that is no word about the region. */
		if (saved == ENOENT && connection_noted(attachment->connection.fd) == CONNECTION_LOST)
			saved = ENOTCONN;
		errno = saved;
		attachment->repeated |= daemon_is_gone(errno);
		goto fail;
	}
	attachment->file = name_number(region);
	if (fds[1] == UFFD_ASK) {
		fds[1] = uffd_ask(attachment->connection.fd, region);
		if (fds[1] < 0) {
			attachment->repeated |= daemon_is_gone(errno);
			goto fail;
		}
	}
	if (made)
		request.flags |= MSHARE_WIRE_MADE_FILE;
	if (attachment->repeated)
		request.flags |= MSHARE_WIRE_REPEATED;
	held_take(&attachment->uffd, fds[1]);
	request.userfaultfd = (uint32_t)fds[1];
	fds[0] = region;
	result = connection_call(attachment->connection.fd, &request, NULL, fds, 2, &reply, &backing);
	held_take(&attachment->backing, backing);
	attachment->repeated |= result == CONNECTION_LOST;
	if (result < 0)
		goto fail;
	close(region);
	region = -1;
	building = reply.flags & MSHARE_WIRE_DONATE;
	complete = !building && (reply.flags & MSHARE_WIRE_CREATED);
	if (backing < 0) {
		errno = EMFILE; /* the kernel drops what there is no room for: recvmsg(2) */
		goto fail;
	}
	if (as_it_lies) {
		mapped = window_reserve((char *)(uintptr_t)reply.start, reply.size);
		if (mapped > 0)
			errno = EINVAL;
		if (mapped != 0)
			goto fail;
		attachment->start = (char *)(uintptr_t)reply.start;
		attachment->size = reply.size;
	}
	if (building) {
		if (donate(attachment, &complete) < 0)
			goto fail;
	}
	if (!building && window_map(attachment, reply.flags) < 0)
		goto fail;
	if ((reply.flags & MSHARE_WIRE_CREATED) && attachment->writable)
		policy_hand_on(attachment->start, attachment->size);
	return 0;
fail:
	saved = errno;
	if (mapped == 0)
		raw_munmap(attachment->start, attachment->size);
	if (complete && made)
		unmake(attachment->connection.fd, MSHARE_WIRE_UNLINK);
	else if (building)
		unmake(attachment->connection.fd, MSHARE_WIRE_DETACH);
	else if (made && region >= 0 && !daemon_is_gone(saved))
		name_unmake(root, attachment->name, region);
	close_keeping_errno(region);
	if (attachment->uffd.fd < 0)
		close_keeping_errno(fds[1]);
	attachment_drop(attachment);
	if (as_it_lies) {
		attachment->start = NULL;
		attachment->size = 0;
	}
	errno = saved;
	return -1;
}

static int check_alignment(const struct attachment *attachment, int root)
{
	size_t alignment = root_alignment(root);

	if (alignment == 0)
		return -1;
	if (!(((uintptr_t)attachment->start | attachment->size) & (alignment - 1)))
		return 0;
	errno = EINVAL;
	return -1;
}

static int try_add(struct attachment *attachment, int oflags, mode_t mode, uint32_t kind)
{
	struct root root;
	int result = -1;

	if (name_root(&attachment->waiting, &root) < 0)
		return -1;
	strcpy(attachment->root, root.path);
	if (!(oflags & O_CREAT) || check_alignment(attachment, root.fd) == 0)
		result = attach(attachment, root.fd, oflags, mode, kind);
	root_close(&root);
	return result;
}

/* On success *info, if it is given, tells where the region lies. */
static int add(const char *name, char *start, size_t size, int oflags, mode_t mode, uint32_t kind,
	       struct mshare_info *info)
{
	struct attachment *attachment = attachment_new(start, size);
	int result;

	if (!attachment)
		return -1;
	strcpy(attachment->name, name);
	attachment->writable = (oflags & O_ACCMODE) == O_RDWR;
	attachment_begin(attachment);
	do
		result = try_add(attachment, oflags, mode, kind);
	while (result < 0 && daemon_is_gone(errno) && wait_again(&attachment->waiting));
	if (result == 0) {
		fork_handle();
		if (info)
			*info = (struct mshare_info){ (uintptr_t)attachment->start, attachment->size };
		attachment_settle(attachment, true);
	} else {
		int saved = errno;

		attachment_settle(attachment, false);
		attachment_free(attachment);
		if (!attachment_any()) /* what fails leaves nothing behind */
			root_forget();
		errno = saved;
	}
	return result;
}

static bool known_flags(int oflags, int more)
{
	int access = oflags & O_ACCMODE;

	return (access == O_RDONLY || access == O_RDWR) &&
	       !(oflags & ~(O_ACCMODE | O_CLOEXEC | more));
}

/* A backing by its name; the empty name stands for the daemon's default. */
static int kind_of(const char *backing, uint32_t *kind)
{
	if (!backing || *backing == '\0')
		*kind = MSHARE_WIRE_BACKING_DEFAULT;
	else if (strcmp(backing, "shm") == 0)
		*kind = MSHARE_WIRE_BACKING_SHM;
	else if (strcmp(backing, "hugetlb") == 0)
		*kind = MSHARE_WIRE_BACKING_HUGETLB;
	else
		return -1;
	return 0;
}

MSHARE_EXPORT int mshare(const char *name, void *addr, size_t length, int oflags, mode_t mode)
{
	return mshare_backed(name, addr, length, oflags, mode, NULL);
}

MSHARE_EXPORT int mshare_backed(const char *name, void *addr, size_t length, int oflags,
				mode_t mode, const char *backing)
{
	uint32_t kind = MSHARE_WIRE_BACKING_DEFAULT;

	if (name_check(name) < 0)
		return -1;
	if ((oflags & O_CREAT) &&
	    kind_of(backing ? backing : secure_getenv("MSHARE_BACKING"), &kind) < 0) {
		errno = EINVAL;
		return -1;
	}
	if (!known_flags(oflags, O_CREAT | O_EXCL) || ((oflags & O_EXCL) && !(oflags & O_CREAT)) ||
	    length == 0 || (uintptr_t)addr + length < (uintptr_t)addr) {
		errno = EINVAL;
		return -1;
	}
	return add(name, addr, length, oflags, mode, kind, NULL);
}

MSHARE_EXPORT int mshare_attach(const char *name, int oflags, struct mshare_info *info)
{
	if (name_check(name) < 0)
		return -1;
	if (!known_flags(oflags, 0)) {
		errno = EINVAL;
		return -1;
	}
	return add(name, NULL, 0, oflags, 0, MSHARE_WIRE_BACKING_DEFAULT, info);
}
