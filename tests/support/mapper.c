/*
 * A program that nobody will change: maps large shared memory in each way that there is, and
 * prints a line each: what it is, the address modulo 2 MiB, whether it can be used to its end.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <sys/wait.h>
#include <unistd.h>

#define HUGE ((uintptr_t)2 << 20)

static void tell(const char *what, char *at, size_t size, size_t offset)
{
	int status;

	if (at == MAP_FAILED) {
		printf("%s failed: %s\n", what, strerror(errno));
		return;
	}
	at[0] = at[size - 1] = 1;
	if (fork() == 0) {
		at[size / 2] = 7;
		_exit(at[0] + at[size - 1]);
	}
	wait(&status);
	printf("%s %#lx %s\n", what, (unsigned long)(((uintptr_t)at - offset) % HUGE),
	       status == 2 << 8 && at[size / 2] == 7 ? "shared" : "BROKEN");
}

int main(void)
{
	size_t size = ((size_t)80 << 20) + 4096 * 3;
	int both = PROT_READ | PROT_WRITE, id, fd;
	char *at;

	/* So that nothing is aligned by chance. */
	mmap(NULL, 4096 * 5, both, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	at = mmap(NULL, size, both, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	tell("anonymous", at, size, 0);
	if (mprotect(at, size, PROT_READ) || at[0] != 1 || mprotect(at, size, both))
		printf("mprotect: %s\n", strerror(errno));
	if (munmap(at, size))
		printf("munmap: %s\n", strerror(errno));
	mmap(NULL, 4096 * 5, both, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	fd = open("/dev/zero", O_RDWR);
	tell("zero", mmap(NULL, size, both, MAP_SHARED, fd, 0), size, 0);
	fd = memfd_create("mapper", 0);
	if (ftruncate(fd, (off_t)size + 8192))
		return 1;
	tell("memfd", mmap(NULL, size, both, MAP_SHARED, fd, 0), size, 0);
	tell("offset", mmap(NULL, size, both, MAP_SHARED, fd, 8192), size, 8192);
	tell("validate", mmap(NULL, size, both, MAP_SHARED_VALIDATE, fd, 0), size, 0);
	id = shmget(IPC_PRIVATE, size, 0600);
	at = shmat(id, NULL, 0);
	shmctl(id, IPC_RMID, NULL);
	tell("sysv", at, size, 0);
	if (shmdt(at))
		printf("shmdt: %s\n", strerror(errno));
	/* These are the program's own decision. */
	at = mmap((void *)((uintptr_t)5 << 40 | 4096), size, both, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	tell("hint", at, size, 0);
	at = mmap(NULL, size, both, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	printf("private %s\n", at == MAP_FAILED ? "failed" : "ok");
	at = mmap(NULL, 1 << 20, both, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	printf("small %s\n", at == MAP_FAILED ? "failed" : "ok");
	if (mmap(NULL, SIZE_MAX - 4096, both, MAP_SHARED | MAP_ANONYMOUS, -1, 0) != MAP_FAILED)
		printf("endless memory\n");
	printf("errno %s\n", strerror(errno));
	setrlimit(RLIMIT_AS, &(struct rlimit){ (size_t)1 << 30, (size_t)1 << 30 });
	at = mmap(NULL, size, both, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	printf("limited %s\n", at == MAP_FAILED ? "failed" : "ok");
	return 0;
}
