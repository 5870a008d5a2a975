/* SPDX-License-Identifier: MIT */
/*
 * The regions that this process has attached, and the calls of mshare.h.
 *
 * Synchronization: one lock is held through every call.  fork() takes it, so the
 * child finds the list whole; the child's handler attaches each region again, as
 * a sharer of its own, with system calls only.
 */
#include "internal.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct attachment *attachments;
/* [lowest, highest) has every attachment: calls outside of it cost two comparisons. */
static atomic_uintptr_t lowest = UINTPTR_MAX, highest;
static pthread_once_t handlers_once = PTHREAD_ONCE_INIT;

void attachment_lock(void)
{
	pthread_mutex_lock(&lock);
}

void attachment_unlock(void)
{
	pthread_mutex_unlock(&lock);
}

struct attachment *attachment_at(const char *address)
{
	for (struct attachment *each = attachments; each; each = each->next) {
		if (address >= each->start && address < each->start + each->size)
			return each;
	}
	return NULL;
}

char *attachment_above(const char *address)
{
	char *found = NULL;

	for (struct attachment *each = attachments; each; each = each->next) {
		if (each->start > address && (!found || each->start < found))
			found = each->start;
	}
	return found;
}

static void update_bounds(void)
{
	uintptr_t low = UINTPTR_MAX, high = 0;

	for (struct attachment *each = attachments; each; each = each->next) {
		uintptr_t start = (uintptr_t)each->start;

		low = start < low ? start : low;
		high = start + each->size > high ? start + each->size : high;
	}
	atomic_store(&lowest, low);
	atomic_store(&highest, high);
}

MSHARE_EXPORT int mshare_near(const void *addr, size_t length)
{
	uintptr_t at = (uintptr_t)addr;

	return at < atomic_load(&highest) && at + length > atomic_load(&lowest);
}

static void close_keeping_errno(int fd)
{
	int saved = errno;

	if (fd >= 0)
		close(fd);
	errno = saved;
}

static void drop_connection(struct attachment *attachment)
{
	close_keeping_errno(attachment->connection);
	close_keeping_errno(attachment->uffd);
	attachment->connection = attachment->uffd = -1;
}

static void drop_descriptors(struct attachment *attachment)
{
	drop_connection(attachment);
	close_keeping_errno(attachment->backing);
	attachment->backing = -1;
}

/* ---- fork ---- */

static void before_fork(void)
{
	pthread_mutex_lock(&lock);
}

static void after_fork_in_parent(void)
{
	pthread_mutex_unlock(&lock);
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
	int fds[2], backing;

	drop_connection(attachment);
	attachment->waiting = (struct waiting){ 0 };
	if (window_reserve(attachment->start, attachment->size) != 0)
		return;
	for (;;) {
		attachment->connection = connection_open(attachment->root);
		if (attachment->connection >= 0)
			attachment->uffd = uffd_open(attachment->connection);
		fds[0] = attachment->backing;
		fds[1] = attachment->uffd;
		request.userfaultfd = (uint32_t)attachment->uffd;
		if (attachment->uffd >= 0 &&
		    connection_call(attachment->connection, &request, NULL, fds, 2, &reply,
				    &backing) == 0)
			break;
		if (!daemon_is_gone(errno) && errno != ENOENT)
			return drop_connection(attachment);
		drop_connection(attachment);
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

	for (struct attachment *each = attachments; each; each = each->next)
		attach_again(each);
	pthread_mutex_unlock(&lock);
	errno = saved;
}

static void install_handlers(void)
{
	pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

/* ---- names ---- */

static int check_name(const char *name)
{
	if (!name) {
		errno = EFAULT;
		return -1;
	}
	if (*name == '\0')
		errno = ENOENT;
	else if (strchr(name, '/'))
		errno = EINVAL;
	else if (strlen(name) > NAME_MAX)
		errno = ENAMETOOLONG;
	else if (*name == '.' || strcmp(name, "mshare_info") == 0)
		errno = EPERM;
	else
		return 0;
	return -1;
}

/*
 * O_CREAT without O_EXCL is never passed on: in a sticky directory the kernel
 * refuses it for another user's file (fs.protected_regular, proc_sys_fs(5)), but
 * an existing region is to be attached.
 *
 * repeated: if there is one, O_EXCL or not, this process may have made it itself
 * just before a daemon died; the daemon judges.
 */
static int open_region(const char *path, int oflags, mode_t mode, bool repeated, bool *made)
{
	int access = (oflags & O_ACCMODE) | O_CLOEXEC;
	int fd;

	*made = false;
	for (int tries = 0; tries < 100; tries++) {
		if (!(oflags & O_EXCL)) {
			fd = open(path, access);
			if (fd >= 0 || errno != ENOENT || !(oflags & O_CREAT))
				return fd;
		}
		fd = open(path, access | O_CREAT | O_EXCL, mode);
		*made = fd >= 0;
		if (fd < 0 && errno == EEXIST && (oflags & O_EXCL) && repeated)
			fd = open(path, access);
		if (fd >= 0 || errno != EEXIST || (oflags & O_EXCL))
			return fd;
	}
	errno = EAGAIN; /* somebody creates and removes it all the time */
	return -1;
}

/* ---- attach ---- */

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
 * comes later is undone.
 *
 * An attachment without a size takes the region where it lies, which the reply says.
 */
static int attach(struct attachment *attachment, int oflags, mode_t mode, uint32_t kind)
{
	struct mshare_wire_request request = {
		.op = MSHARE_WIRE_ATTACH,
		.start = (uintptr_t)attachment->start,
		.size = attachment->size,
		.oflags = (uint32_t)oflags,
		.backing = kind,
	};
	struct mshare_wire_reply reply;
	char path[PATH_MAX];
	int region = -1, mapped = -1, result, saved, fds[2];
	bool made = false, building = false, complete = false;
	bool as_it_lies = attachment->size == 0;

	if (root_join(attachment->root, attachment->name, path) < 0)
		return -1;
	if (attachment->size == 0) {
		request.flags = MSHARE_WIRE_AS_IT_LIES;
	} else {
		mapped = window_reserve(attachment->start, attachment->size);
		if (mapped < 0)
			return -1;
		if (mapped)
			request.flags = MSHARE_WIRE_HAS_MAPPINGS;
	}
	attachment->connection = connection_open(attachment->root);
	if (attachment->connection < 0)
		goto fail;
	attachment->uffd = uffd_open(attachment->connection);
	if (attachment->uffd < 0)
		goto fail;
	region = open_region(path, oflags, mode, attachment->repeated, &made);
	if (region < 0) {
		saved = errno;
		/* The mount may be gone: that is no word about the region. */
		if (saved == ENOENT && connection_noted(attachment->connection) == CONNECTION_LOST)
			saved = ENOTCONN;
		errno = saved;
		attachment->repeated |= daemon_is_gone(errno);
		goto fail;
	}
	if (made)
		request.flags |= MSHARE_WIRE_MADE_FILE;
	if (attachment->repeated)
		request.flags |= MSHARE_WIRE_REPEATED;
	request.userfaultfd = (uint32_t)attachment->uffd;
	fds[0] = region;
	fds[1] = attachment->uffd;
	result = connection_call(attachment->connection, &request, NULL, fds, 2, &reply,
				 &attachment->backing);
	close_keeping_errno(region);
	attachment->repeated |= result == CONNECTION_LOST;
	if (result < 0)
		goto fail;
	building = reply.flags & MSHARE_WIRE_DONATE;
	complete = !building && (reply.flags & MSHARE_WIRE_CREATED);
	if (attachment->backing < 0) {
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
	return 0;
fail:
	saved = errno;
	if (mapped == 0)
		raw_munmap(attachment->start, attachment->size);
	if (complete && made)
		unmake(attachment->connection, MSHARE_WIRE_UNLINK);
	else if (building)
		unmake(attachment->connection, MSHARE_WIRE_DETACH);
	drop_descriptors(attachment);
	if (as_it_lies) {
		attachment->start = NULL;
		attachment->size = 0;
	}
	errno = saved;
	return -1;
}

/*
 * root_find() for a call that may wait: between two daemons the mount is not there for
 * a moment, and only who knows that there was one can tell that from no msharefs at all.
 */
static int find_root(char root[PATH_MAX], const struct waiting *waiting)
{
	bool gone = waiting->pause != 0;

	if (root_find(root) == 0)
		return 0;
	if (errno != ENOENT)
		return -1;
	for (struct attachment *each = attachments; each && !gone; each = each->next)
		gone = root_check(each->root) < 0;
	errno = gone ? ENOTCONN : ENOENT;
	return -1;
}

static int try_add(struct attachment *attachment, int oflags, mode_t mode, uint32_t kind)
{
	if (find_root(attachment->root, &attachment->waiting) < 0)
		return -1;
	if (oflags & O_CREAT) {
		size_t alignment = root_alignment(attachment->root);

		if (alignment == 0)
			return -1;
		if (((uintptr_t)attachment->start | attachment->size) & (alignment - 1)) {
			errno = EINVAL;
			return -1;
		}
	}
	return attach(attachment, oflags, mode, kind);
}

static struct attachment **find(const char *name)
{
	struct attachment **link = &attachments;

	while (*link && strcmp((*link)->name, name) != 0)
		link = &(*link)->next;
	return link;
}

/* Takes the lock.  On success *info, if it is given, tells where the region lies. */
static int add(const char *name, char *start, size_t size, int oflags, mode_t mode, uint32_t kind,
	       struct mshare_info *info)
{
	struct attachment *attachment = calloc(1, sizeof *attachment);
	int result;

	if (!attachment)
		return -1;
	pthread_mutex_lock(&lock);
	strcpy(attachment->name, name);
	attachment->start = start;
	attachment->size = size;
	attachment->writable = (oflags & O_ACCMODE) == O_RDWR;
	attachment->connection = attachment->uffd = attachment->backing = -1;
	do
		result = try_add(attachment, oflags, mode, kind);
	while (result < 0 && daemon_is_gone(errno) && wait_again(&attachment->waiting));
	if (result < 0) {
		int saved = errno;

		free(attachment);
		errno = saved;
	} else {
		pthread_once(&handlers_once, install_handlers);
		attachment->next = attachments;
		attachments = attachment;
		update_bounds();
		if (info)
			*info = (struct mshare_info){ (uintptr_t)attachment->start, attachment->size };
	}
	pthread_mutex_unlock(&lock);
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

	if (check_name(name) < 0)
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
	if (check_name(name) < 0)
		return -1;
	if (!known_flags(oflags, 0)) {
		errno = EINVAL;
		return -1;
	}
	return add(name, NULL, 0, oflags, 0, MSHARE_WIRE_BACKING_DEFAULT, info);
}

/* ---- detach ---- */

/*
 * The window goes first: from then on no thread of this process can wait for a
 * page, and the daemon may forget us.
 */
static int detach(struct attachment **link, uint16_t op)
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
	*link = attachment->next;
	update_bounds();
	drop_descriptors(attachment);
	free(attachment);
	return result;
}

MSHARE_EXPORT int mshare_detach(const char *name)
{
	struct attachment **link;
	int result;

	if (check_name(name) < 0)
		return -1;
	pthread_mutex_lock(&lock);
	link = find(name);
	if (*link) {
		result = detach(link, MSHARE_WIRE_DETACH);
	} else {
		errno = ENOENT;
		result = -1;
	}
	pthread_mutex_unlock(&lock);
	return result;
}

static int unlink_name(const char *name)
{
	struct waiting waiting = { 0 };
	char root[PATH_MAX], path[PATH_MAX];
	bool asked = false;

	do {
		if (find_root(root, &waiting) == 0) {
			if (root_join(root, name, path) < 0)
				return -1;
			if (unlink(path) == 0 || (errno == ENOENT && asked))
				return 0;
			asked |= errno == ECONNABORTED; /* it was under way */
		}
	} while (daemon_is_gone(errno) && wait_again(&waiting));
	return -1;
}

MSHARE_EXPORT int mshare_unlink(const char *name)
{
	struct attachment **link;
	int result;

	if (check_name(name) < 0)
		return -1;
	pthread_mutex_lock(&lock);
	link = find(name);
	result = *link ? detach(link, MSHARE_WIRE_UNLINK) : unlink_name(name);
	pthread_mutex_unlock(&lock);
	return result;
}

/* ---- stat, root ---- */

static int read_info(const char *name, struct mshare_info *info, const struct waiting *waiting)
{
	char root[PATH_MAX], path[PATH_MAX];
	ssize_t got;
	int fd;

	if (find_root(root, waiting) < 0 || root_join(root, name, path) < 0)
		return -1;
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	got = read(fd, info, sizeof *info);
	close_keeping_errno(fd);
	if (got < 0)
		return -1;
	if (got != sizeof *info || info->size == 0) {
		errno = got == sizeof *info ? ENOENT : EPROTO;
		return -1;
	}
	return 0;
}

MSHARE_EXPORT int mshare_stat(const char *name, struct mshare_info *info)
{
	struct waiting waiting = { 0 };
	int result;

	if (check_name(name) < 0)
		return -1;
	if (!info) {
		errno = EFAULT;
		return -1;
	}
	pthread_mutex_lock(&lock);
	do
		result = read_info(name, info, &waiting);
	while (result < 0 && daemon_is_gone(errno) && wait_again(&waiting));
	pthread_mutex_unlock(&lock);
	return result;
}

MSHARE_EXPORT int mshare_root(char *path, size_t size)
{
	char root[PATH_MAX];
	size_t length;

	if (!path) {
		errno = EFAULT;
		return -1;
	}
	if (root_find(root) < 0)
		return -1;
	length = strlen(root);
	if (length >= size) {
		errno = ERANGE;
		return -1;
	}
	memcpy(path, root, length + 1);
	return 0;
}
