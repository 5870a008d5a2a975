/* SPDX-License-Identifier: MIT */
/* Where msharefs is mounted. */
#include "internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define USUAL_ROOT "/sys/fs/mshare"
#define FSTYPE "fuse.msharefs"

int root_join(const char *root, const char *name, char out[PATH_MAX])
{
	size_t directory = strlen(root), length = strlen(name);

	if (directory + 1 + length >= PATH_MAX) {
		errno = ENAMETOOLONG;
		return -1;
	}
	memcpy(out, root, directory);
	out[directory] = '/';
	memcpy(out + directory + 1, name, length + 1);
	return 0;
}

size_t root_alignment(const char *root)
{
	char path[PATH_MAX], text[32];
	unsigned long long alignment;
	ssize_t got;
	char *end;
	int fd, saved;

	if (root_join(root, "mshare_info", path) < 0)
		return 0;
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	got = read(fd, text, sizeof text - 1);
	saved = errno;
	close(fd);
	errno = saved;
	if (got < 0)
		return 0;
	text[got] = '\0';
	errno = 0;
	alignment = strtoull(text, &end, 10);
	if (end == text || errno != 0 || alignment == 0 || (alignment & (alignment - 1)) != 0) {
		errno = EPROTO;
		return 0;
	}
	return (size_t)alignment;
}

/*
 * Whether a directory is the root of an msharefs.  Every call asks, so it has to be
 * cheap: the kernel keeps the attributes of .control and of the root directory.
 */
int root_check(const char *root)
{
	char path[PATH_MAX];
	struct stat status;

	if (root_join(root, ".control", path) < 0)
		return -1;
	if (stat(path, &status) == 0) {
		if (S_ISSOCK(status.st_mode))
			return 0;
		errno = ENOENT;
	} else if (errno == ENOTDIR) {
		errno = ENOENT; /* nor is msharefs mounted on a file */
	}
	return -1;
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

/*
 * The first fuse.msharefs in /proc/self/mountinfo (proc_pid_mountinfo(5)) that answers;
 * ENOTCONN if there are none but those of dead daemons.
 */
static int search_mounts(char root[PATH_MAX])
{
	FILE *mounts = fopen("/proc/self/mountinfo", "re");
	char *line = NULL;
	size_t capacity = 0;
	int found = -1, why = ENOENT;

	if (!mounts)
		return -1;
	while (found < 0 && getline(&line, &capacity, mounts) > 0) {
		char *type = strstr(line, " - ");

		if (!type || strncmp(type + 3, FSTYPE " ", sizeof FSTYPE) != 0)
			continue;
		if (sscanf(line, "%*s %*s %*s %*s %4095s", root) != 1)
			continue;
		unescape(root);
		found = root_check(root);
		if (found < 0 && errno == ENOTCONN)
			why = ENOTCONN;
	}
	free(line);
	fclose(mounts);
	if (found < 0)
		errno = why;
	return found;
}

int root_find(char root[PATH_MAX])
{
	const char *wanted = secure_getenv("MSHARE_ROOT");

	if (wanted && *wanted) {
		if (strlen(wanted) >= PATH_MAX) {
			errno = ENAMETOOLONG;
			return -1;
		}
		memcpy(root, wanted, strlen(wanted) + 1);
		return root_check(root);
	}
	memcpy(root, USUAL_ROOT, sizeof USUAL_ROOT);
	if (root_check(root) == 0)
		return 0;
	if (errno == ENOTCONN) /* the daemon of the usual mount has died: say so */
		return -1;
	return search_mounts(root);
}
