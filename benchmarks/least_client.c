/* SPDX-License-Identifier: MIT */
/*
 * The least that a process can do to have memory of least_daemon.py, and how long that takes.
 *
 *     least_client MOUNTPOINT SOCKET
 *
 * Its input and output are those of paths_worker.py: a command on each line, and nanoseconds.
 *
 *     make NAME SIZE          memory that stays
 *     attach NAME COUNT
 *     create SIZE COUNT       and unlink, and close
 *
 * The name's file is opened, which the kernel judges; one message takes that and a new
 * userfaultfd to the daemon, which has it then for every page fault; the memory's descriptor
 * comes back, is mapped, and the mapping is registered.
 */
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

struct memory {
	int connection, uffd;
	void *start;
	size_t size;
};

static struct sockaddr_un control = { .sun_family = AF_UNIX };
static int root;

static void check(long result, const char *what)
{
	if (result >= 0)
		return;
	perror(what);
	exit(1);
}

static long long now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000LL + time.tv_nsec;
}

/* Send the file and the userfaultfd; the memory's descriptor, and its size. */
static int ask(int connection, int file, int uffd, uint64_t *size)
{
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(2 * sizeof(int))];
	} rights = { .space = { 0 } };
	struct iovec part = { size, sizeof *size };
	struct msghdr message = {
		.msg_iov = &part,
		.msg_iovlen = 1,
		.msg_control = &rights,
		.msg_controllen = sizeof rights,
	};
	int fds[2] = { file, uffd }, memory;

	rights.header.cmsg_level = SOL_SOCKET;
	rights.header.cmsg_type = SCM_RIGHTS;
	rights.header.cmsg_len = CMSG_LEN(sizeof fds);
	memcpy(CMSG_DATA(&rights.header), fds, sizeof fds);
	check(sendmsg(connection, &message, MSG_NOSIGNAL), "sendmsg");
	message.msg_controllen = sizeof rights;
	if (recvmsg(connection, &message, MSG_CMSG_CLOEXEC) != sizeof *size) {
		fputs("least_client: the daemon has hung up\n", stderr);
		exit(1);
	}
	memcpy(&memory, CMSG_DATA(&rights.header), sizeof memory);
	return memory;
}

/* flags: O_CREAT and O_EXCL, and then the size counts. */
static struct memory have(const char *name, int flags, uint64_t size)
{
	struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_MISSING_SHMEM };
	struct uffdio_register range = { .mode = UFFDIO_REGISTER_MODE_MISSING };
	int file = openat(root, name, O_RDWR | O_CLOEXEC | flags, 0600), backing;
	struct memory memory;

	check(file, name);
	memory.connection = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	check(connect(memory.connection, (struct sockaddr *)&control, sizeof control), "connect");
	memory.uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	check(memory.uffd, "userfaultfd");
	check(ioctl(memory.uffd, UFFDIO_API, &api), "UFFDIO_API");
	backing = ask(memory.connection, file, memory.uffd, &size);
	close(file);
	memory.size = size;
	memory.start = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, backing, 0);
	check(memory.start == MAP_FAILED ? -1 : 0, "mmap");
	close(backing);
	range.range = (struct uffdio_range){ (uintptr_t)memory.start, size };
	check(ioctl(memory.uffd, UFFDIO_REGISTER, &range), "UFFDIO_REGISTER");
	return memory;
}

/* The end of the connection says so, and nobody waits for the daemon to see that. */
static void leave(const struct memory *memory)
{
	munmap(memory->start, memory->size);
	close(memory->uffd);
	close(memory->connection);
}

static void attach(const char *name, int count)
{
	for (int i = 0; i < count; i++) {
		long long since = now();
		struct memory memory = have(name, 0, 0);

		printf(i ? ", %lld" : "%lld", now() - since);
		leave(&memory);
	}
}

static void create(uint64_t size, int count)
{
	for (int i = 0; i < count; i++) {
		char name[64];
		long long since = now();
		struct memory memory;

		snprintf(name, sizeof name, "least-%d-%d", (int)getpid(), i);
		memory = have(name, O_CREAT | O_EXCL, size);
		check(unlinkat(root, name, 0), "unlinkat");
		leave(&memory);
		printf(i ? ", %lld" : "%lld", now() - since);
	}
}

int main(int argc, char **argv)
{
	char command[16], first[256];
	unsigned long long second;
	struct memory memory;

	if (argc != 3 || strlen(argv[2]) >= sizeof control.sun_path)
		return 2;
	root = open(argv[1], O_PATH | O_DIRECTORY | O_CLOEXEC);
	check(root, argv[1]);
	strcpy(control.sun_path, argv[2]);
	while (scanf("%15s %255s %llu", command, first, &second) == 3) {
		putchar('[');
		if (strcmp(command, "make") == 0) {
			memory = have(first, O_CREAT | O_EXCL, second);
			leave(&memory);
		} else if (strcmp(command, "attach") == 0) {
			attach(first, (int)second);
		} else {
			create(strtoull(first, NULL, 10), (int)second);
		}
		puts("]");
		fflush(stdout);
	}
	return 0;
}
