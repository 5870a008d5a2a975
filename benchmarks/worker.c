/* SPDX-License-Identifier: MIT */
/*
 * A process that shares memory and takes the time.  Each line of its input is a
 * command, each line of its output the times in nanoseconds; see commands[].
 */
#include "backend.h"

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define PAGE ((size_t)4096)
#define MOST_WORDS 8

static uint64_t now(void)
{
	struct timespec at;

	clock_gettime(CLOCK_MONOTONIC, &at);
	return (uint64_t)at.tv_sec * 1000000000u + (uint64_t)at.tv_nsec;
}

static void need(int result)
{
	if (result < 0) {
		fprintf(stderr, "worker: %s\n", strerror(errno));
		exit(1);
	}
}

static void *pointer(const char *word)
{
	return (void *)(uintptr_t)strtoull(word, NULL, 0);
}

static size_t number(const char *word)
{
	return strtoull(word, NULL, 0);
}

static void tell(uint64_t since)
{
	printf("%llu ", (unsigned long long)(now() - since));
}

/* create NAME START SIZE */
static void create(char **word)
{
	uint64_t since = now();

	need(backend_create(word[1], pointer(word[2]), number(word[3])));
	tell(since);
}

/* attach NAME START SIZE */
static void attach(char **word)
{
	uint64_t since = now();

	need(backend_attach(word[1], pointer(word[2]), number(word[3])));
	tell(since);
}


/* cycle NAME START SIZE COUNT: attach and detach; two times for each */
static void cycle(char **word)
{
	void *start = pointer(word[2]);
	size_t size = number(word[3]);

	for (size_t left = number(word[4]); left > 0; left--) {
		uint64_t since = now(), attached;

		need(backend_attach(word[1], start, size));
		attached = now();
		need(backend_detach(word[1], start, size));
		printf("%llu ", (unsigned long long)(attached - since));
		tell(attached);
	}
}

/* write START SIZE: a byte of every page */
static void write_pages(char **word)
{
	volatile char *page = pointer(word[1]), *end = page + number(word[2]);
	uint64_t since = now();

	for (; page < end; page += PAGE)
		*page = 1;
	tell(since);
}

/* read START SIZE: a byte of every page */
static void read_pages(char **word)
{
	volatile char *page = pointer(word[1]), *end = page + number(word[2]);
	uint64_t since = now();

	for (; page < end; page += PAGE)
		(void)*page;
	tell(since);
}

/* sum START SIZE: read every byte */
static void sum(char **word)
{
	const volatile uint64_t *at = pointer(word[1]);
	const volatile uint64_t *end = at + number(word[2]) / sizeof *at;
	uint64_t since = now();

	for (; at < end; at++)
		(void)*at;
	tell(since);
}

/* map START SIZE: anonymous memory in what is attached, in place of what is there */
static void map(char **word)
{
	int flags = MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED;
	uint64_t since = now();

	need(mmap(pointer(word[1]), number(word[2]), PROT_READ | PROT_WRITE, flags, -1, 0) ==
			     MAP_FAILED ?
		     -1 :
		     0);
	tell(since);
}

/* mapfile START SIZE PROT PATH: MAP_PRIVATE */
static void map_file(char **word)
{
	int fd = open(word[4], O_RDONLY | O_CLOEXEC);
	uint64_t since = now();

	need(fd);
	need(mmap(pointer(word[1]), number(word[2]), (int)number(word[3]), MAP_PRIVATE | MAP_FIXED,
		  fd, 0) == MAP_FAILED ?
		     -1 :
		     0);
	tell(since);
	close(fd);
}

/* unmap START SIZE */
static void unmap(char **word)
{
	uint64_t since = now();

	need(munmap(pointer(word[1]), number(word[2])));
	tell(since);
}

/* protect START SIZE PROT */
static void protect(char **word)
{
	uint64_t since = now();

	need(mprotect(pointer(word[1]), number(word[2]), (int)number(word[3])));
	tell(since);
}

static uint64_t random_state;

static size_t random_below(size_t limit)
{
	random_state ^= random_state << 13;
	random_state ^= random_state >> 7;
	random_state ^= random_state << 17;
	return random_state % limit;
}

/* faults START SIZE CHUNK COUNT SEED: write one random page in each of COUNT random chunks */
static void faults(char **word)
{
	volatile char *start = pointer(word[1]);
	size_t chunk = number(word[3]), chunks = number(word[2]) / chunk, count = number(word[4]);
	size_t *place = calloc(chunks, sizeof *place);

	if (!place || count > chunks) {
		errno = EINVAL;
		need(-1);
	}
	random_state = number(word[5]) | 1;
	for (size_t i = 0; i < chunks; i++)
		place[i] = i * chunk + random_below(chunk / PAGE) * PAGE;
	for (size_t i = 0; i < count; i++) {
		size_t other = i + random_below(chunks - i), chosen = place[other];
		uint64_t since;

		place[other] = place[i];
		since = now();
		start[chosen] = 1;
		tell(since);
	}
	free(place);
}

/* stat PATH COUNT */
static void stat_file(char **word)
{
	struct stat status;

	for (size_t left = number(word[2]); left > 0; left--) {
		uint64_t since = now();

		need(stat(word[1], &status));
		tell(since);
	}
}

/* file PATH COUNT: open, read, close */
static void read_file(char **word)
{
	char content[64];

	for (size_t left = number(word[2]); left > 0; left--) {
		uint64_t since = now();
		int fd = open(word[1], O_RDONLY | O_CLOEXEC);

		need(fd);
		need((int)read(fd, content, sizeof content));
		need(close(fd));
		tell(since);
	}
}

/* warm SIZE: have the machine touch that much memory once, and give it back */
static void warm(char **word)
{
	size_t size = number(word[1]);
	uint64_t since = now();
	char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	need(memory == MAP_FAILED ? -1 : 0);
	for (size_t at = 0; at < size; at += PAGE)
		memory[at] = 1;
	need(munmap(memory, size));
	tell(since);
}

static const struct {
	const char *name;
	int words;
	void (*run)(char **word);
} commands[] = {
	{ "create", 4, create },
	{ "attach", 4, attach },
	{ "cycle", 5, cycle },
	{ "write", 3, write_pages },
	{ "read", 3, read_pages },
	{ "sum", 3, sum },
	{ "map", 3, map },
	{ "mapfile", 5, map_file },
	{ "unmap", 3, unmap },
	{ "protect", 4, protect },
	{ "faults", 6, faults },
	{ "stat", 3, stat_file },
	{ "file", 3, read_file },
	{ "warm", 2, warm },
};

static void obey(char **word, int words)
{
	for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
		if (words == commands[i].words && strcmp(word[0], commands[i].name) == 0) {
			commands[i].run(word);
			printf("\n");
			fflush(stdout);
			return;
		}
	}
	errno = EINVAL;
	need(-1);
}

int main(void)
{
	char *line = NULL;
	size_t capacity = 0;

	while (getline(&line, &capacity, stdin) > 0) {
		char *word[MOST_WORDS], *rest = line;
		int words = 0;

		while (words < MOST_WORDS && (word[words] = strtok_r(rest, " \n", &rest)))
			words++;
		if (words > 0)
			obey(word, words);
	}
	return 0;
}
