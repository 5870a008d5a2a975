/* SPDX-License-Identifier: MIT */
/*
 * A sharer that works without a pause and notices every lost, torn or empty byte:
 * witness START PAGES RANK COUNT FILE SEED ALIGNMENT.
 *
 * PAGES pages from START on are everybody's: page i is written by the witness of rank
 * i % COUNT and read by all.  A page holds its version and words that follow from it; a
 * version that is odd is being written.  A writer knows what it wrote last.  Behind that
 * each has pages of its own, where it maps, protects and unmaps, and pages of its FILE.
 * Every call must succeed.
 *
 * Prints "ready", and at SIGTERM "ok" and what it did; or what is wrong, and ends.
 */
#include <errno.h>
#include <fcntl.h>
#include <mshare.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096ul
#define WORDS (PAGE / sizeof(uint64_t))
#define OWN 32ul   /* pages of anonymous memory */
#define FILED 16ul /* pages of the file */

static volatile sig_atomic_t stop;
static sigjmp_buf landing;
static volatile sig_atomic_t expecting;
static unsigned long done[8];

static void on_stop(int number)
{
	(void)number;
	stop = 1;
}

static void on_fault(int number)
{
	if (!expecting) {
		static const char text[] = "an unexpected signal\n";

		(void)!write(1, text, sizeof text - 1);
		_exit(3);
	}
	siglongjmp(landing, number);
}

#define FAIL(...) (printf(__VA_ARGS__), printf("\n"), fflush(stdout), _exit(1))
#define OK(call)                                                                                   \
	do {                                                                                       \
		if ((call) < 0)                                                                    \
			FAIL("%s: %s", #call, strerror(errno));                                    \
	} while (0)

static uint64_t word(uint64_t page, uint64_t version, uint64_t i)
{
	return (version << 24 ^ page << 12 ^ i) * 0x9e3779b97f4a7c15ul | 1;
}

static void write_page(volatile uint64_t *page, uint64_t number, uint64_t version)
{
	__atomic_store_n(page, version - 1, __ATOMIC_SEQ_CST); /* odd */
	for (uint64_t i = 1; i < WORDS; i++)
		page[i] = word(number, version, i);
	__atomic_store_n(page, version, __ATOMIC_SEQ_CST);
}

/* The page's version, or 0 if it was written to meanwhile. */
static uint64_t read_page(const volatile uint64_t *page, uint64_t number)
{
	uint64_t version = __atomic_load_n(page, __ATOMIC_SEQ_CST), wrong = 0;

	if (version & 1)
		return 0;
	for (uint64_t i = 1; i < WORDS && !wrong; i++) {
		if (page[i] != (version ? word(number, version, i) : 0))
			wrong = i;
	}
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (__atomic_load_n(page, __ATOMIC_SEQ_CST) != version)
		return 0;
	if (wrong)
		FAIL("page %lu of version %lu: word %lu is torn", number, version, wrong);
	return version;
}

static char *start;
static unsigned long pages, rank, count;
static uint64_t *written; /* versions: of my pages the last, of others' the last seen */

static volatile uint64_t *common(unsigned long number)
{
	return (volatile uint64_t *)(start + number * PAGE);
}

static void check_common(unsigned long number)
{
	uint64_t first = __atomic_load_n(common(number), __ATOMIC_SEQ_CST);
	uint64_t found = read_page(common(number), number);

	if (first == 0 && written[number])
		FAIL("page %lu was %lu and is empty", number, written[number]);
	if (number % count == rank && found != written[number])
		FAIL("my page %lu has version %lu, I wrote %lu", number, found, written[number]);
	if (found && found < written[number])
		FAIL("page %lu went back from %lu to %lu", number, written[number], found);
	if (found)
		written[number] = found;
	done[0]++;
}

static void write_common(unsigned long number)
{
	number -= number % count;
	number += rank;
	if (number >= pages)
		return;
	check_common(number);
	written[number] += 2;
	write_page(common(number), number, written[number]);
	done[1]++;
}

static int touches(volatile char *at, int write)
{
	int number = sigsetjmp(landing, 1);

	expecting = 1;
	if (number == 0) {
		if (write)
			*at = 1;
		else
			(void)*at;
	}
	expecting = 0;
	return number;
}

/* A life of some memory of my own, in which every step tells whether the last one held. */
static void live(char *at, unsigned seed)
{
	uint64_t version = 2 + 2 * (uint64_t)(seed % 1000);
	size_t length = OWN * PAGE;

	if (mmap(at, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE,
		 -1, 0) != at)
		FAIL("mmap into a hole: %s", strerror(errno));
	for (unsigned long i = 0; i < OWN; i++) {
		if (read_page((uint64_t *)(at + i * PAGE), i) != 0 || *(uint64_t *)(at + i * PAGE))
			FAIL("fresh memory is not empty");
		write_page((uint64_t *)(at + i * PAGE), i, version);
	}
	switch (seed % 4) {
	case 0:
		OK(mprotect(at, length, PROT_NONE));
		if (touches(at + PAGE, 0) != SIGSEGV)
			FAIL("PROT_NONE can be read");
		OK(mprotect(at, length, PROT_READ | PROT_WRITE));
		break;
	case 1:
		OK(mprotect(at, length, PROT_READ));
		if (touches(at, 1) != SIGSEGV)
			FAIL("PROT_READ can be written");
		OK(mprotect(at, length, PROT_READ | PROT_WRITE));
		break;
	case 2:
		if (mmap(at, length / 2, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != at)
			FAIL("mmap over memory: %s", strerror(errno));
		for (unsigned long i = 0; i < OWN / 2; i++) {
			if (*(uint64_t *)(at + i * PAGE))
				FAIL("memory that was replaced shows through");
			write_page((uint64_t *)(at + i * PAGE), i, version);
		}
		break;
	default:
		break;
	}
	for (unsigned long i = 0; i < OWN; i++) {
		if (read_page((uint64_t *)(at + i * PAGE), i) != version)
			FAIL("my own page %lu is not as I left it", i);
	}
	OK(munmap(at, length));
	if (touches(at + seed % OWN * PAGE, 0) != SIGBUS)
		FAIL("a hole can be read");
	done[2]++;
}

static void live_in_file(char *at, const char *path, unsigned seed)
{
	uint64_t version = 2 + 2 * (uint64_t)(seed % 100000), content[WORDS];
	size_t length = FILED * PAGE;
	int fd = open(path, O_RDWR | O_CLOEXEC);

	OK(fd);
	if (mmap(at, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE, fd, 0) != at)
		FAIL("mmap of a file: %s", strerror(errno));
	for (unsigned long i = 0; i < FILED; i++) {
		if (pread(fd, content, PAGE, (off_t)(i * PAGE)) != (ssize_t)PAGE)
			FAIL("the file is short");
		if (memcmp(content, at + i * PAGE, PAGE) != 0)
			FAIL("page %lu is not the file's", i);
	}
	for (unsigned long i = seed % 3; i < FILED; i += 3)
		write_page((uint64_t *)(at + i * PAGE), i, version);
	if (seed % 2)
		OK(msync(at, length, MS_SYNC));
	else
		OK(munmap(at, length));
	for (unsigned long i = seed % 3; i < FILED; i += 3) {
		if (pread(fd, content, PAGE, (off_t)(i * PAGE)) != (ssize_t)PAGE)
			FAIL("the file is short");
		if (read_page(content, i) != version)
			FAIL("page %lu did not come to the file", i);
	}
	if (seed % 2)
		OK(munmap(at, length));
	close(fd);
	done[3]++;
}

/* A region of my own, made, seen, forked into and removed. */
static void live_in_region(char *at, size_t size)
{
	struct mshare_info info;
	char name[32];
	int status;

	snprintf(name, sizeof name, "own%lu", rank);
	OK(mshare(name, at, size, O_CREAT | O_EXCL | O_RDWR, 0600));
	OK(mshare_stat(name, &info));
	if (info.start != (unsigned long)at || info.size != size)
		FAIL("the region lies elsewhere");
	if (mmap(at, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1,
		 0) != at)
		FAIL("mmap in a region of my own: %s", strerror(errno));
	*(volatile char *)at = 7;
	fflush(stdout);
	pid_t child = fork();

	if (child == 0)
		_exit(*(volatile char *)at == 7 ? 0 : 1);
	OK(child);
	waitpid(child, &status, 0);
	if (status)
		FAIL("the child ended with %#x", status);
	OK(mshare_unlink(name));
	if (mshare_stat(name, &info) == 0)
		FAIL("the region is still there");
	done[4]++;
}

static void *own(unsigned long behind)
{
	return start + (pages + rank * (OWN + FILED) + behind) * PAGE;
}

int main(int argc, char **argv)
{
	size_t region = argc > 7 ? strtoul(argv[7], NULL, 0) : 0, size;
	struct sigaction faults = { .sa_handler = on_fault, .sa_flags = SA_NODEFER };

	if (argc != 8)
		return 2;
	start = (char *)strtoul(argv[1], NULL, 0);
	pages = strtoul(argv[2], NULL, 0);
	rank = strtoul(argv[3], NULL, 0);
	count = strtoul(argv[4], NULL, 0);
	srand((unsigned)atoi(argv[6]));
	size = 4 * region;
	signal(SIGTERM, on_stop);
	sigaction(SIGBUS, &faults, NULL);
	sigaction(SIGSEGV, &faults, NULL);
	written = calloc(pages, sizeof *written);
	if (rank == 0) {
		OK(mshare("witnessed", start, size, O_CREAT | O_EXCL | O_RDWR, 0600));
		if (mmap(start, pages * PAGE, PROT_READ | PROT_WRITE,
			 MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) != start)
			FAIL("mmap: %s", strerror(errno));
	} else {
		OK(mshare("witnessed", start, size, O_RDWR, 0));
	}
	printf("ready\n");
	fflush(stdout);
	while (!stop) {
		int dice = rand() % 100;

		if (dice < 50)
			write_common((unsigned long)rand() % pages);
		else if (dice < 90)
			check_common((unsigned long)rand() % pages);
		else if (dice < 94)
			live(own(0), (unsigned)rand());
		else if (dice < 98)
			live_in_file(own(OWN), argv[5], (unsigned)rand());
		else
			live_in_region(start + size + (rank + 1) * region, region);
	}
	for (unsigned long i = 0; i < pages; i++)
		check_common(i);
	printf("ok: read %lu, written %lu, memory %lu, file %lu, regions %lu\n", done[0], done[1],
	       done[2], done[3], done[4]);
	return 0;
}
