/* SPDX-License-Identifier: MIT */
/* Where msharefs is mounted. */
#include "internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define USUAL_ROOT "/sys/fs/mshare"
#define FSTYPE "fuse.msharefs"

int root_join(const struct root *root, const char *name, char out[PATH_MAX])
{
	size_t directory = strlen(root->path), length = strlen(name);

	if (directory + 1 + length >= PATH_MAX) {
		errno = ENAMETOOLONG;
		return -1;
	}
	memcpy(out, root->path, directory);
	out[directory] = '/';
	memcpy(out + directory + 1, name, length + 1);
	return 0;
}

/* mshare_info holds the alignment in bytes, decimal; -1 if this is no msharefs. */
static int read_alignment(struct root *root)
{
	char path[PATH_MAX], text[32];
	unsigned long long alignment;
	ssize_t got;
	char *end;
	int fd, saved;

	if (root_join(root, "mshare_info", path) < 0)
		return -1;
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	got = read(fd, text, sizeof text - 1);
	saved = errno;
	close(fd);
	errno = saved;
	if (got < 0)
		return -1;
	text[got] = '\0';
	errno = 0;
	alignment = strtoull(text, &end, 10);
	if (end == text || errno != 0 || alignment == 0 || (alignment & (alignment - 1)) != 0) {
		errno = EPROTO;
		return -1;
	}
	root->alignment = (size_t)alignment;
	return 0;
}

/* /proc/self/mountinfo writes space, tab, newline and backslash as \ooo. */
static void unescape(char *text)
{
	char *out = text;

	for (; *text; out++) {
		if (text[0] == '\\' && text[1] && text[2] && text[3]) {
			*out = (char)((text[1] - '0') * 64 + (text[2] - '0') * 8 + (text[3] - '0'));
			text += 4;
		} else {
			*out = *text++;
		}
	}
	*out = '\0';
}

/* The first fuse.msharefs in /proc/self/mountinfo (proc_pid_mountinfo(5)). */
static int search_mounts(struct root *root)
{
	FILE *mounts = fopen("/proc/self/mountinfo", "re");
	char *line = NULL;
	size_t capacity = 0;
	int found = -1;

	if (!mounts)
		return -1;
	while (found < 0 && getline(&line, &capacity, mounts) > 0) {
		char *type = strstr(line, " - ");
		char path[PATH_MAX];

		if (!type || strncmp(type + 3, FSTYPE " ", sizeof FSTYPE) != 0)
			continue;
		if (sscanf(line, "%*s %*s %*s %*s %4095s", path) != 1)
			continue;
		unescape(path);
		memcpy(root->path, path, strlen(path) + 1);
		found = read_alignment(root);
	}
	free(line);
	fclose(mounts);
	return found;
}

int root_find(struct root *root)
{
	const char *wanted = secure_getenv("MSHARE_ROOT");

	if (wanted && *wanted) {
		if (strlen(wanted) >= sizeof root->path) {
			errno = ENAMETOOLONG;
			return -1;
		}
		memcpy(root->path, wanted, strlen(wanted) + 1);
		return read_alignment(root);
	}
	memcpy(root->path, USUAL_ROOT, sizeof USUAL_ROOT);
	if (read_alignment(root) == 0)
		return 0;
	if (errno == ENOTCONN) /* the daemon of the usual mount has died: say so */
		return -1;
	if (search_mounts(root) == 0)
		return 0;
	errno = ENOENT;
	return -1;
}
