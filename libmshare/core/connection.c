/* SPDX-License-Identifier: MIT */
/* Calls to the daemon over .control.  Async-signal-safe: system calls only. */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

static __thread char reason[sizeof((struct mshare_wire_reply *)0)->message];

void reason_forget(void)
{
	reason[0] = '\0';
}

void reason_say(const char *text)
{
	size_t length = strnlen(text, sizeof reason - 1);

	memcpy(reason, text, length);
	reason[length] = '\0';
}

bool reason_is_said(void)
{
	return reason[0] != '\0';
}

MSHARE_EXPORT const char *mshare_reason(void)
{
	static __thread char told[sizeof reason];

	memcpy(told, reason, sizeof told);
	reason_forget();
	return told;
}

#define MOST_FDS 2

/* connect(2) has no directory to begin from, and 107 bytes for a path. */
int connection_open(const struct root *root)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int connection = -1, result = -1, control = root_control(root);

	if (control < 0)
		return -1;
	path_of(control, address.sun_path);
	connection = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (connection >= 0) {
		do
			result = connect(connection, (struct sockaddr *)&address, sizeof address);
		while (result < 0 && errno == EINTR);
	}
	close_keeping_errno(control);
	if (result == 0)
		return connection;
	close_keeping_errno(connection);
	return -1;
}

static int send_request(int connection, const struct mshare_wire_request *request,
			const struct mshare_wire_object *objects, const int *fds, size_t fd_count)
{
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(MOST_FDS * sizeof(int))];
	} control;
	struct iovec parts[2] = {
		{ (void *)request, sizeof *request },
		{ (void *)objects, request->object_count * sizeof *objects },
	};
	struct msghdr message = { .msg_iov = parts, .msg_iovlen = 2 };
	ssize_t sent;

	if (fd_count > 0) {
		memset(&control, 0, sizeof control);
		message.msg_control = &control;
		message.msg_controllen = CMSG_SPACE(fd_count * sizeof(int));
		control.header.cmsg_level = SOL_SOCKET;
		control.header.cmsg_type = SCM_RIGHTS;
		control.header.cmsg_len = CMSG_LEN(fd_count * sizeof(int));
		memcpy(CMSG_DATA(&control.header), fds, fd_count * sizeof(int));
	}
	do
		sent = sendmsg(connection, &message, MSG_NOSIGNAL);
	while (sent < 0 && errno == EINTR);
	return sent < 0 ? -1 : 0;
}

/* The daemon is not trusted with our memory either: take one descriptor, check sizes. */
static int receive_reply(int connection, struct mshare_wire_reply *reply, int *fd, int flags)
{
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(sizeof(int))]; /* rounded up: room for two */
	} control;
	struct iovec part = { reply, sizeof *reply };
	struct msghdr message = {
		.msg_iov = &part,
		.msg_iovlen = 1,
		.msg_control = &control,
		.msg_controllen = sizeof control,
	};
	struct cmsghdr *header;
	const unsigned char *at;
	ssize_t got;

	*fd = -1;
	do
		got = recvmsg(connection, &message, MSG_CMSG_CLOEXEC | flags);
	while (got < 0 && errno == EINTR);
	if (got < 0)
		return -1;
	if (got == 0) {
		errno = ENOTCONN;
		return -1;
	}
	for (header = CMSG_FIRSTHDR(&message); header; header = CMSG_NXTHDR(&message, header)) {
		if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS)
			continue;
		at = CMSG_DATA(header);
		for (size_t left = header->cmsg_len - CMSG_LEN(0); left >= sizeof(int);
		     left -= sizeof(int), at += sizeof(int)) {
			int each;

			memcpy(&each, at, sizeof each);
			if (*fd < 0)
				*fd = each;
			else
				close(each);
		}
	}
	if ((size_t)got != sizeof *reply || reply->magic != MSHARE_WIRE_MAGIC ||
	    reply->version != MSHARE_WIRE_VERSION) {
		if (*fd >= 0)
			close(*fd);
		*fd = -1;
		errno = EPROTO;
		return -1;
	}
	return 0;
}

int connection_call(int connection, const struct mshare_wire_request *request,
		    const struct mshare_wire_object *objects, const int *fds, size_t fd_count,
		    struct mshare_wire_reply *reply, int *reply_fd)
{
	struct mshare_wire_request whole = *request;
	uint32_t noted = 0;

	*reply_fd = -1;
	whole.magic = MSHARE_WIRE_MAGIC;
	whole.version = MSHARE_WIRE_VERSION;
	/*
	 * A daemon that refuses at once has replied before we sent: the reply is
	 * what tells why, so it is read even if the send failed.
	 */
	if (send_request(connection, &whole, objects, fds, fd_count) < 0 && !daemon_is_gone(errno))
		return -1;
	for (;;) {
		if (receive_reply(connection, reply, reply_fd, 0) < 0) {
			if (!daemon_is_gone(errno))
				return -1;
			errno = ENOTCONN;
			return CONNECTION_LOST;
		}
		if (reply->op != MSHARE_WIRE_NOTE)
			break;
		noted = MSHARE_WIRE_PROTECTED;
		if (*reply_fd >= 0)
			close(*reply_fd);
	}
	reply->flags |= noted;
	if (reply->error != 0) {
		if (*reply_fd >= 0)
			close(*reply_fd);
		*reply_fd = -1;
		reason_say(reply->message);
		errno = reply->error;
		return -1;
	}
	return 0;
}

int connection_noted(int connection)
{
	struct mshare_wire_reply reply;
	int ignored;

	if (receive_reply(connection, &reply, &ignored, MSG_DONTWAIT) < 0)
		return errno == EAGAIN ? 0 : CONNECTION_LOST;
	if (ignored >= 0)
		close(ignored);
	return 1;
}
