/* SPDX-License-Identifier: MIT */
/* userfaultfd(2) for the client core.  Async-signal-safe: system calls only. */
#include "internal.h"

#include <errno.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef USERFAULTFD_IOC_NEW /* headers before 6.1 */
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

/*
 * A descriptor of /dev/userfaultfd, once this process was handed one.  Kept for
 * the life of the process: a child after fork makes its own userfaultfd with it
 * and has no need to ask.  Set under the list's lock.
 */
static struct held device = { .fd = -1 };

/* Set once, by whoever comes first. */
static bool for_code_only;

bool uffd_is_for_code_only(void)
{
	return __atomic_load_n(&for_code_only, __ATOMIC_RELAXED);
}

static bool has_device(int *fd)
{
	bool has;

	attachment_lock();
	has = held_is_ours(&device);
	*fd = device.fd;
	attachment_unlock();
	return has;
}

static void keep_device(int fd)
{
	attachment_lock();
	if (held_is_ours(&device))
		close_keeping_errno(fd);
	else
		held_take(&device, fd);
	attachment_unlock();
}

static int by_system_call(int flags)
{
	long fd = raw_syscall(SYS_userfaultfd, flags, 0, 0, 0, 0, 0);

	if (fd < 0) {
		errno = (int)-fd;
		return -1;
	}
	return (int)fd;
}

static int by_device(int from)
{
	return ioctl(from, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
}

/*
 * In the order of privilege: the system call (root, or
 * vm.unprivileged_userfaultfd=1), the device (its mode), the daemon's device.
 * UFFD_USER_MODE_ONLY would need none of that, but then a read(2) into an absent
 * page fails with EFAULT, so it is the last resort and the daemon must allow it
 * (a daemon of an ordinary user has nothing better to give).
 */
int uffd_open_unaided(void)
{
	int fd, opened;

	if (has_device(&opened))
		return by_device(opened);
	fd = by_system_call(O_CLOEXEC | O_NONBLOCK);
	/* What a container's filter answers (seccomp(2)) may be any of these. */
	if (fd >= 0 || (errno != EPERM && errno != ENOSYS && errno != EACCES))
		return fd;
	opened = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	if (opened < 0)
		return UFFD_ASK;
	fd = by_device(opened);
	keep_device(opened);
	return fd;
}

/*
 * Who may have a full userfaultfd holds up system calls of the kernel at will, so the
 * daemon wants to see first that we may have the region for which we need it.
 */
int uffd_ask(int connection, int proof)
{
	struct mshare_wire_request request = { .op = MSHARE_WIRE_USERFAULTFD };
	struct mshare_wire_reply reply;
	int opened, fd;

	if (connection_call(connection, &request, NULL, &proof, 1, &reply, &opened) < 0)
		return -1;
	if (reply.flags & MSHARE_WIRE_USER_MODE_ONLY) {
		close_keeping_errno(opened);
		__atomic_store_n(&for_code_only, true, __ATOMIC_RELAXED);
		return by_system_call(O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
	}
	if (opened < 0) {
		errno = EMFILE; /* there was no room for it: recvmsg(2) */
		return -1;
	}
	fd = by_device(opened);
	keep_device(opened);
	return fd;
}

int uffd_open(int connection, int proof)
{
	int fd = uffd_open_unaided();

	return fd == UFFD_ASK ? uffd_ask(connection, proof) : fd;
}

int uffd_handshake(int uffd, uint64_t features)
{
	struct uffdio_api api = { .api = UFFD_API, .features = features };

	return ioctl(uffd, UFFDIO_API, &api);
}

int uffd_register(int uffd, void *addr, size_t length, uint64_t mode)
{
	struct uffdio_register request = {
		.range = { (uintptr_t)addr, length },
		.mode = mode,
	};

	return ioctl(uffd, UFFDIO_REGISTER, &request);
}

int uffd_unregister(int uffd, void *addr, size_t length)
{
	struct uffdio_range range = { (uintptr_t)addr, length };

	return ioctl(uffd, UFFDIO_UNREGISTER, &range);
}

int uffd_write_protect(int uffd, void *addr, size_t length)
{
	struct uffdio_writeprotect request = {
		.range = { (uintptr_t)addr, length },
		.mode = UFFDIO_WRITEPROTECT_MODE_WP,
	};

	return ioctl(uffd, UFFDIO_WRITEPROTECT, &request);
}
