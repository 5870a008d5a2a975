/* SPDX-License-Identifier: MIT */
/*
 * Having pages there before they are touched: madvise(MADV_POPULATE_READ, _WRITE).
 *
 * That is the kernel touching pages for us, and most ordinary users have a userfaultfd that
 * serves no faults of the kernel (uffd.c): for them it is EFAULT, however much memory there is.
 * Our own code can touch the pages, but where there is no memory that is SIGBUS.  So a child
 * does it, which has our memory and signal handlers of its own: SIGBUS ends it and nobody else.
 *
 * The caller sleeps until the child has ended (CLONE_VFORK), so that both may use one thread's
 * state, as in posix_spawn(3).  The program sees nothing of the child: its end is no SIGCHLD.
 */
#include "internal.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define STACK ((size_t)64 << 10) /* bytes: of which a signal's frame may take 11 KiB */

struct touch {
	char *at, *end;
	bool write;
};

static void cannot(int signal)
{
	(void)signal;
	_exit(1);
}

static int touch(void *argument)
{
	const struct touch *touch = argument;
	struct sigaction action = { .sa_handler = cannot };
	size_t page = (size_t)sysconf(_SC_PAGESIZE);
	sigset_t faults;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	sigaction(SIGBUS, &action, NULL);
	sigaction(SIGSEGV, &action, NULL);
	sigemptyset(&faults);
	sigaddset(&faults, SIGBUS);
	sigaddset(&faults, SIGSEGV);
	sigprocmask(SIG_UNBLOCK, &faults, NULL);
	for (char *at = touch->at; at < touch->end; at += page) {
		if (touch->write)
			__atomic_fetch_or(at, 0, __ATOMIC_RELAXED);
		else
			__atomic_load_n(at, __ATOMIC_RELAXED);
	}
	_exit(0);
}

static int touch_apart(struct touch *wanted)
{
	sigset_t all, before;
	int child, status = 1;
	char *stack;

	stack = raw_mmap(NULL, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (stack == MAP_FAILED)
		return -1;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	child = clone(touch, stack + STACK, CLONE_VM | CLONE_VFORK | CLONE_FILES | CLONE_FS, wanted);
	if (child > 0)
		waitpid(child, &status, __WCLONE);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	raw_munmap(stack, STACK);
	errno = EFAULT;
	return status == 0 ? 0 : -1;
}

MSHARE_EXPORT int mshare_populate(void *start, size_t length, int advice)
{
	struct touch wanted = {
		.at = start,
		.end = (char *)start + length,
		.write = advice == MADV_POPULATE_WRITE,
	};

	if (raw_madvise(start, length, advice) == 0)
		return 0;
	return errno == EFAULT && uffd_is_for_code_only() ? touch_apart(&wanted) : -1;
}
