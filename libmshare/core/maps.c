/* SPDX-License-Identifier: MIT */
/*
 * What this process has mapped in a range: /proc/self/maps.
 *
 * Files are opened anew, by the donor and with the donor's rights: the daemon gets a
 * descriptor and no path.
 */
#include "internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

/*
 * The file of a mapping: by its path, if that still leads to it, or by
 * /proc/self/map_files, which takes a privilege.
 */
static int open_mapped(const struct vma *vma, const char *path, unsigned major, unsigned minor,
		       unsigned long inode)
{
	char entry[64];

	snprintf(entry, sizeof entry, "/proc/self/map_files/%lx-%lx", (unsigned long)vma->vma_start,
		 (unsigned long)vma->vma_end);
	for (int tries = 0; tries < 4; tries++) {
		int access = tries & 1 || !vma->shared ? O_RDONLY : O_RDWR;
		int fd = open(tries & 2 ? entry : path, access | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
		struct stat status;

		if (fd < 0)
			continue;
		if (fstat(fd, &status) == 0 && S_ISREG(status.st_mode) &&
		    (tries & 2 || (status.st_ino == inode && major(status.st_dev) == major &&
				   minor(status.st_dev) == minor)))
			return fd;
		close(fd);
	}
	errno = EOPNOTSUPP;
	return -1;
}

/* One line of /proc/self/maps into *vma; 0 if it is not in the range, -1 with errno. */
static int parse_line(char *line, char *start, char *end, struct vma *vma)
{
	unsigned long from, to, offset, inode;
	unsigned major, minor;
	char prot[5];
	int name_at = 0;
	char *name;

	if (sscanf(line, "%lx-%lx %4s %lx %x:%x %lu %n", &from, &to, prot, &offset, &major, &minor,
		   &inode, &name_at) < 7)
		return 0;
	if ((char *)to <= start || (char *)from >= end)
		return 0;
	name = line + name_at;
	name[strcspn(name, "\n")] = '\0';
	*vma = (struct vma){
		.vma_start = (char *)from,
		.vma_end = (char *)to,
		.start = (char *)from > start ? (char *)from : start,
		.end = (char *)to < end ? (char *)to : end,
		.prot = (prot[0] == 'r' ? PROT_READ : 0) | (prot[1] == 'w' ? PROT_WRITE : 0) |
			(prot[2] == 'x' ? PROT_EXEC : 0),
		.shared = prot[3] == 's',
		.offset = (off_t)offset,
		.file = -1,
	};
	/* The kernel's own names of anonymous memory, or ones given to it (prctl(2)). */
	if (vma->shared && major == 0 &&
	    (strcmp(name, "/dev/zero (deleted)") == 0 || strncmp(name, "[anon_shmem:", 12) == 0))
		return 1;
	if (!vma->shared && inode == 0 && (*name == '\0' || strncmp(name, "[anon:", 6) == 0))
		return 1;
	vma->mapped = true;
	if (*name != '/' || inode == 0) { /* the stack, the heap, a device's memory */
		errno = EOPNOTSUPP;
		return -1;
	}
	vma->file = open_mapped(vma, name, major, minor, inode);
	return vma->file < 0 ? -1 : 1;
}

int maps_find(struct donation *donation, char *end)
{
	FILE *maps = fopen("/proc/self/maps", "re");
	char *line = NULL;
	size_t capacity = 0;
	int result = 0;

	if (!maps)
		return -1;
	while (result == 0 && getline(&line, &capacity, maps) > 0) {
		struct vma vma;
		int kind = parse_line(line, donation->start, end, &vma);

		if (kind < 0)
			result = -1;
		if (kind <= 0)
			continue;
		if (donation->count == donation->capacity) {
			size_t more = donation->capacity ? 2 * donation->capacity : 16;
			struct vma *grown = realloc(donation->vmas, more * sizeof *grown);

			if (!grown) {
				result = -1;
				continue;
			}
			donation->vmas = grown;
			donation->capacity = more;
		}
		donation->vmas[donation->count++] = vma;
	}
	free(line);
	fclose(maps);
	return result;
}

/* Whether what begins there is memory of the donation that nobody may touch. */
static bool may_be_reserved(const struct donation *donation, unsigned long from)
{
	for (size_t i = 0; i < donation->count; i++) {
		const struct vma *vma = &donation->vmas[i];

		if (vma->vma_start == (char *)from && !vma->prot && !vma->shared && !vma->mapped)
			return true;
	}
	return false;
}

static bool has_reservations(const struct donation *donation)
{
	for (size_t i = 0; i < donation->count; i++) {
		const struct vma *vma = &donation->vmas[i];

		if (!vma->prot && !vma->shared && !vma->mapped)
			return true;
	}
	return false;
}

/*
 * Private memory that nobody may touch, that holds no page, and that is not accounted for
 * ("ac" in VmFlags), as it would be if it had been writable and was made inaccessible.
 */
int maps_reserved(const struct donation *donation)
{
	FILE *smaps;
	char *line = NULL;
	size_t capacity = 0;
	unsigned long pages = 0, value;
	bool within = false, reserved = false;

	if (!has_reservations(donation))
		return 0;
	smaps = fopen("/proc/self/smaps", "re");
	if (!smaps)
		return -1;
	while (!reserved && getline(&line, &capacity, smaps) > 0) {
		unsigned long from, to;

		if (sscanf(line, "%lx-%lx ", &from, &to) == 2) {
			within = may_be_reserved(donation, from);
			pages = 0;
		} else if (within && (sscanf(line, "Rss: %lu kB", &value) == 1 ||
				      sscanf(line, "Swap: %lu kB", &value) == 1)) {
			pages += value;
		} else if (within && strncmp(line, "VmFlags:", 8) == 0) {
			reserved = pages == 0 && !strstr(line, " ac");
		}
	}
	free(line);
	fclose(smaps);
	if (reserved)
		errno = EEXIST;
	return reserved;
}
