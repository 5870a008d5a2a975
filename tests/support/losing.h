/* SPDX-License-Identifier: MIT */
/* How programs lose descriptors without meaning ours.  For client.c. */
#include <sys/syscall.h>

#define FIRST 3
#define END 1024
#define STACK (64 << 10)

static int everything(void *unused)
{
	(void)unused;
	return close_range(FIRST, ~0u, 0);
}

static int cover(int by)
{
	if (by < 0)
		return -1;
	for (int fd = FIRST; fd < 64; fd++) {
		if (fd != by && dup2(by, fd) < 0)
			return -1;
	}
	return 0;
}

/* Those of which /proc/self/fd says so. */
static int close_those(const char *of)
{
	for (int fd = FIRST; fd < END; fd++) {
		char path[64], file[256] = "";

		snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
		if (readlink(path, file, sizeof file - 1) > 0 && strstr(file, of))
			close(fd);
	}
	return 0;
}

static volatile int apart;

/* It has descriptors of its own, and keeps them. */
static void *keep_apart(void *unused)
{
	unshare(CLONE_FILES);
	apart = 1;
	for (;;)
		pause();
	return unused;
}

static int elsewhere(void)
{
	pthread_t thread;

	apart = 0;
	if (pthread_create(&thread, NULL, keep_apart, NULL) != 0)
		return -1;
	while (!apart)
		sched_yield();
	return everything(NULL);
}

/* A child that shares what FLAGS say closes everything, and ends. */
static int by_child(int flags)
{
	static char stack[STACK] __attribute__((aligned(16)));
	pid_t child = clone(everything, stack + STACK, flags | SIGCHLD, NULL);

	return child < 0 || waitpid(child, NULL, 0) < 0 ? -1 : 0;
}

/* A helper that was not careful has copies of everything. */
static int leak(void)
{
	pid_t child;

	for (int fd = FIRST; fd < END; fd++)
		fcntl(fd, F_SETFD, 0);
	child = (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
	if (child == 0) {
		execl("/bin/sleep", "sleep", "600", (char *)NULL);
		_exit(1);
	}
	return everything(NULL);
}

static int helper(int closing)
{
	int status = -1;
	pid_t child = vfork();

	if (child == 0) {
		if (closing)
			everything(NULL);
		execl("/bin/true", "true", (char *)NULL);
		_exit(1);
	}
	waitpid(child, &status, 0);
	return status ? -1 : 0;
}

static int lose(const char *way, void *start, size_t size)
{
	int pair[2];

#define WAY(name) (strcmp(way, name) == 0)
	if (WAY("nothing"))
		return 0;
	if (WAY("close")) {
		for (int fd = FIRST; fd < END; fd++)
			close(fd);
		return 0;
	}
	if (WAY("close_range"))
		return everything(NULL);
	if (WAY("close_range_unshare"))
		return close_range(FIRST, ~0u, CLOSE_RANGE_UNSHARE);
	if (WAY("dup2_file"))
		return cover(open("/dev/null", O_RDWR));
	if (WAY("dup2_socket"))
		return socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair) < 0 ? -1 : cover(pair[0]);
	if (WAY("dup2_userfaultfd"))
		return cover((int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
	if (WAY("socket"))
		return close_those("socket:");
	if (WAY("userfaultfd"))
		return close_those("[userfaultfd]");
	if (WAY("memory"))
		return close_those("/dev/shm/");
	if (WAY("unshare"))
		return unshare(CLONE_FILES) < 0 ? -1 : everything(NULL);
	if (WAY("thread_apart"))
		return elsewhere();
	if (WAY("clone_files"))
		return by_child(CLONE_FILES);
	if (WAY("clone_vm"))
		return by_child(CLONE_VM);
	if (WAY("clone_vm_files"))
		return by_child(CLONE_VM | CLONE_FILES);
	if (WAY("vfork"))
		return helper(1);
	if (WAY("spawn"))
		return helper(0);
	if (WAY("leak"))
		return leak();
	if (WAY("daemon")) {
		if (setgid(65534) < 0 || setuid(65534) < 0)
			return -1;
		return everything(NULL);
	}
	if (WAY("dofork"))
		return (int)syscall(SYS_madvise, start, size, MADV_DOFORK);
	if (WAY("dofork_closed"))
		return syscall(SYS_madvise, start, size, MADV_DOFORK) < 0 ? -1 : everything(NULL);
	errno = ENOSYS;
	return -1;
}
